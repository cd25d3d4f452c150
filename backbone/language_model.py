"""The plain training task: a decoder-only model that learns the next token. Methods' tasks follow its form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from backbone import losses
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import ATTENTION, block
from backbone.mesh import constrain
from backbone.model import PlainTarget, hidden_and_taps, init_params, unembed
from backbone.moe import balance_loss, choose
from backbone.presets import preset

Array = jax.Array

# What a layer keeps for its backward pass; the rest is computed again (jax.checkpoint).
REMAT: dict[str, Callable | None] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # matrix products by weights, not attention
}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A Task (backbone/contract.py). Batches: see harness/data.

    remat: 'none', or a key of REMAT. loss_chunk, query_chunk: positions at a time through the vocabulary and the
    attention, 0 for all. attention: one of layers.ATTENTION. z_loss: weight of logsumexp^2 (PaLM, 2022, section 5).
    balance: weight of moe.balance_loss, the mean over layers, of a model with a mixture of experts.
    """

    cfg: ModelConfig
    remat: str = 'none'
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    z_loss: float = 0.0
    balance: float = 0.0
    trainable: tuple[str, ...] = ('base/.*',)

    def __post_init__(self):
        if self.remat not in ('none', *REMAT):
            raise ConfigError(f'remat: unknown {self.remat!r}, one of none, {", ".join(REMAT)}')
        if self.attention not in ATTENTION:
            raise ConfigError(f'attention: unknown {self.attention!r}, one of {", ".join(ATTENTION)}')
        if self.balance and self.cfg.moe is None:
            raise ConfigError(f'balance {self.balance}: this model has no mixture of experts to balance')

    @property
    def target(self) -> PlainTarget:
        """What decodes the parameters in training, for samples."""
        return PlainTarget(self.cfg)

    def init(self, rng: Array) -> dict:
        return {'base': init_params(self.cfg, rng)}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Mean negative log likelihood in nats a token (plus z_loss and balance). rng is not used: there is no dropout.

        Metrics: nll, accuracy, and weight, the number of tokens counted (what microbatches are averaged by); of a
        mixture also balance, taken over the tokens of the whole (micro)batch, whatever devices they lie on.
        """
        del rng
        base = params['base']
        moe = self.cfg.moe
        taps = () if moe is None else tuple(f'router:{l}' for l in range(self.cfg.num_layers))
        hidden, seen = hidden_and_taps(self.cfg, base, batch['tokens'], taps, segments=batch['segments'],
                                       positions=batch['positions'], layer_fn=layer_for_training(self.remat),
                                       attention=self.attention, query_chunk=self.query_chunk)

        def to_logits(h: Array) -> Array:
            return constrain(unembed(self.cfg, base, h), 'batch', None, 'vocab')

        sums = losses.next_token_chunked(to_logits, hidden, batch['targets'], batch['weights'], self.loss_chunk)
        loss = sums.mean('nll') + self.z_loss * sums.mean('z')
        metrics = {'nll': sums.mean('nll'), 'accuracy': sums.mean('correct'), 'weight': sums.weight}
        if moe is None:
            return loss, metrics
        layers = [balance_loss(seen[tap], choose(moe, seen[tap]).ids, batch['weights']) for tap in taps]
        metrics['balance'] = sum(layers) / len(layers)
        return loss + self.balance * metrics['balance'], metrics


def layer_for_training(remat: str, layer_fn: Callable = block) -> Callable:
    """layer_fn with its residual pinned to the mesh's batch axis, and its activations made again backwards."""

    def layer(cfg, p, x, state, ctx, extra=None):
        y, state, taps = layer_fn(cfg, p, jax.tree.map(_pin, x), state, ctx, extra)
        return jax.tree.map(_pin, y), state, taps

    # Under a scan XLA cannot merge the two computations anyway: no barrier is needed to keep them apart.
    return layer if remat == 'none' else jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False,
                                                        static_argnums=(0,))


def _pin(x: Array) -> Array:
    return constrain(x, 'batch', *(None,) * (x.ndim - 1))


def build(model: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, **options: Any) -> LanguageModel:
    """From a config. model: a preset's name, or the fields of a ModelConfig. overrides: fields that replace the
    preset's. options: the other fields of LanguageModel. Errors: ConfigError names what is unknown."""
    fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
    unknown = [key for key in options if key not in {f.name for f in dataclasses.fields(LanguageModel)} - {'cfg'}]
    if unknown:
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}')
    return LanguageModel(ModelConfig.from_dict(fields | dict(overrides or {})), **options)
