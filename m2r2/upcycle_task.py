"""Training an upcycled mixture: its routers, and if wanted its experts, learn to be the dense model they were cut from.

    loss = kd KL(dense || mixture) + layer mean_l |moe_l(x_l) - mlp_l(x_l)|^2 / |mlp_l(x_l)|^2
         + match mean_l KL(s_l || softmax(z_l / T)) + balance mean_l b_l

The dense model runs beside the mixture in one pass, with the same frozen attention; x_l is what its own MLP of layer l
reads, so that in the sums over layers none pays for another's mistakes. The first two terms reach a router through the
weights of the experts it chose, and hear nothing of those it left out; who is to be chosen is what `match` says: s_l is
each expert's share in the lengths of what all would add, z_l the router's logits, and T < 1 leaves the weights of the
chosen alike while the order is learnt. b_l: backbone.moe.balance_loss. No capacity, no token left out. Distillation:
Hinton et al., 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from backbone import formats, losses, moe
from backbone.config import ModelConfig, MoeConfig
from backbone.errors import ConfigError
from backbone.language_model import REMAT, layer_for_training
from backbone.layers import ATTENTION, Context, attend, mlp, norm, out, qkv, read_write
from backbone.model import PlainTarget, embed, finish, init_params, run_layers, sequence_context, unembed
from backbone.presets import preset
from m2r2 import upcycle

Array = jax.Array
TRAIN = {'router': ('base/layers/moe/router/.*',), 'experts': ('base/layers/moe/.*',)}


@dataclasses.dataclass(frozen=True)
class UpcycleTask:
    """A Task (backbone/contract.py): params {'base': the mixture, 'teacher': the dense MLPs, frozen}.

    dense, cfg: the shapes of both. base: catalogue key or path of the dense model; '' takes a random one, to try sizes.
    split: file of upcycle.save, which belongs to it; '' deals the neurons as they lie and starts from a random router.
    train: 'router', or 'experts' for those too. kd, layer, match, balance, temperature (T): the loss above.
    implementation: of moe.apply on the mixture's own stream; 'dense' costs what the dense MLP does.
    loss_chunk, query_chunk, attention, remat: as in LanguageModel.
    """

    dense: ModelConfig
    cfg: ModelConfig
    base: str = ''
    split: str = ''
    train: str = 'router'
    kd: float = 1.0
    layer: float = 1.0
    match: float = 1.0
    balance: float = 0.01
    temperature: float = 0.5
    implementation: str = 'dense'
    loss_chunk: int = 0
    query_chunk: int = 0
    attention: str = 'dense'
    remat: str = 'none'

    def __post_init__(self):
        for name, value, known in (('train', self.train, TRAIN), ('attention', self.attention, ATTENTION),
                                   ('implementation', self.implementation, moe.IMPLEMENTATIONS),
                                   ('remat', self.remat, ('none', *REMAT))):
            if value not in known:
                raise ConfigError(f'task.kwargs.{name}: unknown {value!r}, one of {", ".join(map(repr, known))}')
        terms = (self.kd, self.layer, self.match, self.balance)
        if min(terms) < 0 or sum(terms[:3]) == 0 or self.temperature <= 0:
            raise ConfigError('task.kwargs: kd, layer, match and balance must be at least 0, one of the first three '
                              'above, and temperature above 0')
        if bool(self.base) != bool(self.split):
            raise ConfigError('task.kwargs: a base needs the split of its neurons (scripts/upcycle_split.py), and a '
                              'split its base')

    @property
    def trainable(self) -> tuple[str, ...]:
        return TRAIN[self.train]

    @property
    def target(self) -> PlainTarget:
        return PlainTarget(self.cfg)

    def init(self, rng: Array) -> dict:
        split = upcycle.random_split(self.cfg)
        return self.of(init_params(self.dense, rng), split)

    def load(self) -> dict:
        """Errors: those of formats.load and upcycle.read; ConfigError for a base of another shape."""
        if not self.base:
            return {}
        loaded = formats.load_shaped(self.base, self.dense)
        return self.of(loaded.params, upcycle.read(self.split, self.cfg, loaded.base_hash))

    def of(self, dense: dict, split: upcycle.Split) -> dict:
        """The whole tree, from the dense model's base."""
        return {'base': upcycle.convert(self.cfg, dense, split.order, split.router),
                'teacher': {'mlp': dense['layers']['mlp']}}

    def loss(self, params: dict, batch: Mapping[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        """Metrics: nll and accuracy of the mixture on the text, teacher_nll, kl (nats), agreement (share of positions
        where both hold the same token likeliest), the terms layer_error, match and balance, weight (tokens counted).
        """
        del rng
        base, weights = params['base'], batch['weights']
        ctx = sequence_context(self.cfg, batch['tokens'].shape, batch['segments'], batch['positions'], self.attention,
                               self.query_chunk)
        x = embed(self.cfg, base, batch['tokens'], ctx.positions)
        nothing = jnp.zeros(weights.shape)
        start = {'student': x, 'teacher': x, 'error': nothing, 'match': nothing, 'balance': nothing[:, 0]}
        layer = functools.partial(self.beside, weights=weights)
        ends, _, _ = run_layers(self.cfg, base, start, None, ctx, extra=jax.lax.stop_gradient(params['teacher']['mlp']),
                                layer_fn=layer_for_training(self.remat, layer))
        student, teacher = finish(self.cfg, base, ends['student']), finish(self.cfg, base, ends['teacher'])
        sums = losses.summed(lambda *a: self.divergences(base, *a), (student, teacher, batch['targets'], weights),
                             self.loss_chunk)
        mean = {name: value / jnp.maximum(sums['weight'], 1e-9) for name, value in sums.items()}
        error, match = ((ends[name] * weights).sum() / jnp.maximum(weights.sum(), 1e-9) / self.cfg.num_layers
                        for name in ('error', 'match'))
        balance = ends['balance'].mean() / self.cfg.num_layers
        total = self.kd * mean['kl'] + self.layer * error + self.match * match + self.balance * balance
        return total, {name: mean[name] for name in ('nll', 'teacher_nll', 'kl', 'agreement', 'accuracy')} | {
            'layer_error': error, 'match': match, 'balance': balance, 'weight': sums['weight']}

    def beside(self, cfg: ModelConfig, p: dict, x: dict[str, Array], state: Any, ctx: Context, teacher_mlp: dict, *,
               weights: Array) -> tuple[dict[str, Array], Any, dict]:
        """The layer function: the mixture and the dense model, each on its own residual stream."""

        def mixed(h: Array) -> tuple[Array, Array]:
            q, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], h), ctx)
            keys, values, _ = read_write(None, k, v, ctx)
            h = h + out(cfg, p['attn'], attend(q, keys, values, ctx))
            return h, norm(cfg, p['mlp_norm'], h)

        student, read = mixed(x['student'])
        routing = moe.route(cfg.moe, p['moe']['router'], read)
        said = moe.apply(cfg, p['moe'], read, self.implementation, routing)
        balance = moe.balance_loss(routing.logits, routing.ids, weights)
        teacher, read = jax.lax.stop_gradient(mixed(x['teacher']))
        wanted = jax.lax.stop_gradient(mlp(self.dense, teacher_mlp, read))
        error, match = self.terms_of(p['moe'], read, wanted)
        return {'student': student + said, 'teacher': teacher + wanted, 'error': x['error'] + error,
                'match': x['match'] + match, 'balance': x['balance'] + balance}, state, {}

    def terms_of(self, p: dict, read: Array, wanted: Array) -> tuple[Array, Array]:
        """The terms `layer` and `match` of one layer at each token [B, S]. read, wanted [B, S, d]: of the dense MLP."""
        routing = moe.route(self.cfg.moe, p['router'], read)
        every = jax.vmap(lambda weights: moe.expert(self.cfg, weights, read))(p['experts']).astype(jnp.float32)
        share = (jax.nn.one_hot(routing.ids, self.cfg.moe.num_experts) * routing.weights[..., None]).sum(-2)
        said = jnp.einsum('e...d,...e->...d', every, share)
        if 'shared' in p:
            shape = dataclasses.replace(self.cfg.mlp, intermediate_size=self.cfg.moe.shared_size)
            said += mlp(self.cfg.replace(mlp=shape), p['shared'], read)
        wanted = wanted.astype(jnp.float32)
        error = ((said - wanted) ** 2).sum(-1) / ((wanted**2).sum(-1) + 1e-6)
        length = jnp.moveaxis(jnp.sqrt((jax.lax.stop_gradient(every) ** 2).sum(-1) + 1e-9), 0, -1)
        due = length / length.sum(-1, keepdims=True)
        return error, (due * (jnp.log(due) - jax.nn.log_softmax(routing.logits / self.temperature))).sum(-1)

    def divergences(self, base: dict, student: Array, teacher: Array, targets: Array, weights: Array) -> dict:
        """Weighted sums over positions [B, S]; student, teacher [B, S, d] after the final norm."""
        log_q = jax.nn.log_softmax(unembed(self.cfg, base, student))
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(unembed(self.cfg, base, teacher)))
        gold = lambda a: jnp.take_along_axis(a, targets[..., None], -1)[..., 0]
        best = log_q.argmax(-1)
        found = {'kl': (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 'nll': -gold(log_q), 'teacher_nll': -gold(log_p),
                 'agreement': best == log_p.argmax(-1), 'accuracy': best == targets, 'weight': jnp.ones(weights.shape)}
        weights = weights.astype(log_q.dtype)
        return {name: (value * weights).sum() for name, value in found.items()}

    def train_flops(self, batch: int, seq_len: int) -> float:
        """FLOPs of one step: the dense model forward, the mixture forward and back (without its frozen weights), its
        experts once more on what the dense model reads."""
        cfg, att = self.cfg, self.cfg.attention
        attention = 2 * cfg.hidden_size * att.head_dim * (att.num_heads + att.num_kv_heads)
        experts = cfg.feed_scalars(cfg.moe.num_experts if self.implementation == 'dense' else None)
        back = 3 if self.train == 'experts' else 2
        layer = 3 * attention + self.dense.feed_scalars() + 2 * back * experts
        return 2.0 * batch * seq_len * (cfg.num_layers * layer + 3 * cfg.hidden_size * cfg.vocab_size)


def build(model: str | Mapping[str, Any] = '', overrides: Mapping[str, Any] | None = None, base: str = '',
          moe: Mapping[str, Any] | None = None, **options: Any) -> UpcycleTask:
    """From a config. base: the dense model; or model: a preset's name or the fields of a ModelConfig with `overrides`.
    moe: the fields of MoeConfig. Errors: ConfigError names what is unknown."""
    known = {f.name for f in dataclasses.fields(UpcycleTask)} - {'cfg', 'dense'}
    unknown = [key for key in options if key not in known]
    unknown += [f'moe.{key}' for key in moe or {} if key not in {f.name for f in dataclasses.fields(MoeConfig)}]
    if unknown or bool(model) == bool(base):
        raise ConfigError(f'task.kwargs: unknown {", ".join(unknown)}' if unknown else
                          'task.kwargs: give either base (a trained model) or model (a shape, with random weights)')
    if base:
        dense = formats.load(base).config
    else:
        fields = preset(model).to_dict() if isinstance(model, str) else dict(model)
        dense = ModelConfig.from_dict(fields | dict(overrides or {}))
    missing = [name for name in ('num_experts', 'experts_per_token') if name not in (moe or {})]
    if missing:
        raise ConfigError(f'task.kwargs: missing {", ".join(f"moe.{name}" for name in missing)}')
    return UpcycleTask(dense, upcycle.shape(dense, MoeConfig(**moe)), base, **options)
