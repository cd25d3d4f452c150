"""The models of a comparison: the one that is compared, and models of their own that rows bring along."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from backbone import model
from backbone.config import ModelConfig
from backbone.contract import Target
from backbone.errors import ConfigError
from backbone.formats.tensors import Loaded
from harness import decode, evaluate, models
from harness.rows import NearTies
from harness.scoring import Scorer


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """params: {dtype: whole tree packed for decoding}. quality: of the exact model on held-out text, if asked for."""

    loaded: Loaded
    params: dict[str, dict[str, Any]]
    quality: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ties(self) -> NearTies:
        loaded = self.loaded
        return NearTies(loaded.config, loaded.params) if loaded.decodes is None else WholeTies(loaded)

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        loaded = self.loaded
        found = {'name': loaded.name, 'config': loaded.config.to_dict(), 'base_hash': loaded.base_hash}
        return found | ({} if loaded.decodes is None else {'decodes': dict(loaded.decodes)}) | self.quality


def load(config: Any) -> dict[str, Subject]:
    """{'': the compared model, name: a model that rows name}.

    Errors: ConfigError where two of them do not have the same tokenizer (names both); those of models.load.
    """
    found = {'': _main(config)}
    for spec in config.methods.values():
        name = spec.get('model', '')
        if name not in found:
            found[name] = models.load(name)
            check_same_words(found[''], found[name])
    return {name: _subject(config, loaded) for name, loaded in found.items()}


def _main(config: Any) -> Loaded:
    if config.model != 'random':
        return models.load(config.model)
    cfg = ModelConfig.from_dict(config.random_model.to_dict())
    return Loaded(cfg, model.init_params(cfg, jax.random.key(config.seed)), None, 'random', '')


def _subject(config: Any, loaded: Loaded) -> Subject:
    task, quality = config.get('quality', {}).get('task', ''), {}
    if task:
        found = evaluate.measure(Scorer.of(loaded, progress=False), [task], config.quality.limit or None)[task]
        quality = {key: found[key] for key in ('perplexity', 'bits_per_byte')}
    return Subject(loaded, {dtype: models.pack(loaded, dtype) for dtype in config.dtypes}, quality)


def check_same_words(main: Loaded, other: Loaded) -> None:
    """Errors: ConfigError names both models."""
    a, b = main.tokenizer, other.tokenizer
    if a is None or b is None:
        raise ConfigError(f'methods: {other.name} beside {main.name}: {(main if a is None else other).name} has no '
                          'tokenizer, so the same prompts mean nothing')
    if (a.pieces, a.eos_ids, a.bos_id, a.add_bos) != (b.pieces, b.eos_ids, b.bos_id, b.add_bos):
        raise ConfigError(f'methods: {other.name} and {main.name} do not have the same tokenizer')


def target_of(subject: Subject, spec: Any, cache_dtype: str) -> Target:
    """The target of a row that names none. Errors: ConfigError."""
    return models.make_target(subject.loaded, cache_dtype, True, spec.target_kwargs.to_dict())


class WholeTies(NearTies):
    """The same of a model that is more than a plain base: its logits come from its own target."""

    def __init__(self, loaded: Loaded):
        self._loaded, self._made = loaded, {}

    def _logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        if dtype not in self._made:
            target, params = models.target(self._loaded, dtype, packed=dtype != 'float32')

            @jax.jit
            def forward(params, tokens, at):
                cache = target.init_cache(1, tokens.shape[1], tokens.shape[1])
                return target.forward(params, tokens, cache, logits_at=at[None]).logits[0, 0]
            self._made[dtype] = forward, params
        forward, params = self._made[dtype]
        padded = np.zeros((1, decode.bucket(len(ids))), np.int32)
        padded[0, :len(ids)] = ids
        return np.asarray(forward(params, padded, np.int32(len(ids) - 1)), np.float32)
