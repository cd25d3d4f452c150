"""What a decode step of a model in stacks reads and does: hops and stages for the model of harness/roofline.py.

Stacks start from the same embedding and run at once. Every layer of a stack above the lowest also attends to outputs
of lower stacks at earlier positions: it has a cross block, whose keys and values are one more cache (StagFormer, Cutler
et al., 2025, arXiv 2501.15665). On one device all stacks read their weights from one memory: the step saves no bytes
(unless the stacks share weights, which are then read once). On a device a stack, or a group of them, the slowest stack
counts, and what travels: one hand-over of the stacks' outputs, one reduction that gives all stages the last one's.

Bandwidth-bound, with W and X the bytes of a layer's and a cross block's weights, K and Kx of their caches and h of the
head, p stages of l/p layers take (l/p)(W + X + K + Kx) + h of the last stage, or h/p where the head is split, against
l(W + K) + h.
"""

from __future__ import annotations

import dataclasses
import math

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from harness.roofline import ITEM_BYTES, Cost, Device, collective_seconds, embed_scalars, layer_params


@dataclasses.dataclass(frozen=True)
class Stacks:
    """How the layers of a ModelConfig are used; its own num_layers does not count.

    depths: layers of each stack, the lowest first; one stack is the plain model. window: earlier positions a cross
    block reads (None: all). shared: one set of layers for all stacks, cross blocks apart. all_prev: a stack reads every
    lower stack, with keys and values for each; else only the next lower one. cross_kv_heads: 0 as the config's.
    """

    depths: tuple[int, ...]
    window: int | None = None
    shared: bool = False
    all_prev: bool = False
    cross_kv_heads: int = 0

    def __post_init__(self):
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(f'depths must be at least 1 each, got {self.depths}')
        if self.window is not None and self.window < 1:
            raise ConfigError(f'window must be at least 1, got {self.window}')
        if self.shared and len(set(self.depths)) > 1:
            raise ConfigError(f'shared: stacks of one set of layers are equally deep, got depths {self.depths}')

    def sources(self, stack: int) -> int:
        """How many stacks it reads."""
        return stack if self.all_prev else min(stack, 1)


def cross_params(config: ModelConfig, stacks: Stacks, stack: int) -> tuple[int, int]:
    """(scalars of the matrices, of the norm) of one cross block of that stack; nothing in the lowest."""
    if not stack:
        return 0, 0
    d, a = config.hidden_size, config.attention
    kv_heads = stacks.cross_kv_heads or a.num_kv_heads
    matrices = 2 * d * a.num_heads * a.head_dim + 2 * stacks.sources(stack) * d * kv_heads * a.head_dim
    return matrices, d * (2 if config.norm == 'layer' else 1)


def kv_scalars(config: ModelConfig, stacks: Stacks, tokens: int) -> int:
    """Scalars the caches of one row hold after `tokens` tokens: of self-attention in every layer, and in every layer
    above the lowest stack of each stack it reads. Two stacks without a window hold half as much again as one."""
    a = config.attention
    cross_heads = stacks.cross_kv_heads or a.num_kv_heads
    own = a.num_kv_heads * sum(stacks.depths) * min(tokens, a.window or tokens)
    cross = sum(depth * stacks.sources(s) for s, depth in enumerate(stacks.depths))
    return 2 * a.head_dim * (own + cross_heads * cross * min(tokens, stacks.window or tokens))


def stage_costs(config: ModelConfig, stacks: Stacks, *, batch: int = 1, context: int = 0, dtype: str = 'bfloat16',
                cache_dtype: str | None = None) -> tuple[Cost, ...]:
    """One token for each of `batch` rows with `context` tokens cached: what each stack reads and does, without head."""
    size, cache_size, a = ITEM_BYTES[dtype], ITEM_BYTES[cache_dtype or dtype], config.attention
    width, cross_heads = a.num_heads * a.head_dim, stacks.cross_kv_heads or a.num_kv_heads
    seen = min(context + 1, a.window or math.inf)
    before = min(context, stacks.window or math.inf)  # strictly earlier: the stack below is at this token, too
    found = []
    for s, depth in enumerate(stacks.depths):
        (matrices, vectors), (more, norm) = layer_params(config), cross_params(config, stacks, s)
        projection = config.hidden_size * (config.embed_size or 0)
        total = depth * (matrices + more) + projection
        sources = stacks.sources(s)
        found.append(Cost(
            weight_bytes=(total + depth * (vectors + norm) + norm) * size,  # one more norm, of what it reads
            embed_bytes=batch * embed_scalars(config) * size,
            cache_bytes=2 * batch * depth * a.head_dim * cache_size
            * (a.num_kv_heads * seen + sources * cross_heads * before),
            flops=2.0 * batch * (total + 2 * width * depth * (seen + sources * before))))
    return tuple(found)


def head_cost(config: ModelConfig, *, batch: int = 1, dtype: str = 'bfloat16') -> Cost:
    """Final norm and unembedding of one token a row."""
    width = config.embed_size or config.hidden_size
    matrices = width * config.vocab_size + config.hidden_size * (config.embed_size or 0)
    norm = config.hidden_size * (2 if config.norm == 'layer' else 1) * config.has_final_norm
    return Cost((matrices + norm) * ITEM_BYTES[dtype], 0.0, 0.0, 2.0 * batch * matrices)


def on_one_device(config: ModelConfig, stacks: Stacks, **request) -> Cost:
    """All stacks without the head, from one memory. request: as of `stage_costs`."""
    parts = stage_costs(config, stacks, **request)
    total = Cost(*(sum(values) for values in zip(*map(dataclasses.astuple, parts), strict=True)))
    if not stacks.shared:
        return total
    matrices, vectors = layer_params(config)
    again = (len(parts) - 1) * (stacks.depths[0] * (matrices + vectors)
                                + config.hidden_size * (config.embed_size or 0))
    return dataclasses.replace(total, weight_bytes=total.weight_bytes - again * ITEM_BYTES[request.get(
        'dtype', 'bfloat16')])


@dataclasses.dataclass(frozen=True)
class StaggeredStep:
    """stages: what each stage does before the head; head: all of it. stage_s: of the slowest stage, its part of the
    head included. link_s: bytes on the links. hops: messages that wait for one another, of hop_s each."""

    stages: tuple[Cost, ...]
    head: Cost
    stage_s: float
    link_s: float
    hops: int
    hop_s: float

    @property
    def seconds(self) -> float:
        return self.stage_s + self.link_s + self.hops * self.hop_s


def staggered_step(config: ModelConfig, device: Device, stacks: Stacks, *, stages: int = 1, chips: int = 1,
                   split_head: bool = False, batch: int = 1, context: int = 0, dtype: str = 'bfloat16',
                   cache_dtype: str | None = None) -> StaggeredStep:
    """The least time of one decode step, one token a row.

    stages: 1, all stacks in one place, or one stage a stack. chips: of each stage; they share its weights and caches
    evenly and reduce their sums after each attention, cross block and MLP (a plain model on n chips: one stack, one
    stage). split_head: every stage has its share of the vocabulary; else the last one has it all. Links: every message
    waits, nothing is hidden behind the head; a reduction over n chips takes log2(n) hops at least.
    Errors: ConfigError for another number of stages; KeyError for a dtype without a peak on the device.
    """
    if stages not in (1, len(stacks.depths)) or chips < 1:
        raise ConfigError(f'stages must be 1 or {len(stacks.depths)} and chips at least 1, got {stages} and {chips}')
    request = {'batch': batch, 'context': context, 'dtype': dtype, 'cache_dtype': cache_dtype}
    parts = stage_costs(config, stacks, **request) if stages > 1 else (on_one_device(config, stacks, **request),)
    head = head_cost(config, batch=batch, dtype=dtype)

    def seconds(cost: Cost, share: int) -> float:
        return max(cost.bytes / device.memory_bytes_per_s, cost.flops / device.flops[dtype]) / share

    # What one chip sends for one token of all rows: activations are as wide as the weights' type.
    payload = batch * config.hidden_size * ITEM_BYTES[dtype] * (len(stacks.depths) if stages == 1 else 1)
    hops_of = lambda group: math.ceil(math.log2(group))
    reductions = max(depth * (3 if s else 2) for s, depth in enumerate(stacks.depths))
    link_s = reductions * collective_seconds(device, 'all-reduce', payload, chips)
    hops = reductions * hops_of(chips)
    if stages > 1:
        link_s += collective_seconds(device, 'collective-permute', payload, stages)
        link_s += collective_seconds(device, 'all-reduce', payload, stages)
        hops += 1 + hops_of(stages) * (2 if split_head else 1)  # a split head has one more: whose word is the best
    times = [seconds(part, chips) for part in parts]
    if split_head:
        stage_s = max(times) + seconds(head, chips * stages)
    else:
        stage_s = max(*times[:-1], times[-1] + seconds(head, chips), 0.0)
    return StaggeredStep(parts, head, stage_s, link_s, hops, device.hop_s)
