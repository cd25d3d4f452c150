"""By name: selectors, the sparse target and its parameters, as the card of an artefact gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from sparsity import layout, selectors, thresholds
from sparsity.config import SparsityConfig
from sparsity.target import SparseTarget

BY_VALUE = {'cats': thresholds.Cats, 'teal': thresholds.Teal}
BY_SCORE = {'static': selectors.Static, 'griffin': selectors.Griffin, 'oracle': selectors.Oracle,
            'random': selectors.Random}
SELECTORS = ('predictor', *BY_SCORE, *BY_VALUE)


def named(name: str, cfg: ModelConfig, s: SparsityConfig, predictor: Mapping[str, Any] | None = None) -> Any:
    """predictor: fields of PredictorConfig, for that one. Errors: ConfigError for an unknown name, and for a predictor
    of other units than s keeps, or one that a token cannot feed."""
    if name in BY_VALUE:
        return BY_VALUE[name]()
    if name in BY_SCORE:
        return BY_SCORE[name](cfg, s)
    if name != 'predictor':
        raise ConfigError(f'selector: unknown {name!r}, one of {", ".join(SELECTORS)}')
    from sparsity.predictor import PredictorConfig

    p = PredictorConfig.of(cfg, predictor or {})
    if p.kind != 'unified':
        raise ConfigError(f'predictor.kind {p.kind}: only unified knows all layers before they run')
    if (p.head_unit, p.block) != (s.head_unit, s.block):
        raise ConfigError(f'predictor scores {p.head_unit} and blocks of {p.block}, sparsity keeps {s.head_unit} and '
                          f'blocks of {s.block}')
    return selectors.Predictor(cfg, s, p)


def build(model: Mapping[str, Any], sparsity: Mapping[str, Any], selector: str = 'predictor',
          predictor: Mapping[str, Any] | None = None, compute: str | None = None, implementation: str | None = None,
          logged: bool = False, cache_dtype: str = 'float32', packed: bool = True) -> SparseTarget:
    """Fields of ModelConfig, SparsityConfig and PredictorConfig. packed: for parameters from `pack`; then products are
    gathered where the selector can tell what from. Errors: ConfigError."""
    cfg = ModelConfig.from_dict(model.to_dict() if hasattr(model, 'to_dict') else model)  # as a config's part has them
    s = SparsityConfig.of(cfg, sparsity)
    chosen = named(selector, cfg, s, predictor)
    compute = compute or ('gathered' if packed and selector not in BY_VALUE else 'masked')
    return SparseTarget(cfg, s, chosen, compute, implementation, cache_dtype, not packed, logged)


def pack(params: dict, dtype: Any = jnp.float32, **settings: Any) -> dict:
    """{'base', 'sparsity'} as trained, for decoding. params['order'] [L, F], where the artefact has it: the order of
    neurons in which blocks were meant. settings: those of `build`, which do not matter here."""
    del settings
    base = layout.pack(params['base'], dtype)
    if 'order' in params:
        base = layout.permute_packed(base, params['order'])
    return {'base': base, 'sparsity': jax.tree.map(jnp.asarray, params.get('sparsity', {}))}
