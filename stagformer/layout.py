"""From storage to the layout that decodes: layer k of all stacks side by side.

Forms of 'side by side', which step.py treats alike:
    tuple    one item a stack. For a CPU, where each product is a call of C, and for what is uneven (depths, all_prev)
    arrays   a leading stack axis, so that layer k of all stacks is one batched product. For GPUs and TPUs
    staged   arrays to be split over the 'stage' axis of a mesh: every stack has a cross-attention, the first one's is
             zero and adds exactly nothing; shared weights are repeated, one copy a stage; nothing is fused, so that
             heads and neurons can also be split over the mesh

Shared weights stay one copy in either: the stacks then go through them as rows of one batch.

    base.layers[k]       plain layers, fused (backbone/layout.py): tuple | leading axis | one dict where shared
    stagformer.cross[k]  {norm, q, o} of the stacks above the first
    stagformer.publish   a kernel [d, depth * 2 * KH * hd] for each stack above the first and each stack it reads:
                         keys and values of all its layers, from one output, in one product
                         (staged: [d, depth * 2, KH * hd])
    stagformer.context_norm, mix                                as in storage
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backbone import layout
from backbone import native as native_code
from backbone.errors import ConfigError
from stagformer.config import StagFormerConfig
from stagformer.model import stack_layers

Array = jax.Array
FORMS = ('storage', 'tuple', 'arrays', 'staged')


def pack(cfg: StagFormerConfig, params: dict, dtype: Any = jnp.float32, form: str | None = None) -> dict:
    """Parameters for decoding: matrices in `dtype`, norms and biases in float32. form: a key of FORMS but 'storage',
    default what suits this machine. Errors: ConfigError where the form cannot hold the model."""
    form = form or form_here(cfg)
    check_form(cfg, form)
    staged, arrays = form == 'staged', form != 'tuple'
    native = form == 'tuple' and native_here()
    plain = _unfused(params['base'], dtype) if staged else layout.pack(params['base'], dtype, native)
    side = _as_array if arrays else tuple
    if not cfg.shared:
        at = [sum(cfg.depths[:s]) for s in range(cfg.stacks)]
        plain['layers'] = tuple(side([plain['layers'][at[s] + k] for s in range(cfg.stacks) if k < cfg.depths[s]])
                                for k in range(max(cfg.depths)))
    elif staged:
        plain['layers'] = tuple(_as_array([layer] * cfg.stacks) for layer in plain['layers'])
    if cfg.stacks == 1:
        return {'base': plain, 'stagformer': {}}

    views = [stack_layers(cfg, params, s)['cross'] for s in range(1, cfg.stacks)]
    if staged:
        views = [jax.tree.map(jnp.zeros_like, views[0]), *views]
    depths = cfg.depths if staged else cfg.depths[1:]
    # The `vectors` of a norm stay float32, as backbone.layout.pack has them.
    small = lambda a: jnp.asarray(a, dtype if a.ndim > 1 else jnp.float32)
    turn = layout.transpose if native else lambda tree: tree
    cross = tuple(side([turn(jax.tree.map(lambda a: small(a[k]), {n: view[n] for n in ('norm', 'q', 'o')}))
                        for view, depth in zip(views, depths, strict=True) if k < depth])
                  for k in range(max(depths)))
    joined = _by_head if staged else _joined
    publish = [tuple(turn({'kernel': jnp.asarray(joined(view, i), dtype)})
                     for i in range(view['k']['kernel'].shape[1])) for view in views]
    rest = {name: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
            for name, tree in params['stagformer'].items() if name != 'cross'}
    if staged and cfg.context_norm:  # one a stage, of what it is handed; the first stage uses nothing of it
        rest['context_norm'] = jax.tree.map(lambda a: jnp.concatenate([a[:1], a]), rest['context_norm'])
    return {'base': plain, 'stagformer': {
        'cross': cross, 'publish': _as_array([p[0] for p in publish]) if arrays else tuple(publish), **rest}}


def uniform(cfg: StagFormerConfig) -> bool:
    """Whether a leading stack axis can hold it: equal depths, and one source a stack."""
    return cfg.equal and (cfg.context_from == 'prev' or cfg.stacks == 2)


def native_here() -> bool:
    return jax.default_backend() == 'cpu' and native_code.available()


def form_here(cfg: StagFormerConfig) -> str:
    """The form that decodes fastest on this machine."""
    return 'tuple' if native_here() or not uniform(cfg) or cfg.stacks == 1 else 'arrays'


def check_form(cfg: StagFormerConfig, form: str) -> None:
    """Errors: ConfigError for an unknown form, or one that cannot hold the model."""
    if form not in FORMS:
        raise ConfigError(f'form: unknown {form!r}, one of {", ".join(FORMS)}')
    if form in ('arrays', 'staged') and (not uniform(cfg) or cfg.stacks == 1):
        raise ConfigError(f'form {form} needs several stacks of equal depth that read one stack each; '
                          f'got depths {cfg.depths}, {cfg.context_from}')
    if form == 'staged' and cfg.lag != 1:
        raise ConfigError(f'stages run at once: lag must be 1, got {cfg.lag}')


def build(model: dict, params: dict, dtype: Any) -> dict:
    """`pack` by name: model is a StagFormerConfig as a dict."""
    return pack(StagFormerConfig.from_dict(model), params, dtype)


def _as_array(items: list) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *items)


def _unfused(params: dict, dtype: Any) -> dict:
    layers = params['layers']
    depth = jax.tree.leaves(layers)[0].shape[0]
    packed = params | {'layers': tuple(jax.tree.map(lambda a: a[k], layers) for k in range(depth))}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if a.ndim > 1 else jnp.float32), packed)


def _by_head(view: dict, source: int) -> Array:
    """k and v kernels [depth, sources, d, W] -> [d, depth * 2, W] of one source."""
    pair = jnp.stack([view[name]['kernel'][:, source] for name in ('k', 'v')], 1)
    return pair.transpose(2, 0, 1, 3).reshape(pair.shape[2], -1, pair.shape[3])


def _joined(view: dict, source: int) -> Array:
    """k and v kernels [depth, sources, d, W] -> [d, depth * 2 * W] of one source."""
    pair = jnp.stack([view[name]['kernel'][:, source] for name in ('k', 'v')], 1)  # [depth, 2, d, W]
    return pair.transpose(2, 0, 1, 3).reshape(pair.shape[2], -1)
