"""Decoding with experts spread over a mesh: guessed ones are gathered into replicated slots ahead of use, in one jit.

    after the attention of layer l:  guess the experts of layer m = l + lead;  start gathering them
    layers l + 1 .. m:               attention ... (the collective is under way)
    experts of layer m:              out of the slots; a token whose expert was not guessed goes to where that lives

The last line is exact: a token's missed expert runs on the one device that has it, and a sum with zeros brings the
result to all. So the output is that of one device whatever the predictor says. That sum, [tokens, experts_per_token,
d], is there even if nothing was missed: a branch around it would hold a collective, and a TPU has nothing else under
way beside such a branch. Our reading of the ahead-of-time loading of Bhendawade et al., 2025 (arXiv 2502.02040), on a
mesh instead of a host; its text is not public in full.

Expert parallelism (backbone/moe.py) moves activations only, which are far fewer bytes than weights: no gain over it is
claimed without a measurement on a mesh.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from backbone import cache as caches
from backbone import moe
from backbone.config import ModelConfig
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.layers import attend, mlp, norm, out, qkv, read_write
from backbone.model import PlainTarget, cache_context, embed, finish, unembed
from m2r2 import expert_gather
from m2r2.expert_gather import FORMS
from m2r2.expert_guess import Predictor, look_ahead

Array = jax.Array


@struct.dataclass
class Fetched:
    """Experts ids [n] of one layer, in slots [n, 3, d, f]."""

    ids: Array
    slots: Array


def mixture(cfg: ModelConfig, p: dict, x: Array, ids: Array, weights: Array,
            there: Fetched | None) -> tuple[Array, Array]:
    """The routed experts' sum for x [B, S, d] -> [B, S, d], and which [B, S, K] were in the slots. p: a layer's 'moe'.

    there None: nothing was gathered, every token goes to where its experts live (expert parallelism).
    """
    flat, k = x.reshape(-1, x.shape[-1]), ids.shape[-1]
    chosen = ids.reshape(-1, k)
    said, hit = jnp.zeros((*chosen.shape, x.shape[-1]), x.dtype), jnp.zeros(chosen.shape, bool)
    for s in range(0 if there is None else there.ids.shape[0]):
        y = moe.expert(cfg, expert_gather.matrices(there.slots[s]), flat)
        asks = chosen == there.ids[s]
        said, hit = jnp.where(asks[..., None], y[:, None].astype(said.dtype), said), hit | asks
    said = jnp.where(hit[..., None], said, expert_gather.at_home(cfg, p['experts'], flat, chosen, ~hit))
    y = jnp.einsum('tkd,tk->td', said.astype(weights.dtype), weights.reshape(-1, k)).astype(x.dtype)
    return y.reshape(x.shape), hit.reshape(ids.shape)


# --- the target -------------------------------------------------------------------------------------------------


@struct.dataclass
class MeshState:
    """kv: keys and values, a tuple by layer. memory: the predictor's, by layer. asked, found [L]: experts that single
    tokens wanted so far, and those of them that lay in the slots."""

    kv: tuple
    memory: tuple
    asked: Array
    found: Array


@dataclasses.dataclass(frozen=True)
class MeshTarget:
    """A Target: PlainTarget's model, with a predictor that has guessed experts gathered into `slots` slots a layer.

    params: {'base': of expert_gather.pack, 'prefetch': the predictor's}; layers stacked or a tuple. Blocks of more
    than `few` tokens (prompts) are run where the experts live, without guesses. Without a mesh in force it is the same
    on one device. form: a name of FORMS. wait: gather what the router wants once it is known, nothing between: the
    control for the schedule.
    """

    cfg: ModelConfig
    predictor: Predictor
    slots: int
    form: str = 'pieces'
    few: int = 8
    cache_dtype: str = 'float32'
    wait: bool = False
    exact: ClassVar[bool] = True

    def __post_init__(self):
        if self.cfg.moe is None:
            raise ConfigError('expert mesh: the model has no experts (its config has no moe)')
        if self.cfg.norm_placement != 'pre':
            raise ConfigError(f'expert mesh: norm_placement must be pre, got {self.cfg.norm_placement}')
        if not self.cfg.moe.experts_per_token <= self.slots <= self.cfg.moe.num_experts:
            raise ConfigError(f'expert_mesh.slots must be in {self.cfg.moe.experts_per_token}..'
                              f'{self.cfg.moe.num_experts}, got {self.slots}')
        if self.form not in FORMS:
            raise ConfigError(f'expert_mesh.form: unknown {self.form!r}, one of {", ".join(FORMS)}')

    @property
    def reference(self) -> PlainTarget:
        return PlainTarget(self.cfg, self.cache_dtype)

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """The predictor's memory comes with the first pass, which knows its parameters."""
        del block
        kv = caches.init_kv(self.cfg, batch, max_len, self.cache_dtype, stacked=False)
        none = lambda: jnp.zeros((self.cfg.num_layers,), jnp.int32)  # two buffers: the cache is donated
        return caches.init_cache(MeshState(kv, (), none(), none()), batch, max_len)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: dict[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As Target.forward. Errors: ConfigError for taps other than hidden:last, for masks and resume."""
        cfg, base, mine = self.cfg, params['base'], params.get('prefetch')
        if resume is not None or masks is not None or set(taps) - {'hidden:last'}:
            raise ConfigError('expert mesh: no resume, no masks and no taps but hidden:last')
        state = cache.layers
        batch, size = tokens.shape
        ctx = cache_context(cfg, cache.replace(layers=None), size)
        guess, live = batch * size <= self.few, jnp.ones(tokens.shape, bool)
        memory = list(state.memory or self.predictor.init(cfg, mine, batch, cache.tokens.shape[1]))
        kv, fetched, stream, counts = list(state.kv), {}, (), []
        x = embed(cfg, base, tokens, ctx.positions)
        for l in range(cfg.num_layers):
            p, own = layer(base, l), self.predictor.layer_params(mine, l)
            if self.predictor.restarts(l):
                stream = self.predictor.begin(mine, x)
            with jax.named_scope(f'attention_{l}'):
                q, k, v = qkv(cfg, p['attn'], norm(cfg, p['attn_norm'], x), ctx)
                keys, values, kv[l] = read_write(kv[l], k, v, ctx)
                x = x + out(cfg, p['attn'], attend(q, keys, values, ctx))
            with jax.named_scope(f'router_{l}'):
                normed = norm(cfg, p['mlp_norm'], x)
                routing = moe.route(cfg.moe, p['moe']['router'], normed)
            if guess and self.wait:
                there = self._fetch(base, l, jax.lax.top_k(_wanted(cfg, routing.ids), self.slots)[1])
            else:
                there = fetched.pop(l, None)
                wanted = self.predictor.targets(l, cfg.num_layers) if guess else ()
                with jax.named_scope(f'guess_{l}'):
                    stream = self.predictor.beside(cfg, p, own, stream, keys, values, ctx)
                    targets = tuple((_target(base, m), memory[m], jnp.int32(m)) for m in wanted)
                    ahead = look_ahead(cfg, self.predictor, own, targets, x, stream, ctx, live, self.slots)
                for m, (ids, _) in zip(wanted, ahead, strict=True):
                    if m not in fetched:  # of several guesses the first: it leaves most time
                        fetched[m] = self._fetch(base, m, ids)
            with jax.named_scope(f'experts_{l}'):
                y, hit = mixture(cfg, p['moe'], normed, routing.ids, routing.weights, there)
                x = x + (y + mlp(cfg, p['moe']['shared'], normed) if 'shared' in p['moe'] else y)
            memory[l] = self.predictor.remember(memory[l], routing.ids, live)
            counts.append((hit.size, hit.sum()) if guess else (0, jnp.int32(0)))
        hidden = finish(cfg, base, x)
        found = {'hidden:last': hidden} if 'hidden:last' in taps else {}
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        asked, hits = (jnp.stack([jnp.asarray(n, jnp.int32) for n in column]) for column in zip(*counts, strict=True))
        state = MeshState(tuple(kv), tuple(memory), state.asked + asked, state.found + hits)
        cache = caches.write_tokens(cache.replace(layers=state), tokens)
        return Output(tokens, unembed(cfg, base, hidden), cache, found)

    def _fetch(self, base: dict, l: int, ids: Array) -> Fetched:
        with jax.named_scope(f'prefetch_{l}'):
            return Fetched(ids, expert_gather.fetch(layer(base, l)['moe']['experts'], ids, self.form))


def layer(base: dict, l: int) -> dict:
    """One layer's parameters, of stacked layers or a tuple."""
    layers = base['layers']
    return layers[l] if isinstance(layers, (tuple, list)) else jax.tree.map(lambda a: a[l], layers)


def _target(base: dict, l: int) -> dict:
    p = layer(base, l)
    return {'mlp_norm': p['mlp_norm'], 'router': p['moe']['router']}


def _wanted(cfg: ModelConfig, ids: Array) -> Array:
    return jax.nn.one_hot(ids.reshape(-1), cfg.moe.num_experts, dtype=jnp.float32).sum(0)
