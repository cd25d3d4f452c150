"""A pretrained dense model -> a staggered one: its layers dealt to the stacks, its attention also read across them.

The layers keep their weights. What they do not keep is their input: layers of an upper stack were trained on what the
lower ones made of the token, and now start from its embedding, with the lower stack's word on earlier tokens beside it.
Until it is healed (distill.py) a conversion is therefore a poor model, except where the stacks share all layers and the
cross-attention starts at zero: that is the dense model itself, run twice. Not in the paper (StagFormer, Cutler et al.,
2025, arXiv 2501.15665), which trains from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from stagformer.config import StagFormerConfig

CROSS = ('zero', 'copy')


def shape(dense: ModelConfig, stacks: int = 2, depths: Sequence[int] = (), layers: Sequence[int] = (),
          **stagger: Any) -> StagFormerConfig:
    """The staggered model that `convert` makes of `dense`.

    stacks: of equal depth, unless `depths` gives the layers of each. layers: which dense layers, first stack first;
    default all in their order, lower layers to the lower stack; a layer may come twice. Where `shared`, the layers of
    the one stack. stagger: other fields of StagFormerConfig. Errors: ConfigError for layers that are not there, or what
    does not divide.
    """
    if outside := [l for l in layers if not 0 <= l < dense.num_layers]:
        raise ConfigError(f'layers: {outside[0]} is not among the {dense.num_layers} layers of the dense model')
    base = dense.replace(num_layers=len(layers) or dense.num_layers)
    return StagFormerConfig(base, tuple(depths), **stagger) if depths else (
        StagFormerConfig.even(base, stacks, **stagger))


def convert(cfg: StagFormerConfig, dense: dict, layers: Sequence[int] = (), cross: str = 'zero') -> dict:
    """Parameters of a plain model -> {'base', 'stagformer'} of cfg = shape(dense's config, ..., layers=layers).

    A layer's cross-attention starts as its own self-attention's q, k and v, without their biases. cross: 'copy', also
    its output projection; 'zero', an output projection of zeros: the last stack alone decides, as a plain model of its
    layers. Arrays of numpy stay such.
    Errors: ConfigError for another `cross`, or key-value heads that cannot be copied.
    """
    if cross not in CROSS:
        raise ConfigError(f'cross: unknown {cross!r}, one of {", ".join(CROSS)}')
    if cfg.kv_heads != cfg.base.attention.num_kv_heads:
        raise ConfigError(f'cross_kv_heads {cfg.cross_kv_heads}: what is copied from self-attention has '
                          f'{cfg.base.attention.num_kv_heads}')
    chosen = np.array(layers or range(cfg.base.num_layers))
    base = dense | {'layers': _take(dense['layers'], chosen)}
    if cfg.stacks == 1:
        return {'base': base, 'stagformer': {}}

    first = [0 if cfg.shared else sum(cfg.depths[:s]) for s in range(cfg.stacks)]
    own = [np.arange(first[s], first[s] + cfg.depths[s]) for s in range(cfg.stacks)]
    queries = np.concatenate(own[1:])
    keys = np.concatenate([own[s] for s in range(1, cfg.stacks) for _ in cfg.sources(s)])
    attn, norm = base['layers']['attn'], base['layers']['attn_norm']
    # A context has one norm for all who read it; so each layer's own scale goes into its kernels, which is exact.
    scaled = lambda name: {'kernel': attn[name]['kernel'][keys] * norm['scale'][keys][..., None]}
    out = attn['o']['kernel'][queries]
    made: dict[str, Any] = {'cross': {
        'norm': _take(norm, queries), 'q': {'kernel': attn['q']['kernel'][queries]}, 'k': scaled('k'), 'v': scaled('v'),
        'o': {'kernel': out if cross == 'copy' else 0 * out}}}
    if cfg.context_norm:
        count = np.zeros(cfg.stacks - 1, int)
        made['context_norm'] = {name: 0 * a[count] + (name == 'scale') for name, a in norm.items()}
    if cfg.mix:
        made['mix'] = np.eye(cfg.stacks, dtype=out.dtype)[-1]
    return {'base': base, 'stagformer': made}


def _take(tree: Any, at: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[at], tree)
