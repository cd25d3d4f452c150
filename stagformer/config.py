"""What a staggered model is: a plain model's shape, how its layers are cut into stacks, and what a stack reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backbone.config import ModelConfig
from backbone.errors import ConfigError

CONTEXTS = ('prev', 'all_prev')


@dataclasses.dataclass(frozen=True)
class StagFormerConfig:
    """p stacks of `depths` layers; every stack starts from the token embeddings, and stack s > 0 also attends to the
    final outputs of lower stacks at earlier positions (Cutler et al., 2025, arXiv 2501.15665).

    base: the plain model of the same layers. base.num_layers = sum(depths), or, where `shared`, the depth of every
    stack: then all stacks have the same weights but for their cross-attention.
    window: a stack sees that many latest positions of its context; None for all. context_from: 'prev', the stack below;
    'all_prev', all stacks below, each with keys and values of its own.
    lag: position i reads context positions up to i - lag. 1 is staggered; 0 is the control that is not: it has the same
    parameters, and its stacks cannot run at once.
    mix: the head reads a learned sum of all stacks' outputs instead of the last one's.
    Choices that the paper leaves open: context_norm (a norm on each stack's output before others read it), cross_rope
    (true positions on queries and keys), cross_kv_heads (0: as in self-attention), zero_init (the cross-attention's
    output projection starts at zero: the last stack starts as a plain shallow model).
    """

    base: ModelConfig
    depths: tuple[int, ...]
    shared: bool = False
    window: int | None = None
    context_from: str = 'prev'
    lag: int = 1
    mix: bool = False
    context_norm: bool = True
    cross_rope: bool = True
    cross_kv_heads: int = 0
    zero_init: bool = False

    def __post_init__(self):
        depths, layers = self.depths, self.base.num_layers
        if not depths or min(depths) < 1:
            raise ConfigError(f'depths: every stack needs a layer, got {depths}')
        if self.shared and set(depths) != {layers}:
            raise ConfigError(f'shared: every stack is the whole base of {layers} layers, got depths {depths}')
        if not self.shared and sum(depths) != layers:
            raise ConfigError(f'depths {depths} are {sum(depths)} layers, the base has {layers}')
        if self.window is not None and self.window < 1:
            raise ConfigError(f'window must be at least 1 or None, got {self.window}')
        if self.context_from not in CONTEXTS:
            raise ConfigError(f'context_from: unknown {self.context_from!r}, one of {", ".join(CONTEXTS)}')
        if self.lag not in (0, 1):
            raise ConfigError(f'lag must be 1 (staggered) or 0 (the control that is not), got {self.lag}')
        if self.base.norm_placement != 'pre':
            raise ConfigError('a staggered model needs norm_placement pre')
        if self.base.moe is not None:
            raise ConfigError('moe: a staggered model has no mixture of experts')
        if self.base.attention.num_heads % self.kv_heads:
            raise ConfigError(f'cross_kv_heads {self.cross_kv_heads} do not divide '
                              f'{self.base.attention.num_heads} heads')

    @classmethod
    def even(cls, base: ModelConfig, stacks: int, *, shared: bool = False, **options: Any) -> StagFormerConfig:
        """`stacks` stacks of equal depth; where `shared`, each is the whole base. Errors: ConfigError where the
        layers do not divide."""
        if stacks < 1:
            raise ConfigError(f'stacks must be at least 1, got {stacks}')
        if not shared and base.num_layers % stacks:
            raise ConfigError(f'{base.num_layers} layers are not {stacks} stacks of equal depth: give depths')
        depth = base.num_layers if shared else base.num_layers // stacks
        return cls(base, (depth,) * stacks, shared, **options)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StagFormerConfig:
        """The inverse of to_dict. Errors: ConfigError names an unknown field."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := [key for key in fields if key not in known]:
            raise ConfigError(f'unknown config key: {", ".join(unknown)}')
        return cls(**{**fields, 'base': ModelConfig.from_dict(fields['base']), 'depths': tuple(fields['depths'])})

    @property
    def stacks(self) -> int:
        return len(self.depths)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the cross-attention."""
        return self.cross_kv_heads or self.base.attention.num_kv_heads

    @property
    def apart(self) -> StagFormerConfig:
        """The same model where every stack has a copy of its own of shared weights."""
        if not self.shared:
            return self
        return dataclasses.replace(self, shared=False, base=self.base.replace(num_layers=sum(self.depths)))

    @property
    def equal(self) -> bool:
        return len(set(self.depths)) == 1

    def sources(self, stack: int) -> tuple[int, ...]:
        """The stacks that `stack` reads."""
        return tuple(range(stack)) if self.context_from == 'all_prev' else (stack - 1,) if stack else ()

    @property
    def cross_layers(self) -> int:
        return sum(self.depths[1:])

    @property
    def cross_sources(self) -> int:
        """Key/value projections: one for each cross-attending layer and each stack it reads."""
        return sum(depth * len(self.sources(s)) for s, depth in enumerate(self.depths))
