"""A dense model made a mixture of experts: each layer's neurons are dealt to experts of one size, a router is added.

    down(act(gate x) * up x)  =  shared(x) + sum_e expert_e(x)          of any deal of the neurons, and any order

So the dense model is the sum of all experts, each weighing 1; a router that takes K of them leaves the others out. Its
weights are a softmax and sum to about 1 at most, so that what they are to be multiplied by lies in the experts' `down`:

  norm_topk False   E: a router without preference (all logits equal) gives each chosen expert weight 1, and the dense
                    model at K = E. One with preferences gives the chosen ones more, for those left out.
  norm_topk True    K: the chosen ones weigh 1 on average, whatever the router's logits; at K = E as well.

Neither is any paper's; Komatsuzaki et al., 2022 (arXiv 2212.05055) copy the whole MLP into each expert, Zhang et al.,
2022 (arXiv 2110.01786) split it as here. Which neurons and which router: neuron_split.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backbone.config import ModelConfig, MoeConfig
from backbone.errors import ConfigError, FormatError
from m2r2 import neuron_split

FORMAT = 1  # of a file of `save`


def shape(dense: ModelConfig, moe: MoeConfig) -> ModelConfig:
    """What `convert` makes of `dense`. Errors: ConfigError where it cannot be split so."""
    rest = dense.mlp.intermediate_size - moe.shared_size
    if dense.moe is not None or not dense.mlp.gated or dense.mlp.bias or dense.norm_placement != 'pre':
        raise ConfigError('upcycling needs a dense base of norm_placement pre with a gated MLP without biases')
    if rest <= 0 or rest % moe.num_experts:
        raise ConfigError(f'moe: {dense.mlp.intermediate_size} neurons less {moe.shared_size} shared ones do not make '
                          f'{moe.num_experts} experts of one size')
    mlp = dataclasses.replace(dense.mlp, intermediate_size=rest // moe.num_experts)
    return dense.replace(mlp=mlp, moe=moe)


def scale(moe: MoeConfig) -> int:
    """What `down` of every expert is multiplied by."""
    return moe.experts_per_token if moe.norm_topk else moe.num_experts


def convert(cfg: ModelConfig, dense: Mapping[str, Any], order: Any, router: Any) -> dict[str, Any]:
    """The base of shape `cfg` (of `shape`) from the dense one's, stacked by layer; numpy where all of it is numpy.

    order [L, F]: neurons, the shared ones first, then expert by expert. router [L, d, E].
    """
    old, moe = dense['layers'], cfg.moe
    xp = np if isinstance(old['mlp']['up']['kernel'], np.ndarray) else jnp
    count, d, first = cfg.num_layers, cfg.hidden_size, moe.shared_size
    gate, up = (xp.take_along_axis(old['mlp'][name]['kernel'], order[:, None, :], 2) for name in ('gate', 'up'))
    down = xp.take_along_axis(old['mlp']['down']['kernel'], order[:, :, None], 1)
    dealt = lambda a: a[..., first:].reshape(count, d, moe.num_experts, -1).transpose(0, 2, 1, 3)
    new: dict[str, Any] = {
        'router': {'kernel': router},
        'experts': {'gate': dealt(gate), 'up': dealt(up),
                    'down': down[:, first:].reshape(count, moe.num_experts, -1, d) * scale(moe)}}
    if first:
        new['shared'] = {'gate': {'kernel': gate[..., :first]}, 'up': {'kernel': up[..., :first]},
                         'down': {'kernel': down[:, :first]}}
    layers = {name: part for name, part in old.items() if name != 'mlp'} | {'moe': new}
    return {**dense, 'layers': layers}


# --- what was chosen --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Split:
    """order [L, F] int32, router [L, d, E] float32: of `convert`. about: how they were chosen, and of which base."""

    order: np.ndarray
    router: np.ndarray
    about: Mapping[str, Any]


def choose(dense: ModelConfig, params: dict, tokens: np.ndarray, moe: MoeConfig, by: str = 'activity', seed: int = 0,
           spread: float = 0.5, say=lambda line: None) -> Split:
    """From what the model does on tokens [B, S]. by: 'activity' or 'weights', see neuron_split.features_of.

    spread: how far the first router's logits lie apart. params: numpy. Errors: ConfigError.
    """
    if by not in neuron_split.BY:
        raise ConfigError(f'by: unknown {by!r}, one of {", ".join(neuron_split.BY)}')
    shape(dense, moe)
    inputs = neuron_split.mlp_inputs(dense, params, tokens)
    orders, routers = [], []
    for l, x in enumerate(inputs):
        mlp = {name: {'kernel': np.asarray(part['kernel'][l], np.float32)}
               for name, part in params['layers']['mlp'].items()}
        said = neuron_split.neurons(dense.mlp, mlp, x)
        use = np.abs(said).mean(0) * np.linalg.norm(mlp['down']['kernel'], axis=1)
        order = neuron_split.order_neurons(neuron_split.features_of(by, mlp, said, seed), use, moe, seed)
        orders.append(order)
        routers.append(neuron_split.fit_router(x, neuron_split.says(moe, mlp, said, order), spread))
        say(f'layer {l + 1} of {len(inputs)}')
    about = {'format': FORMAT, 'moe': dataclasses.asdict(moe), 'by': by, 'seed': seed, 'spread': spread,
             'tokens': int(np.asarray(tokens).size)}
    return Split(np.stack(orders), np.stack(routers), about)


def random_split(cfg: ModelConfig, seed: int = 0, spread: float = 0.5) -> Split:
    """The control: neurons as they lie, and a router that knows nothing. cfg: of `shape`."""
    moe, rng = cfg.moe, np.random.default_rng(seed)
    total = moe.shared_size + moe.num_experts * cfg.mlp.intermediate_size
    router = rng.normal(size=(cfg.num_layers, cfg.hidden_size, moe.num_experts)) * spread * cfg.hidden_size ** -0.5
    return Split(np.tile(np.arange(total, dtype=np.int32), (cfg.num_layers, 1)), router.astype(np.float32), {})


def save(split: Split, path: str | Path, base_hash: str) -> None:
    """Writes .npz; a trained router goes with one order of the neurons only, so that this file belongs to its run."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = json.dumps({**split.about, 'base_hash': base_hash})
    with path.open('wb') as sink:
        np.savez(sink, order=split.order, router=split.router, about=np.asarray(about))


def read(path: str | Path, cfg: ModelConfig, base_hash: str) -> Split:
    """Errors: FormatError for a file that cannot be read, of another base, or of another split than `cfg` says."""
    try:
        with np.load(path) as stored:
            split = Split(stored['order'], stored['router'], json.loads(str(stored['about'])))
        about = split.about
        found = (about['format'], about['base_hash'], about['moe'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f'{path}: not a split of neurons that can be read ({error!r})') from None
    wanted = (FORMAT, base_hash, dataclasses.asdict(cfg.moe))
    for what, is_, should in zip(('format', 'base', 'moe'), found, wanted, strict=True):
        if is_ != should:
            raise FormatError(f'{path}: made for {what} {is_}, wanted {should}')
    return split
