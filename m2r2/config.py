"""What is added to a frozen model: where its fast stream ends, how fast it has to be, and what it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from backbone.config import ModelConfig
from backbone.errors import ConfigError

STREAMS = ('fast', 'exit', 'none')
ACTIVATIONS = ('silu', 'identity')


@dataclasses.dataclass(frozen=True)
class M2R2Config:
    """A fast residual stream p beside the slow one h of a frozen model, restarted from h at the start of each interval.

    Our reading of Bhendawade et al., 2025 (arXiv 2502.02040), whose text is not public in full; docs/m2r2.md says which
    parts are read and which are choices. Everything below is a choice.

    exits: N_1 < ... < N_J < num_layers. Interval j runs layers N_{j-1}+1..N_j (N_0 = 0), and p after it stands for h
    after the last layer: the base's own norm and head read it.
    rank, activation: of the accelerator adapter of each layer up to N_J, Acc(x) = act(x A) B beside the MLP.
    ffn: whether p also passes the frozen MLP; not where that is a mixture of experts, whose choice p is to foretell.
    qo_rank: of low-rank changes to the fast query and attention output; 0: none.
    carry: width of a small network that reads the last hidden state of the token before (the model's own, or, inside a
    draft, the fast stream's) together with this token's embedding; p starts from h and what it says, and the exit reads
    it too. 0: none, p starts as h. Drafting only; in no paper.
    stream: 'fast' is the above. Two controls: 'exit', an adapter of the same size at each exit, on h alone (as in DEED,
    Tang et al., 2024); 'none', h itself (the logit lens).
    draft_vocab: words the exits know, chosen from data; 0: all.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    exits: tuple[int, ...]
    rank: int = 64
    activation: str = 'silu'
    ffn: bool = True
    qo_rank: int = 0
    carry: int = 0
    stream: str = 'fast'
    draft_vocab: int = 0

    def __post_init__(self):
        exits = self.exits
        if not exits or list(exits) != sorted(set(exits)) or not 1 <= exits[0] <= exits[-1] < self.num_layers:
            raise ConfigError(f'm2r2.exits must rise within 1..{self.num_layers - 1}, got {exits}')
        for name, known in (('stream', STREAMS), ('activation', ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f'm2r2.{name}: unknown {getattr(self, name)!r}, one of {", ".join(known)}')
        if not 1 <= self.rank or self.qo_rank < 0 or self.carry < 0:
            raise ConfigError(f'm2r2 needs rank >= 1, qo_rank and carry >= 0, got {self.rank}, {self.qo_rank}, '
                              f'{self.carry}')
        if not 0 <= self.draft_vocab < self.vocab_size:
            raise ConfigError(f'm2r2.draft_vocab must be in 0..{self.vocab_size - 1} (0 is all), '
                              f'got {self.draft_vocab}')
        if self.carry and (self.stream != 'fast' or len(exits) > 1):
            raise ConfigError('m2r2.carry needs stream fast and a single exit: it is for drafting')

    @classmethod
    def of(cls, base: ModelConfig, fields: Mapping[str, Any]) -> M2R2Config:
        """fields: of this class but for the base's sizes; `exits` may be a number J: evenly spaced ones.

        Errors: ConfigError for an unknown field, or a base this cannot ride on.
        """
        fields = dict(fields)
        if unknown := [key for key in fields if key not in {f.name for f in dataclasses.fields(cls)}]:
            raise ConfigError(f'm2r2: unknown field {", ".join(unknown)}')
        sizes = {'hidden_size': base.hidden_size, 'num_layers': base.num_layers, 'vocab_size': base.vocab_size}
        if wrong := [key for key, value in sizes.items() if fields.get(key, value) != value]:
            raise ConfigError(f'm2r2: made for a base of another shape ({wrong[0]} {fields[wrong[0]]}, '
                              f'the base has {sizes[wrong[0]]})')
        if base.norm_placement != 'pre' or base.embed_size is not None:
            raise ConfigError('m2r2 needs a base of norm_placement pre that does not project its embeddings')
        if base.moe is not None and fields.get('stream', 'fast') == 'fast' and fields.get('ffn', True):
            raise ConfigError('m2r2.ffn must be False on a base with experts: the fast stream does not pass them')
        exits = fields.get('exits', 1)
        fields['exits'] = even_exits(base.num_layers, exits) if isinstance(exits, int) else tuple(exits)
        return cls(**(fields | sizes))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def starts(self) -> tuple[int, ...]:
        """N_0..N_{J-1}: where each interval begins."""
        return (0, *self.exits[:-1])

    @property
    def words(self) -> int:
        return self.draft_vocab or self.vocab_size

    @property
    def exit_rank(self) -> int:
        """Rank of stream 'exit': as many parameters as the accelerators of all layers."""
        return self.rank * self.exits[-1] // len(self.exits)

    def rate(self, j: int) -> float:
        """R_j, slow layers a fast layer of interval j = 0..J-1 stands for: (L - N_{j-1}) / (N_j - N_{j-1})."""
        return (self.num_layers - self.starts[j]) / (self.exits[j] - self.starts[j])

    def level(self, j: int, i: int) -> int:
        """The slow layer that p should look like after i layers of interval j."""
        return min(int(self.starts[j] + self.rate(j) * i + 1e-9), self.num_layers)


def even_exits(num_layers: int, count: int) -> tuple[int, ...]:
    """N_j = j L / (J + 1), rounded down."""
    return tuple(j * num_layers // (count + 1) for j in range(1, count + 1))
