"""How many bytes a decode step must read, how many FLOPs it must do, and how long a device needs for that.

The model of a step: `batch` rows, each with `context` tokens in its cache, run `k_tokens` new tokens. Weights are
read once whatever the batch and k_tokens are; of the input embedding only the rows of the tokens are read. Keys and
values are read for the whole context of every row. Activations of these shapes stay in cache and are not counted. Of a
mixture of experts a token multiplies by its own experts, and a step reads those that some token needs (`experts_read`).

`matmul_bytes` counts the same on any traced function instead: the operands of every matrix product at the type in
which they are stored. It needs to know nothing of the model or of the method.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from backbone.config import ModelConfig

ITEM_BYTES = {'float32': 4.0, 'bfloat16': 2.0, 'float16': 2.0, 'int8': 1.0}


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip. memory_bytes_per_s: of its main memory; flops: dense peak a second, by type of the matmul inputs.

    link_bytes_per_s: what it can send to its neighbours over all links at once, one direction; `torus` dimensions
    share it equally (0: a switch, every byte goes at the full rate). usable_bytes: what the compiler gives a program,
    cycles_per_s: of the cycles it counts, where those are known. hop_s: what a message to a neighbour takes however
    small it is; 0 where no document says.
    """

    name: str
    memory_bytes_per_s: float
    flops: dict[str, float]
    memory_bytes: float
    link_bytes_per_s: float = math.inf
    torus: int = 0
    usable_bytes: float | None = None
    cycles_per_s: float | None = None
    hop_s: float = 0.0

    def __hash__(self):
        return hash(self.name)


# "Each hop over an ICI link has some intrinsic overhead regardless of the data volume. This is typically around 1us."
# Austin et al., How to Scale Your Model (2025), "Sharded Matrices and How to Multiply Them"; the same for every chip.
TPU_HOP_S = 1e-6


def _tpu(name, gb_per_s, tflops, gb, link_gb, torus, usable_gib, ghz):
    # A float32 product of full precision is six bfloat16 passes on the matrix unit (jax.lax.Precision.HIGHEST).
    # The documents give the links' bandwidth in both directions together.
    return Device(name, gb_per_s * 1e9, {'bfloat16': tflops * 1e12, 'float32': tflops * 1e12 / 6}, gb * 1e9,
                  link_gb / 2 * 1e9, torus, usable_gib * 2**30, ghz * 1e9, TPU_HOP_S)


DEVICES = {d.name: d for d in (
    # Usable GiB: what the TPU compiler says it has when it refuses a program ("exceeds available HBM"). GHz: the clock
    # at which the matrix units (2^17, 2^18, 2^19 FLOPs a cycle, as the compiler counts cycles) reach the stated peak.
    # cloud.google.com/tpu/docs/v5e, table "Key chip specifications": 197 TFLOPs bf16, 16 GB, 819 GBps; interconnect
    # 400 GBps, 2D torus.
    _tpu('tpu-v5e', 819, 197, 16, 400, 2, 15.75, 1.5),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs bf16, 95 GB, 2765 GBps; interconnect 1200 GBps, 3D torus.
    _tpu('tpu-v5p', 2765, 459, 95, 1200, 3, 95.74, 1.75),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs bf16, 32 GB, 1640 GBps; interconnect 800 GBps, 2D torus.
    _tpu('tpu-v6e', 1640, 918, 32, 800, 2, 31.25, 1.75),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM column: 80 GB, 3.35 TB/s, FP32 67 TFLOPS, BF16 1979 TFLOPS with
    # sparsity, half of it dense; NVLink 900 GB/s, both directions together. Usable: JAX takes three quarters of a
    # GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    Device('h100', 3.35e12, {'bfloat16': 989.5e12, 'float32': 67e12}, 80e9, 450e9, usable_bytes=0.75 * 80e9),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM column: 141 GB, 4.8 TB/s, otherwise as the H100.
    Device('h200', 4.8e12, {'bfloat16': 989.5e12, 'float32': 67e12}, 141e9, 450e9, usable_bytes=0.75 * 141e9),
)}

# jax.Device.device_kind of the chips above, as a substring in lower case; the first match counts.
_KINDS = (('v5 lite', 'tpu-v5e'), ('v5e', 'tpu-v5e'), ('v5', 'tpu-v5p'), ('v6', 'tpu-v6e'),
          ('h100', 'h100'), ('h200', 'h200'))


def known_device(device_kind: str) -> Device | None:
    """The description for a jax.Device.device_kind; None for a chip that is not listed (a CPU is measured)."""
    return next((DEVICES[name] for part, name in _KINDS if part in device_kind.lower()), None)


def measured_cpu(bytes_per_s: float, flops: dict[str, float], memory_bytes: float) -> Device:
    """This CPU, from numbers measured in the run that uses them."""
    return Device('cpu-measured', bytes_per_s, dict(flops), memory_bytes)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one decode step reads and does. Bytes and FLOPs of the whole batch."""

    weight_bytes: float
    embed_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.embed_bytes + self.cache_bytes


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds if reading and computing overlap perfectly: the larger of the two."""

    cost: Cost
    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return 'memory' if self.memory_s >= self.compute_s else 'compute'


def experts_read(config: ModelConfig, tokens: int) -> float | None:
    """How many experts of a layer `tokens` tokens need together, on average, if each chose on its own and all experts
    alike: E (1 - (1 - K/E)^tokens). None without a mixture. Real routing is lopsided and repeats itself: fewer."""
    if config.moe is None:
        return None
    e = config.moe.num_experts
    return e * (1 - (1 - config.moe.experts_per_token / e) ** tokens)


def layer_params(config: ModelConfig, experts: float | None = None) -> tuple[float, int]:
    """(scalars of one layer's matrices, scalars of its biases and norms). experts: of a mixture so many count, default
    those that one token passes."""
    d, a, m = config.hidden_size, config.attention, config.mlp
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    matrices = d * (q + 2 * kv) + q * d + config.feed_scalars(experts)
    vectors = 2 * d * (2 if config.norm == 'layer' else 1)
    vectors += (q + 2 * kv) * a.qkv_bias + d * a.out_bias + (q + kv) * a.qk_norm
    vectors += (m.intermediate_size * (2 if m.gated else 1) + d) * m.bias
    return matrices, vectors


def read_params(config: ModelConfig, experts: float | None = None) -> tuple[float, int]:
    """(scalars of all matrices a step multiplies by, scalars of the vectors it reads besides).

    The unembedding counts in full, tied or not; the input embedding does not (its rows are `embed_scalars`).
    experts: see `layer_params`.
    """
    matrices, vectors = (config.num_layers * n for n in layer_params(config, experts))
    width = config.embed_size or config.hidden_size
    matrices += width * config.vocab_size
    if config.embed_size:
        matrices += 2 * config.hidden_size * config.embed_size
    if config.has_final_norm:
        vectors += config.hidden_size * (2 if config.norm == 'layer' else 1)
    return matrices, vectors


def embed_scalars(config: ModelConfig) -> int:
    """Scalars gathered for one token: its embedding row, and its position's where positions are learned."""
    learned = config.hidden_size if config.attention.position == 'learned' else 0
    return (config.embed_size or config.hidden_size) + learned


def cache_scalars(config: ModelConfig) -> int:
    """Scalars the key-value cache holds for one token."""
    return 2 * config.num_layers * config.attention.num_kv_heads * config.attention.head_dim


def step_cost(config: ModelConfig, *, batch: int = 1, k_tokens: int = 1, dtype: str = 'float32', context: int = 0,
              cache_dtype: str | None = None) -> Cost:
    """Bytes and FLOPs of one forward of k_tokens for each of `batch` rows with `context` tokens cached.

    dtype: of the weights, a key of ITEM_BYTES; cache_dtype: of keys and values (default: dtype).
    """
    size, cache_size = ITEM_BYTES[dtype], ITEM_BYTES[cache_dtype or dtype]
    matrices, vectors = read_params(config)
    window = config.attention.window or math.inf
    # Token i sees the context, the tokens of the block before it, and itself; a window cuts that.
    seen = sum(min(context + i + 1, window) for i in range(k_tokens))
    read = min(context + k_tokens, window + k_tokens - 1)
    width = config.attention.num_heads * config.attention.head_dim
    read_once = read_params(config, experts_read(config, batch * k_tokens))[0]
    return Cost(
        weight_bytes=(read_once + vectors) * size,
        embed_bytes=batch * k_tokens * embed_scalars(config) * size,
        cache_bytes=batch * read * cache_scalars(config) * cache_size,
        flops=2.0 * batch * (k_tokens * matrices + 2 * config.num_layers * width * seen),
    )


def step_time(config: ModelConfig, device: Device, *, batch: int = 1, k_tokens: int = 1, dtype: str = 'float32',
              context: int = 0, cache_dtype: str | None = None) -> StepTime:
    """The least time one such step takes on the device. Errors: KeyError for a dtype without a peak there."""
    cost = step_cost(config, batch=batch, k_tokens=k_tokens, dtype=dtype, context=context, cache_dtype=cache_dtype)
    return StepTime(cost, cost.bytes / device.memory_bytes_per_s, cost.flops / device.flops[dtype])


# ---------------------------------------------------------------------------------------------------------------
# Training


def train_flops(config: ModelConfig, batch: int, seq_len: int) -> float:
    """FLOPs one training step of batch x seq_len tokens needs, over all chips: three times the forward pass.

    What model FLOPs utilisation (MFU) is measured against (Chowdhery et al., PaLM, 2022, appendix B): what
    rematerialisation computes again does not count, nor do scores that the causal mask throws away.
    """
    return 3 * step_cost(config, batch=batch, k_tokens=seq_len).flops


# Bytes each chip must send for a collective over g chips, as a multiple of its payload (see `collective_seconds`).
_SENT = {
    'all-gather': lambda g: (g - 1) / g,
    'reduce-scatter': lambda g: (g - 1) / g,
    'all-reduce': lambda g: 2 * (g - 1) / g,
    'all-to-all': lambda g: (g - 1) / g,
}


def sent_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes one chip must send. payload: the gathered array of an all-gather, the unreduced one of a reduce-scatter,
    else what one chip holds. A permute, and what is not listed, sends its payload once."""
    return payload * _SENT.get(kind, lambda g: 1.0)(group)


def collective_seconds(device: Device, kind: str, payload: float, group: int, dimensions: int | None = None) -> float:
    """The least time a collective takes: its bytes over the links it can use, latency and other traffic aside.

    dimensions: along how many dimensions of the torus the group extends (default all): only their links help.
    """
    share = 1.0 if not device.torus or dimensions is None else min(dimensions, device.torus) / device.torus
    return sent_bytes(kind, payload, group) / (device.link_bytes_per_s * share) if share else 0.0


# ---------------------------------------------------------------------------------------------------------------
# The same, counted on a traced function

# Operations that hand the same stored numbers on: an operand is charged at the type it had before them.
_VIEWS = {'convert_element_type', 'reshape', 'transpose', 'squeeze', 'broadcast_in_dim', 'slice', 'dynamic_slice',
          'expand_dims', 'copy', 'optimization_barrier'}
_PRODUCTS = {'dot_general', 'conv_general_dilated', 'ragged_dot', 'ragged_dot_general'}
_MOVES = ('headway_rows', 'headway_store')


def matmul_bytes(fn: Callable, *args: Any, **kwargs: Any) -> float:
    """Bytes of the operands of every matrix product that fn(*args, **kwargs) runs, each counted at each use.

    Arguments are arrays or jax.ShapeDtypeStruct; nothing is computed. A scan counts its length times; a while
    loop, whose trips are unknown, once; of a `cond` the dearest branch; a ragged product all its groups.
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, {})


def _stored_bytes(var, sources: dict) -> float:
    item = sources.get(var, var.aval.dtype) if not isinstance(var, core.Literal) else var.aval.dtype
    # A broadcast axis of size one is read once; shapes before broadcasting are not tracked, which only matters
    # for operands nobody broadcasts (weights).
    return math.prod(var.aval.shape) * item.itemsize


def _count(jaxpr, sources: dict) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            total += sum(_stored_bytes(v, sources) for v in eqn.invars[:2])
        elif name in _VIEWS:
            for var, out in zip(eqn.invars, eqn.outvars, strict=False):
                sources[out] = sources.get(var, var.aval.dtype) if not isinstance(var, core.Literal) else var.aval.dtype
        elif name == 'ffi_call' and eqn.params['target_name'] in _MOVES:
            continue  # no product: like XLA's own gathers and scatters
        elif name in ('pallas_call', 'ffi_call'):  # the project's own kernels: they read what they are given
            total += sum(_stored_bytes(v, sources) for v in eqn.invars)
        else:
            inner = [_inner(sub, eqn, sources) for sub in _subjaxprs(eqn)]
            if name == 'cond':
                total += max(inner, default=0.0)
            else:
                total += sum(inner) * (eqn.params['length'] if name == 'scan' else 1)
    return total


def _subjaxprs(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, 'eqns'):
                yield item
            elif hasattr(item, 'jaxpr') and hasattr(item.jaxpr, 'eqns'):
                yield item.jaxpr


def _inner(sub, eqn, sources: dict) -> float:
    """Counts a sub-computation; its arguments keep the stored type of what is handed in, matched from the end."""
    known = dict(sources)
    for outer, var in zip(reversed(eqn.invars), reversed(sub.invars), strict=False):
        if not isinstance(outer, core.Literal) and outer in sources:
            known[var] = sources[outer]
    return _count(sub, known)
