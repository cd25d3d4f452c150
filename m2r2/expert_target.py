"""The host runtime of m2r2/expert_runtime.py under a name: --model=RUN decodes with it, and so do rows of a comparison.

A run of m2r2/prefetch_task.py says that this decodes it, so what it trained is what predicts. `host_loop` stands in the
place of the jitted decode loop (backbone/contract.py): the host decides between layers which bytes move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax

from backbone import layout
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.model import PlainTarget
from backbone.sampling import Sampling
from m2r2 import expert_guess
from m2r2.expert_runtime import SPARE, ExpertRuntime, Generation, generate
from m2r2.prefetch import FastStream, PrefetchConfig, StateAdapter

Array = jax.Array
PREDICTORS = ('none', 'fast', 'adapter', 'next_router', 'previous', 'frequency', 'random')


@dataclasses.dataclass(frozen=True)
class ExpertTarget:
    """A model with experts of which `share` (of all layers' together) fit on the device; at least a token's own.

    predictor: what is loaded ahead, one of PREDICTORS. eviction: of expert_cache. keep False: nothing stays on the
    device from one layer to the next (on demand). extra: guesses a layer beyond experts_per_token. `counted` is what
    moved in the last call. Output never depends on any of them. Errors: ConfigError.
    """

    cfg: ModelConfig
    shape: PrefetchConfig
    predictor: str = 'fast'
    share: float = 1.0
    eviction: str = 'lru'
    keep: bool = True
    extra: int = 0
    cache_dtype: str = 'float32'
    counted: dict[str, float] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)
    _made: list[tuple[Any, ExpertRuntime]] = dataclasses.field(default_factory=list, init=False, compare=False,
                                                               repr=False)
    exact: ClassVar[bool] = True

    def __post_init__(self):
        if self.predictor not in PREDICTORS:
            raise ConfigError(f'predictor: unknown {self.predictor!r}, one of {", ".join(PREDICTORS)}')
        if not 0 < self.share <= 1:
            raise ConfigError(f'share must be above 0 and at most 1, got {self.share}')
        if self.cfg.moe is None:
            raise ConfigError('expert loading: the model has no experts (its config has no moe)')

    @property
    def reference(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype, stacked=False)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    @property
    def slots(self) -> int:
        moe, every = self.cfg.moe, self.cfg.moe.num_experts * self.cfg.num_layers
        return min(every, max(moe.experts_per_token + SPARE, math.ceil(self.share * every)))

    def init_cache(self, batch: int, max_len: int, block: int) -> Any:
        raise ConfigError('expert loading: the host decides between layers what moves, so no pass can be traced; '
                          'drafts and scores need the model itself')

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.init_cache(0, 0, 0)

    def host_loop(self, params: dict, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling,
                  stop_tokens: Sequence[int], seed: int | Array,
                  on_tokens: Callable[[int, list[int]], None] | None = None) -> Generation:
        """As the contract says. The first call with `params` takes the experts to host memory and fills the slots; the
        experts on the device stay there for the next call."""
        if not self._made or self._made[0][0] is not params['base']:
            runtime = ExpertRuntime(self.cfg, params, slots=self.slots, eviction=self.eviction,
                                    predictor=self._predictor(), extra=self.extra, keep=self.keep,
                                    cache_dtype=self.cache_dtype)
            if self.keep:
                runtime.load_all()
            self._made[:] = [(params['base'], runtime)]  # with its owner: an id alone may come again
        runtime = self._made[0][1]
        out = generate(runtime, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens,
                       seed=seed, on_tokens=on_tokens)
        self.counted.clear()
        self.counted.update({'slots': self.slots, 'decoding': {**out.decode, 'passes': out.passes}})
        return out

    def _predictor(self) -> expert_guess.Predictor | None:
        return {'none': lambda: None, 'fast': lambda: FastStream(shape=self.shape),
                'adapter': lambda: StateAdapter(shape=self.shape), 'next_router': expert_guess.NextRouter,
                'previous': expert_guess.Previous, 'frequency': expert_guess.frequency,
                'random': expert_guess.Random}[self.predictor]()


def build(model: Mapping[str, Any], prefetch: Mapping[str, Any], predictor: str = 'fast', share: float = 1.0,
          eviction: str = 'lru', keep: bool = True, extra: int = 0, cache_dtype: str = 'float32') -> ExpertTarget:
    """By name: fields of ModelConfig and PrefetchConfig. Errors: ConfigError."""
    return ExpertTarget(ModelConfig.from_dict(model), PrefetchConfig(**prefetch), predictor, share, eviction, keep,
                        extra, cache_dtype)


def pack(params: dict, dtype: Any = 'float32', **settings: Any) -> dict:
    """{'base', 'prefetch'} as trained, for decoding; a base that is packed stays. settings: those of `build`."""
    del settings
    base = params['base']
    base = base if isinstance(base['layers'], tuple) else layout.pack(base, dtype)
    return {'base': base, 'prefetch': params['prefetch']}
