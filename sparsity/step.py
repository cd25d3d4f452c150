"""One token a row through the layers, most of them thinned: what the sparse Target and the sparse drafter share.

    dense first layers -> context of layer 0 -> (every m tokens) scores -> units -> thinned layers -> dense last layers

What is kept depends on this token and on those before it. Everything is by position: a token that is taken back, and
run again or replaced, leaves no trace in the choice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from backbone.branch import when
from backbone.config import ModelConfig
from backbone.errors import ConfigError
from backbone.layers import Context, block
from backbone.model import embed, finish, run_layers, unembed
from sparsity import layout, select
from sparsity.config import PARTS, SparsityConfig
from sparsity.gather import check
from sparsity.select import Units
from sparsity.selectors import Seen
from sparsity.sparse_layer import Picked, gathered

Array = jax.Array
COMPUTE = ('masked', 'gathered')


@struct.dataclass
class Choice:
    """units: what each row keeps. at [B]: the slot of the token it was chosen for, -1 before the first.
    picked: for the gathered path, one {'heads', 'neurons'} of Picked or None for each layer."""

    units: Units
    at: Array
    picked: Any = ()


def checked(cfg: ModelConfig, s: SparsityConfig, compute: str, implementation: str | None, stacked: bool) -> None:
    """Errors: ConfigError names the field and its value."""
    s.check(cfg)
    check(implementation)
    if compute not in COMPUTE:
        raise ConfigError(f'compute: unknown {compute!r}, one of {", ".join(COMPUTE)}')
    if compute == 'gathered' and stacked:
        raise ConfigError('compute gathered needs parameters of sparsity.layout.pack, and stacked False')
    if compute == 'gathered' and cfg.attention.qk_norm and s.heads < 1:
        raise ConfigError('compute gathered: qk_norm needs the queries of all heads, sparsity.heads must be 1.0')


def first_choice(cfg: ModelConfig, s: SparsityConfig, compute: str, batch: int) -> Choice:
    """Nothing is kept yet: made before the first token, it is due at once."""
    units = {part: jnp.zeros((batch, cfg.num_layers, n), bool) for part, n in s.sizes(cfg).items()}
    return Choice(units, jnp.full((batch,), -1, jnp.int32), pick(cfg, s, compute, units))


def due(s: SparsityConfig, choice: Choice, pos: Array) -> Array:
    """[B]: rows whose choice is too old, or was made for a token that has been taken back (or is run again)."""
    return (choice.at < 0) | (choice.at >= pos) | (pos - choice.at >= s.refresh)


def renew(t: Any, params: Any, seen: Seen, choice: Choice) -> tuple[Choice, Array]:
    """The choice for the tokens at seen.pos, and which rows [B] chose anew. t: a SparseTarget or SparseDrafter."""
    rows = due(t.s, choice, seen.pos)

    def anew(old: Choice) -> Choice:
        fresh = select.choose(t.cfg, t.s, t.selector.scores(params, seen))
        units = {part: jnp.where(rows[:, None, None], fresh[part], old.units[part]) for part in PARTS}
        return Choice(units, jnp.where(rows, seen.pos, old.at), pick(t.cfg, t.s, t.compute, units))

    return (anew(choice) if t.s.refresh == 1 else when(rows.any(), anew, choice)), rows


def loaded(s: SparsityConfig, units: Units) -> Units:
    """What each row goes through: its own, or under 'union' what any row keeps."""
    return select.union(units) if s.rows == 'union' else units


def pick(cfg: ModelConfig, s: SparsityConfig, compute: str, units: Units) -> Any:
    """What the gathered path loads in each layer; () for the masked one, which needs no ids."""
    if compute != 'gathered':
        return ()
    return tuple({part: _pick_part(cfg, s, part, l, units[part][:, l]) for part in PARTS}
                 for l in range(cfg.num_layers))


def _pick_part(cfg: ModelConfig, s: SparsityConfig, part: str, l: int, units: Array) -> Picked | None:
    size, wanted = s.sizes(cfg)[part], s.counts_of(cfg, part)[l]
    if wanted == size or l not in s.sparse_layers(cfg):
        return None
    most = min(size, wanted * units.shape[0]) if s.ranking == 'local' else size  # of all rows together
    ids, active = select.to_ids(units.any(0), most)
    own = jnp.ones((units.shape[0], most)) if s.rows == 'union' else units[:, ids].astype(jnp.float32)
    return Picked(ids, active, own)


def thinned(t: Any, params: Any, x: Array, kv: Any, ctx: Context, choice: Choice) -> tuple[Array, Any]:
    """The sparse layers on x [B, 1, d], with what the choice keeps. K/V of every head are written."""
    sparse = t.s.sparse_layers(t.cfg)
    if t.compute == 'gathered':
        layer = functools.partial(gathered, s=t.s, implementation=t.implementation)
        extra = choice.picked
    else:
        masks = select.expand(t.cfg, t.s, loaded(t.s, choice.units))
        whole = {part for part in PARTS if set(t.s.counts_of(t.cfg, part)) == {t.s.sizes(t.cfg)[part]}}
        extra = {part: a.swapaxes(0, 1)[:, :, None] for part, a in masks.items() if part not in whole}
        layer = block
    x, kv, _ = run_layers(t.cfg, params['base'], x, kv, ctx, sparse.start, sparse.stop, layer_fn=layer, extra=extra)
    return x, kv


def one_token(t: Any, params: Any, tokens: Array, kv: Any, ctx: Context, choice: Choice,
              prompt: dict[str, Array]) -> tuple[Array, Any, Choice, Array]:
    """tokens [B, 1] at ctx.positions -> logits [B, 1, V], the cache's layers, the choice, which rows chose anew [B].

    prompt: Seen.prompt. Errors: ConfigError where the gathered path is given other parameters than layout.pack's.
    """
    cfg, base, sparse = t.cfg, params['base'], t.s.sparse_layers(t.cfg)
    if t.compute == 'gathered' and not layout.has_rows(base):
        raise ConfigError('compute gathered needs parameters of sparsity.layout.pack')
    x = embed(cfg, base, tokens, ctx.positions)
    x, kv, found = run_layers(cfg, base, x, kv, ctx, hi=sparse.start, taps=('attention:0',))
    context = found['attention:0'].reshape(tokens.shape[0], -1)
    choice, anew = renew(t, params, Seen(context, ctx.positions[:, 0], prompt), choice)
    x, kv = thinned(t, params, x, kv, ctx, choice)
    x, kv, _ = run_layers(cfg, base, x, kv, ctx, lo=sparse.stop)
    return unembed(cfg, base, finish(cfg, base, x)), kv, choice, anew
