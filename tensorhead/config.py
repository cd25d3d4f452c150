"""What a CP head is: its sizes and the form of its factors. The first file of this room; head.py is the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backbone.config import ModelConfig
from backbone.errors import ConfigError

MODES = ('full', 'linear_shared', 'lowrank_shared', 'medusa_shared')


@dataclasses.dataclass(frozen=True)
class TensorHeadConfig:
    """A rank-`rank` joint law of the next `horizon` tokens, read off one hidden state of `hidden_size`.

    mode: how factor (s, a) makes logits from the hidden state e. 'full': its own matrix [d, V]; the others share the
    base's unembedding U: U (e + M e) with M a matrix ('linear_shared') or a product of inner rank `inner_rank`
    ('lowrank_shared'), or U (e + SiLU(M e + b)) ('medusa_shared').
    pending_size: where above 0, factors 2..n read the embedding of x_1 beside e, through so many hidden units: x_1 is
    known when they draft. The law stays a mixture given x_1, every query as it was. 0 is the published form, in which
    x_1 only re-weights the components.
    draft_vocab: words the head knows, 0 for all of the base's `vocab_size`. init_std: of the noise that tells the
    components apart at the start; without it they would stay equal for ever.
    """

    hidden_size: int
    vocab_size: int
    horizon: int = 4
    rank: int = 4
    mode: str = 'lowrank_shared'
    inner_rank: int = 64
    pending_size: int = 0
    draft_vocab: int = 0
    init_std: float = 0.02

    def __post_init__(self):
        for name in ('hidden_size', 'vocab_size', 'horizon', 'rank', 'inner_rank'):
            if getattr(self, name) < 1:
                raise ConfigError(f'tensorhead.{name} must be at least 1, got {getattr(self, name)}')
        if self.mode not in MODES:
            raise ConfigError(f'tensorhead.mode: unknown {self.mode!r}, one of {", ".join(MODES)}')
        if self.pending_size < 0 or self.pending_size and self.mode == 'full':
            raise ConfigError('tensorhead.pending_size must be at least 0, and 0 in mode full, '
                              f'got {self.pending_size}')
        if not 0 <= self.draft_vocab <= self.vocab_size:
            raise ConfigError(f'tensorhead.draft_vocab must be in 0..{self.vocab_size}, got {self.draft_vocab}')

    @property
    def words(self) -> int:
        """W: the words drafts are made of."""
        return self.draft_vocab or self.vocab_size

    def check_base(self, cfg: ModelConfig) -> None:
        """Errors: ConfigError where the head was made for a base of another shape."""
        for name in ('hidden_size', 'vocab_size'):
            ours, theirs = getattr(self, name), getattr(cfg, name)
            if ours != theirs:
                raise ConfigError(f'tensorhead.{name} {ours} is not the {theirs} of the base')

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TensorHeadConfig:
        """Errors: ConfigError names an unknown key."""
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f'tensorhead: unknown {", ".join(unknown)}')
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
