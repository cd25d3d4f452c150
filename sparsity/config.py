"""What share of a model a token goes through, in which units, and how often that is decided anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from backbone.config import ModelConfig
from backbone.errors import ConfigError

HEAD_UNITS = ('head', 'kv_group')
ROWS = ('each', 'union')
RANKINGS = ('local', 'global', 'hybrid')
PARTS = ('heads', 'neurons')


def kept(n: int, share: float) -> int:
    """How many of n units stay when `share` of them is kept: n - floor((1 - share) n)."""
    return n - math.floor((1 - share) * n + 1e-9)


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """After Akhauri et al., 2024 (ShadowLLM, arXiv 2406.16635); blocks, KV groups, refreshing, offline counts and the
    two meanings of a batch are ours.

    heads, neurons: share KEPT of the heads (in head_unit) and of the MLP's neurons (in blocks), 1.0 = dense.
    head_unit: 'head', a query head; 'kv_group', the query heads that share a key/value head, so that the cache of a
    dropped group need not be read either.
    block: consecutive neurons that are kept or dropped together; 1 = single neurons.
    refresh: a row's masks are chosen anew every so many tokens.
    dense_first, dense_last: layers left whole. The first one feeds the predictor and is needed before any choice.
    rows: 'each' row has its own mask; under 'union' every row goes through what any row of the batch asked for, so what
    a row says depends on its neighbours.
    ranking: 'local', the best of each layer; 'global', of all sparse layers together; 'hybrid', global, but no layer
    is left without any unit of a part.
    counts, head_counts: neuron blocks and head units kept in each of the num_layers layers (select.allocate), for local
    ranking; () = the same share everywhere. A dense layer's entry must be all of it.
    """

    heads: float = 1.0
    neurons: float = 1.0
    head_unit: str = 'kv_group'
    block: int = 1
    refresh: int = 1
    dense_first: int = 1
    dense_last: int = 0
    rows: str = 'each'
    ranking: str = 'local'
    counts: tuple[int, ...] = ()
    head_counts: tuple[int, ...] = ()

    def __post_init__(self):
        for name in PARTS:
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f'sparsity.{name} is a share kept, above 0 and at most 1, got {getattr(self, name)}')
        for name, known in (('head_unit', HEAD_UNITS), ('rows', ROWS), ('ranking', RANKINGS)):
            if getattr(self, name) not in known:
                raise ConfigError(f'sparsity.{name}: unknown {getattr(self, name)!r}, one of {", ".join(known)}')
        for name, least in (('block', 1), ('refresh', 1), ('dense_first', 1), ('dense_last', 0)):
            if getattr(self, name) < least:
                raise ConfigError(f'sparsity.{name} must be at least {least}, got {getattr(self, name)}')
        if (self.counts or self.head_counts) and self.ranking != 'local':
            raise ConfigError(f'sparsity.counts are for ranking local, which is {self.ranking}')

    @classmethod
    def of(cls, base: ModelConfig, fields: Mapping[str, Any]) -> SparsityConfig:
        """fields: of this class, checked against the base. Errors: ConfigError."""
        if unknown := [key for key in fields if key not in {f.name for f in dataclasses.fields(cls)}]:
            raise ConfigError(f'sparsity: unknown field {", ".join(unknown)}')
        tuples = {name: tuple(fields[name]) for name in ('counts', 'head_counts') if name in fields}
        made = cls(**(dict(fields) | tuples))
        made.check(base)
        return made

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, base: ModelConfig) -> None:
        """Errors: ConfigError where the base does not have what this divides."""
        if base.moe is not None:
            raise ConfigError('sparsity: a mixture of experts is sparse by itself; its neurons have no single order')
        if base.norm_placement != 'pre':
            raise ConfigError(f'sparsity needs norm_placement pre, got {base.norm_placement}')
        if base.mlp.intermediate_size % self.block:
            raise ConfigError(f'sparsity.block {self.block} does not divide {base.mlp.intermediate_size} neurons')
        if self.dense_first + self.dense_last > base.num_layers:
            raise ConfigError(f'sparsity: {self.dense_first} dense layers first and {self.dense_last} last are more '
                              f'than the {base.num_layers} there are')
        for name, counts, size in (('counts', self.counts, self.blocks(base)),
                                   ('head_counts', self.head_counts, self.units(base))):
            if not counts:
                continue
            if len(counts) != base.num_layers or not all(1 <= n <= size for n in counts):
                raise ConfigError(f'sparsity.{name} needs {base.num_layers} numbers in 1..{size}, got {counts}')
            if any(n != size for l, n in enumerate(counts) if l not in self.sparse_layers(base)):
                raise ConfigError(f'sparsity.{name} of a dense layer must be {size}, got {counts}')

    # --- sizes on a base ----------------------------------------------------------------------------------------

    def units(self, base: ModelConfig) -> int:
        """H': head units a layer."""
        return base.attention.num_heads if self.head_unit == 'head' else base.attention.num_kv_heads

    def blocks(self, base: ModelConfig) -> int:
        """NB: neuron blocks a layer."""
        return base.mlp.intermediate_size // self.block

    def sizes(self, base: ModelConfig) -> dict[str, int]:
        """{'heads': H', 'neurons': NB}."""
        return {'heads': self.units(base), 'neurons': self.blocks(base)}

    def sparse_layers(self, base: ModelConfig) -> range:
        return range(self.dense_first, base.num_layers - self.dense_last)

    def counts_of(self, base: ModelConfig, part: str) -> tuple[int, ...]:
        """Units of `part` ('heads' or 'neurons') kept in each layer under local ranking; all of a dense layer."""
        given = self.head_counts if part == 'heads' else self.counts
        if given:
            return given
        size, sparse = self.sizes(base)[part], self.sparse_layers(base)
        return tuple(kept(size, getattr(self, part)) if l in sparse else size for l in range(base.num_layers))
