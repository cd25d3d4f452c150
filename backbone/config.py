"""What shape a model has: frozen, hashable, checked when made.

`ModelConfig.from_dict` rejects an unknown key by its dotted name; `to_dict` is its inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backbone.errors import ConfigError

FAMILIES = ('llama', 'qwen2', 'opt', 'gemma', 'mixtral', 'olmoe')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu')


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (Llama 3.1 release, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self):
        _require(self.factor >= 1, f'rope_scaling.factor must be >= 1, got {self.factor}')
        _require(self.high_freq_factor > self.low_freq_factor,
                 'rope_scaling.high_freq_factor must exceed low_freq_factor')


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """`num_heads` query heads share `num_kv_heads` key/value heads (GQA)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    position: str = 'rope'  # 'rope' | 'learned'
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # a query sees this many latest slots, itself included
    qk_norm: bool = False  # RMS norm over the whole query and key projections (OLMoE)

    def __post_init__(self):
        for name in ('num_heads', 'num_kv_heads', 'head_dim'):
            _require(getattr(self, name) > 0, f'attention.{name} must be positive')
        _require(self.num_heads % self.num_kv_heads == 0,
                 f'attention.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}')
        _require(self.position in ('rope', 'learned'), f'attention.position: unknown {self.position!r}')
        _require(self.position != 'rope' or self.head_dim % 2 == 0, 'attention.head_dim must be even under rope')
        _require(self.window is None or self.window > 0, 'attention.window must be positive')


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """`gated`: down(act(gate x) * up x), else down(act(up x))."""

    intermediate_size: int
    activation: str = 'silu'
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        _require(self.intermediate_size > 0, 'mlp.intermediate_size must be positive')
        _require(self.activation in ACTIVATIONS, f'mlp.activation: unknown {self.activation!r}')


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in the place of the MLP: each token goes through experts_per_token of num_experts.

    The model's `mlp` is then the shape of one expert. norm_topk: the chosen experts' probabilities are scaled to sum to
    one (Mixtral), or taken as they are (OLMoE). shared_size: intermediate size of an expert that every token passes
    besides; 0: none.
    """

    num_experts: int
    experts_per_token: int
    norm_topk: bool = True
    shared_size: int = 0

    def __post_init__(self):
        _require(1 <= self.experts_per_token <= self.num_experts,
                 f'moe.experts_per_token {self.experts_per_token} is not in 1..{self.num_experts} (moe.num_experts)')
        _require(self.shared_size >= 0, f'moe.shared_size must be >= 0, got {self.shared_size}')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes count scalars; `max_seq_len` counts tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_seq_len: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: str = 'rms'  # 'rms' | 'layer'
    norm_eps: float = 1e-5
    norm_placement: str = 'pre'  # 'post' is OPT-350m's
    tie_embeddings: bool = False
    embed_size: int | None = None  # narrower embedding with projections in and out (OPT-350m)
    position_offset: int = 0  # learned positions start at this row (OPT: 2)
    embed_scale: float | None = None  # Gemma multiplies embeddings by sqrt(hidden_size)
    moe: MoeConfig | None = None  # every layer's MLP is a mixture of experts; `mlp` is one of them

    def __post_init__(self):
        _require(self.family in FAMILIES, f'family: unknown {self.family!r}, one of {", ".join(FAMILIES)}')
        for name in ('vocab_size', 'hidden_size', 'num_layers', 'max_seq_len'):
            _require(getattr(self, name) > 0, f'{name} must be positive')
        _require(self.norm in ('rms', 'layer'), f'norm: unknown {self.norm!r}')
        _require(self.norm_placement in ('pre', 'post'), f'norm_placement: unknown {self.norm_placement!r}')
        _require(self.moe is None or not self.mlp.bias, 'moe: experts have no bias, mlp.bias must be False')
        _require(self.moe is not None or self.family not in ('mixtral', 'olmoe'), f'family {self.family} needs moe')

    @property
    def has_final_norm(self) -> bool:
        return self.norm_placement == 'pre'

    def feed_scalars(self, experts: float | None = None) -> float:
        """Scalars in the matrices of one layer's MLP. Of a mixture: its router, its shared expert and `experts` experts
        (default: as many as one token passes)."""
        each = self.hidden_size * (3 if self.mlp.gated else 2)
        if self.moe is None:
            return each * self.mlp.intermediate_size
        experts = self.moe.experts_per_token if experts is None else experts
        return self.hidden_size * self.moe.num_experts + each * (
            self.moe.shared_size + experts * self.mlp.intermediate_size)

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Errors: ConfigError names an unknown or missing key by its dotted path."""
        return _build(cls, data, '')


@dataclasses.dataclass(frozen=True)
class SsmConfig:
    """A Mamba-2 mixer of expansion 1 in the shape of a grouped attention (backbone/mamba2.py).

    num_heads H, each with a state [head_dim P, state_size N]; x and B are made for num_groups G groups of H / G
    neighbouring heads. conv_width: taps of the causal convolution. chunk: tokens at a time in whole sequences.
    gated_norm: whether the gated heads pass a norm of their own (RMS over P) before the output projection.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    state_size: int
    conv_width: int = 4
    chunk: int = 64
    gated_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ('num_heads', 'num_groups', 'head_dim', 'state_size', 'chunk'):
            _require(getattr(self, name) > 0, f'ssm.{name} must be positive, got {getattr(self, name)}')
        _require(self.conv_width > 1, f'ssm.conv_width must be at least 2, got {self.conv_width}')
        _require(self.norm_eps > 0, f'ssm.norm_eps must be positive, got {self.norm_eps}')
        _require(self.num_heads % self.num_groups == 0,
                 f'ssm.num_heads {self.num_heads} is not a multiple of num_groups {self.num_groups}')

    @classmethod
    def like(cls, cfg: ModelConfig, **changes: Any) -> SsmConfig:
        """In the shape of a model's attention, so that its output projection fits: a group for each key/value head.
        Errors: ConfigError names an unknown field."""
        unknown = [name for name in changes if name not in {f.name for f in dataclasses.fields(cls)}]
        _require(not unknown, f'ssm: unknown field {", ".join(unknown)}')
        att = cfg.attention
        sizes = {'num_heads': att.num_heads, 'num_groups': att.num_kv_heads, 'head_dim': att.head_dim,
                 'state_size': att.head_dim}
        return cls(**(sizes | changes))

    @property
    def inner(self) -> int:
        """H P: width of the gate and of what the output projection reads."""
        return self.num_heads * self.head_dim

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """Columns of the input projection: z | x | B | C | dt."""
        h, g, p, n = self.num_heads, self.num_groups, self.head_dim, self.state_size
        return h * p, g * p, g * n, h * n, h

    @property
    def conv_channels(self) -> int:
        """x, B and C."""
        return sum(self.parts[1:4])


_NESTED = {'attention': AttentionConfig, 'mlp': MlpConfig, 'moe': MoeConfig, 'rope_scaling': RopeScaling}


def _build(cls, data: Mapping[str, Any], prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [prefix + k for k in data if k not in fields]
    _require(not unknown, f'unknown config key: {", ".join(unknown)}')
    missing = [prefix + n for n, f in fields.items()
               if n not in data and f.default is dataclasses.MISSING]
    _require(not missing, f'missing config key: {", ".join(missing)}')
    values = {k: _build(_NESTED[k], v, f'{prefix}{k}.') if k in _NESTED and isinstance(v, Mapping) else v
              for k, v in data.items()}
    return cls(**values)
