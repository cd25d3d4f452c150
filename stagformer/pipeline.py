"""Decoding with one stack a stage: the 'stage' axis of the mesh holds the stacks' leading axis.

One token: every stage runs its stack on the same embedding, then what it said goes one stage up (one collective-permute
of [B, d]) and the outputs are summed, all but the last with weight 0 (one all-reduce of [B, d]). Nothing else is
exchanged: weights and caches stay where they are.

A block, as in prefill and verification: stage s works on piece c while stage s - 1 works on piece c + 1, so C pieces
take C + p - 1 ticks, and one piece the p passes of a single device.

Two ways to the same program. 'shardings': arrays with a leading stack axis, placed as P('stage'); the compiler finds
that a shift is a permute and a sum an all-reduce. 'shard_map': each stage runs its own part and sends it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backbone import cache as caches
from backbone import mesh as meshes
from backbone.contract import Output, Resume
from backbone.errors import ConfigError
from backbone.layers import make_context
from backbone.model import finish, run_layers, unembed
from stagformer import layout, passes, state, step
from stagformer.config import StagFormerConfig
from stagformer.model import CrossState, context_of, cross_rope, staggered_layer

Array = jax.Array
WAYS = ('shardings', 'shard_map')
HEADS = ('whole', 'split')
FAR = 1 << 30  # a position no cache has: what is written there is dropped


@dataclasses.dataclass(frozen=True)
class StagedTarget:
    """A Target whose stacks are stages; run it under `jax.set_mesh` of a mesh whose stage axis is cfg.stacks.

    params: from `pack`, placed by `shardings`. head: 'whole', every stage computes all logits (the last stage would
    have to, and the others wait), or 'split', each a part of the vocabulary. piece: tokens of a block a tick, 0 for all
    of them; blocks that it does not divide go in one piece.
    Errors: ConfigError for a model whose stacks cannot be stages, and for a mesh that does not fit.
    """

    cfg: StagFormerConfig
    cache_dtype: str = 'float32'
    way: str = 'shardings'
    head: str = 'whole'
    piece: int = 0
    exact: bool = dataclasses.field(default=True, init=False)
    reference: Any = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        layout.check_form(self.cfg, 'staged')
        if self.way not in WAYS:
            raise ConfigError(f'way: unknown {self.way!r}, one of {", ".join(WAYS)}')
        if self.head not in HEADS:
            raise ConfigError(f'head: unknown {self.head!r}, one of {", ".join(HEADS)}')

    @property
    def vocab_size(self) -> int:
        return self.cfg.base.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.cfg.base.max_seq_len

    def init_cache(self, batch: int, max_len: int, block: int) -> caches.Cache:
        """Errors: ConfigError for more slots than the model was made for."""
        if max_len > self.max_seq_len:
            raise ConfigError(f'a cache of {max_len} slots is longer than the context of {self.max_seq_len}')
        layers = state.init(self.cfg, batch, max_len, block, self.cache_dtype, 'staged')
        cache = caches.init_cache(layers, batch, max_len)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return cache
        return jax.tree.map(jax.lax.with_sharding_constraint, cache, specs(self.cfg, cache, mesh))

    def pack(self, params: dict, dtype: Any = jnp.float32) -> dict:
        """Parameters as they are stored -> as `forward` takes them."""
        return pack(self.cfg, params, dtype, self.head)

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """Where the leaves of such parameters, or of a cache, lie."""
        return shardings(self.cfg, tree, mesh, self.head)

    def forward(self, params: dict, tokens: Array, cache: caches.Cache, *, resume: Resume | None = None,
                taps: tuple[str, ...] = (), masks: Mapping[str, Array] | None = None,
                logits_at: Array | None = None) -> Output:
        """As the contract says. Taps: 'hidden:last' only. Errors: ConfigError for other taps, resume or masks."""
        if resume is not None or masks is not None or set(taps) - {'hidden:last'}:
            raise ConfigError('a staged target takes no resume and no masks, and has the tap hidden:last only')
        check_mesh(self.cfg, self.way)
        base, whole = params['base'], bool(taps) or logits_at is None
        total, layers = self._run(params, tokens, cache, logits_at, whole)
        hidden = finish(self.cfg.base, base, total)
        found = {'hidden:last': hidden} if taps else {}
        if whole and logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        logits = unembed(self.cfg.base, base, hidden)
        if self.head == 'split':
            logits = jax.lax.with_sharding_constraint(logits, P(None, None, VOCABULARY))
        return Output(tokens, logits, caches.write_tokens(cache.replace(layers=layers), tokens), found)

    def _run(self, params: dict, tokens: Array, cache: caches.Cache, last: Array | None,
             whole: bool) -> tuple[Array, dict[str, Any]]:
        """(what the head's norm reads, [B, S, d] or only [B, 1, d] at `last`; the state)."""
        cfg, mine, size = self.cfg.apart, params['stagformer'], tokens.shape[1]
        positions = cache.pos[:, None] + jnp.arange(size)
        x = passes.token_rows(cfg, params, tokens, positions)
        last = jnp.full_like(cache.pos, size - 1) if last is None else last
        capacity, piece = cache.tokens.shape[1] - 1, self.piece if self.piece and size % self.piece == 0 else size
        weights = mine['mix'].astype(x.dtype) if cfg.mix else jax.nn.one_hot(cfg.stacks - 1, cfg.stacks, dtype=x.dtype)
        stages = {'layers': params['base']['layers'], **{k: a for k, a in mine.items() if k != 'mix'}}

        def everywhere(hand, total, stages, layers, index, weights, x, pos, last):
            if size == 1:
                outputs, layers = _token(cfg, stages, layers, x, pos, capacity, hand)
            else:
                outputs, layers = _block(cfg, stages, layers, index, x, pos, last, capacity, piece, hand)
            if not whole:
                outputs = jax.vmap(lambda h: jnp.take_along_axis(h, last[:, None, None], axis=1))(outputs)
            return total(jnp.einsum('s,sbtd->btd', weights, outputs)), layers

        index = jnp.arange(cfg.stacks)
        arguments = (stages, cache.layers, index, weights, x, cache.pos, last)
        if self.way == 'shardings':
            return everywhere(shifted, lambda h: h, *arguments)
        up = [(s, s + 1) for s in range(cfg.stacks - 1)]
        return jax.shard_map(
            lambda *a: everywhere(lambda h: jax.lax.ppermute(h, 'stage', up), lambda h: jax.lax.psum(h, 'stage'), *a),
            in_specs=(P('stage'),) * 4 + (P(),) * 3, out_specs=(P(), P('stage')), axis_names={'stage'},
            check_vma=False)(*arguments)


def shifted(h: Array) -> Array:
    """What each stage said [p, ...] -> what the one below said; nothing for the first."""
    return jnp.pad(h[:-1], [(1, 0)] + [(0, 0)] * (h.ndim - 1))


# --- what the stages do; n of them lie on the leading axis: all of a mesh, or the one that is here ------------------


def _token(cfg: StagFormerConfig, stages: dict, layers: dict, x: Array, pos: Array, capacity: int,
           hand: Callable) -> tuple[Array, dict]:
    """One token a row, x [B, 1, d] -> (outputs [n, B, 1, d], state)."""
    params = {'base': {'layers': stages['layers']}, 'stagformer': stages}
    ctx = make_context(cfg.base, pos, 1, capacity)
    return step.in_arrays(cfg, params, x, caches.Cache(pos, None, layers), ctx, hand)


def _block(cfg: StagFormerConfig, stages: dict, layers: dict, index: Array, x: Array, pos: Array, last: Array,
           capacity: int, piece: int, hand: Callable) -> tuple[Array, dict]:
    """A block x [B, S, d], `piece` tokens a tick -> (outputs [n, B, S, d], state). index [n]: which stages these are.
    last [B]: index of the block's last token that is no padding."""
    count, n = x.shape[1] // piece, len(index)
    view = cfg.base.replace(num_layers=cfg.depths[0])

    def one(p, own, read, inbox, done, turn):
        """A stage's tick: piece number `turn`, or nothing that lasts where it has none."""
        busy, at = (turn >= 0) & (turn < count), jnp.clip(turn, 0, count - 1) * piece
        ctx = make_context(cfg.base, pos + at, piece, capacity).replace(pos=jnp.where(busy, pos + at, FAR))
        end = jnp.minimum(pos + last, pos + at + piece - 1)
        context = context_of(cfg, {'stagformer': {'context_norm': jax.tree.map(lambda a: a[None], p['context_norm'])}},
                             0, inbox) if cfg.context_norm else inbox
        new = passes.published(cfg, p['publish'], context, cross_rope(cfg, ctx.rope))
        put = lambda read: passes.write('tuple', (read,), (new,), ctx.pos, end, False)[0]
        read = put(read) if cfg.window is None else read  # as in passes.py: a ring is written after it is read
        both = passes.together('tuple', own, CrossState((read,), () if cfg.window is None else (new,)))
        layers = tuple(layer | {'cross': cross} for layer, cross in zip(p['layers'], p['cross'], strict=True))
        h, both, _ = run_layers(view, {'layers': layers}, jax.lax.dynamic_slice_in_dim(x, at, piece, 1), both, ctx,
                                layer_fn=staggered_layer(cfg, lambda q, seen: passes.seen_by(cfg, seen, ctx)))
        read = read if cfg.window is None else put(read)
        kept = jnp.where(busy, h, jax.lax.dynamic_slice_in_dim(done, at, piece, 1))
        return passes.own_part('tuple', both), read, h, jax.lax.dynamic_update_slice_in_dim(done, kept, at, 1)

    def tick(carry, t):
        own, read, inbox, done = carry
        own, read, h, done = jax.vmap(one)(stages, own, read, inbox, done, t - index)
        return (own, read, hand(h), done), None

    empty = jnp.zeros((n, x.shape[0], piece, x.shape[2]), x.dtype)
    carry = (layers['self'], layers['cross'], empty, jnp.zeros((n, *x.shape), x.dtype))
    (own, read, _, outputs), _ = jax.lax.scan(tick, carry, jnp.arange(count + cfg.stacks - 1))
    return outputs, {'self': own, 'cross': read}


def greedy_step(target: StagedTarget, params: dict, cache: caches.Cache) -> caches.Cache:
    """One token a row by argmax, as decoding does it; with the head split, the stages exchange their best word and its
    logit in one all-reduce of [parts, 2, B] numbers."""
    output = target.forward(params, cache.pending[:, None], cache)
    best = best_of_parts if target.head == 'split' else lambda logits: logits.argmax(-1).astype(jnp.int32)
    return caches.commit(output.cache, jnp.zeros_like(cache.pos), best(output.logits[:, 0]))


def best_of_parts(logits: Array) -> Array:
    """argmax of logits [B, V] whose vocabulary is split over the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape['model'] * mesh.shape['stage']

    def mine(part, logits):
        word = logits.argmax(-1)
        value = jnp.take_along_axis(logits, word[:, None], axis=-1)[:, 0].astype(jnp.float32)
        pair = jnp.stack([jax.lax.bitcast_convert_type(value, jnp.int32), word + part[0] * logits.shape[-1]])
        return jax.lax.psum(jnp.where(jnp.arange(parts)[:, None, None] == part[0], pair, 0), VOCABULARY)

    found = jax.shard_map(mine, in_specs=(P(VOCABULARY), P(None, VOCABULARY)), out_specs=P(), check_vma=False,
                          axis_names=set(VOCABULARY))(jnp.arange(parts), logits)
    values = jax.lax.bitcast_convert_type(found[:, 0], jnp.float32)
    return jnp.take_along_axis(found[:, 1], values.argmax(0)[None], axis=0)[0]


# --- parameters and places -------------------------------------------------------------------------------------------

VOCABULARY = ('model', 'stage')  # each stage has a part of every part that the model axis makes: no weight moves


def pack(cfg: StagFormerConfig, params: dict, dtype: Any = jnp.float32, head: str = 'whole') -> dict:
    """Parameters as they are stored -> for a StagedTarget with that head. Errors: ConfigError."""
    packed = layout.pack(cfg, params, dtype, 'staged')
    base = packed['base']
    if head == 'split' and 'lm_head' not in base:  # the embedding is whole on every stage, the head is not
        base = base | {'lm_head': {'kernel': base['embed']['tokens'].T}}
    return packed | {'base': base}


def specs(cfg: StagFormerConfig, tree: Any, mesh: Mesh | jax.sharding.AbstractMesh, head: str = 'whole') -> Any:
    """A PartitionSpec for every leaf of what `pack` or `init_cache` gives (arrays or shape structs)."""
    def one(path: str, plain: P) -> P:
        if re.search(r'(^|/)(base/layers|stagformer|layers/(self|cross))(/|$)', path):
            return P('stage', *plain[1:])
        return P(None, VOCABULARY) if head == 'split' and path.endswith('lm_head/kernel') else plain

    return meshes.specs(cfg.base, tree, mesh, also=one)


def shardings(cfg: StagFormerConfig, tree: Any, mesh: Mesh, head: str = 'whole') -> Any:
    """The same as NamedShardings, for jax.device_put."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(cfg, tree, mesh, head))


def check_mesh(cfg: StagFormerConfig, way: str = 'shardings') -> None:
    """Errors: ConfigError where the mesh in force has not one stage a stack, or has what that way cannot split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape['stage'] != cfg.stacks:
        raise ConfigError(f'{cfg.stacks} stacks need a mesh of stage={cfg.stacks} in force (jax.set_mesh), got '
                          + ('none' if mesh.empty else f'stage={mesh.shape["stage"]}'))
    if way == 'shard_map' and mesh.size != cfg.stacks:  # XLA fails on a scatter that it is to split further in there
        raise ConfigError(f'way shard_map takes a mesh of stages only, got {dict(mesh.shape)}: take way shardings')
