"""The head's own next-token law as the model that decodes: then the first draft of a round is always accepted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from backbone import cache as caches
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.model import PlainTarget
from tensorhead import cp, packed
from tensorhead.config import TensorHeadConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MarginalTarget:
    """A Target whose logits are log q(x_1 | e), the mixture's marginal over all but its first position.

    A model of its own, another one for every head: what it says is not what the base says. params: {'base': ...,
    'tensorhead': the head}. Errors: ConfigError where the head knows only part of the vocabulary, or fits another base.
    """

    cfg: ModelConfig
    head: TensorHeadConfig
    cache_dtype: str = 'float32'
    stacked: bool = True
    exact: bool = True
    reference: Any = None

    def __post_init__(self):
        if self.head.draft_vocab:
            raise ConfigError('a marginal target speaks the whole vocabulary: tensorhead.draft_vocab must be 0, '
                              f'got {self.head.draft_vocab}')
        self.head.check_base(self.cfg)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    @property
    def _base(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype, self.stacked)

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        return self._base.init_cache(batch, max_len, block)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: dict[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        wanted = tuple(dict.fromkeys((*taps, 'hidden:last')))
        output = self._base.forward(params, tokens, cache, resume=resume, taps=wanted, masks=masks,
                                    logits_at=logits_at)  # its logits are not used: the compiler leaves them out
        hidden = output.taps['hidden:last']
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        e = hidden.reshape(-1, hidden.shape[-1])
        head = packed.pack(self.head, params['tensorhead'], params['base'])
        logits = packed.logits(self.head, head, packed.features(self.head, head['first'], e))
        law = cp.next_token(packed.log_weights(head, e), jax.nn.log_softmax(logits[:, 0], axis=-1))
        return output.replace(logits=law.reshape(*hidden.shape[:-1], -1),
                              taps={name: output.taps[name] for name in taps})
