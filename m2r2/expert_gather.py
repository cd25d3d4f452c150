"""Experts spread over a mesh: their layout, ways to gather some of them everywhere, and running one where it lives.

Each layer's experts are one array [E, 3, d, f], spread over `expert` by expert, so that an expert is gathered in one
piece. FORMS are ways to gather. For v5e:2x4 the TPU compiler runs permutes and all-gathers beside other work, but
all-reduces only with options of its own (xla_tpu_enable_async_collective_fusion_fuse_all_reduce with
xla_enable_async_all_reduce), reduce-scatters and all-to-alls not at all, and nothing beside a branch that holds a
collective; tests/multidevice/test_expert_schedule.py reads this off its schedules.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backbone import moe
from backbone.config import ModelConfig
from backbone.mesh import shardings

Array = jax.Array
AXIS = 'expert'
ROWS = 2  # axis of [experts, 2 or 3, d, f] that is cut into parts

# --- layout -----------------------------------------------------------------------------------------------------


def pack(base: dict) -> dict:
    """Base parameters with each layer's experts as one array [(L,) E, 3, d, f]: gate, up and the transposed down (two
    without a gate), so that an expert is gathered in one piece. Layers stacked or a tuple, as they were."""
    def one(p: dict) -> dict:
        e = p['moe']['experts']
        parts = [*(e[name] for name in ('gate', 'up') if name in e), jnp.swapaxes(e['down'], -1, -2)]
        return p | {'moe': p['moe'] | {'experts': jnp.stack(parts, axis=-3)}}

    layers = base['layers']
    return base | {'layers': tuple(map(one, layers)) if isinstance(layers, (tuple, list)) else one(layers)}


def packed_shardings(cfg: ModelConfig, packed: dict, mesh: Mesh) -> dict:
    """A NamedSharding for every leaf of a packed tree {'base', ...}: as backbone.mesh has it, experts over `expert`."""
    found = shardings(cfg, packed, mesh)
    place = lambda path, leaf, sharding: NamedSharding(mesh, P(*(None,) * (leaf.ndim - 4), AXIS)) if (
        'experts' in map(_key, path)) else sharding
    return jax.tree_util.tree_map_with_path(place, packed, found)


def _key(entry: Any) -> str:
    return str(getattr(entry, 'key', getattr(entry, 'idx', entry)))


def matrices(packed: Array) -> dict[str, Array]:
    """One packed expert [3, d, f] -> {'gate', 'up' [d, f], 'down' [f, d]}."""
    gate = {'gate': packed[0]} if packed.shape[0] == 3 else {}
    return gate | {'up': packed[-2], 'down': packed[-1].T}


# --- gathering --------------------------------------------------------------------------------------------------


def _sum(mine: Array, me: Array, owner: Array, n: int) -> Array:
    """One all-reduce of what each device has, zeros elsewhere."""
    return jax.lax.psum(mine, AXIS)


def _scatter(mine: Array, me: Array, owner: Array, n: int) -> Array:
    """Its two halves apart: each device sums a part of the rows, then all parts are gathered."""
    if mine.shape[ROWS] % n:
        return _sum(mine, me, owner, n)
    return jax.lax.all_gather(jax.lax.psum_scatter(mine, AXIS, scatter_dimension=ROWS, tiled=True), AXIS,
                              axis=ROWS, tiled=True)


def _gather(mine: Array, me: Array, owner: Array, n: int) -> Array:
    """Everybody's slots to everybody, then the owner's are taken: n times the bytes."""
    return jax.lax.all_gather(mine, AXIS)[owner, jnp.arange(mine.shape[0])]


def _ring(mine: Array, me: Array, owner: Array, n: int) -> Array:
    """Handed on n - 1 times from neighbour to neighbour."""
    y = mine
    for _ in range(n - 1):
        y = jax.lax.ppermute(y, AXIS, [(i, (i + 1) % n) for i in range(n)])
        y = jnp.where((owner == me)[:, None, None, None], mine, y)
    return y


def _pieces(mine: Array, me: Array, owner: Array, n: int) -> Array:
    """As 'scatter', with n - 1 sends in the place of the sum: to each device its part of the rows. As few bytes, and of
    steps that the TPU compiler runs beside other work."""
    rows = mine.shape[ROWS] // n
    if mine.shape[ROWS] % n:
        return _gather(mine, me, owner, n)
    part = lambda j: jax.lax.dynamic_slice_in_dim(mine, ((me + j) % n) * rows, rows, ROWS)
    y = part(0)
    for j in range(1, n):
        y = y + jax.lax.ppermute(part(j), AXIS, [(i, (i + j) % n) for i in range(n)])
    return jax.lax.all_gather(y, AXIS, axis=ROWS, tiled=True)


FORMS = {'sum': _sum, 'scatter': _scatter, 'gather': _gather, 'ring': _ring, 'pieces': _pieces}


def fetch(experts: Array, ids: Array, form: str) -> Array:
    """Experts [E, 3, d, f] spread over `expert`, ids [n] the same everywhere -> [n, 3, d, f] on every device. Exact:
    each number is summed with zeros only, if with anything."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape[AXIS]
    if ways == 1:
        return experts[ids]

    def local(experts: Array, ids: Array) -> Array:
        me, own = jax.lax.axis_index(AXIS), experts.shape[0]
        owner = ids // own
        mine = experts[jnp.clip(ids - me * own, 0, own - 1)]
        return FORMS[form](jnp.where((owner == me)[:, None, None, None], mine, 0), me, owner, ways)

    return jax.shard_map(local, in_specs=(P(AXIS), P()), out_specs=P(), check_vma=False)(experts, ids)


def at_home(cfg: ModelConfig, experts: Array, x: Array, ids: Array, missed: Array) -> Array:
    """x [T, d], ids and missed [T, K] -> what each missed expert says, [T, K, d], run on the device it lives on; 0
    where it is not missed. No branch holds a collective: a TPU would have nothing else under way beside it."""
    mesh = jax.sharding.get_abstract_mesh()
    spread = not mesh.empty and mesh.shape[AXIS] > 1

    def local(experts: Array, x: Array, ids: Array, missed: Array) -> Array:
        own = experts.shape[0]
        first = jax.lax.axis_index(AXIS) * own if spread else 0

        def one(found: Array, e: Array) -> tuple[Array, None]:
            asks = missed & (ids == first + e)

            def run(found: Array) -> Array:
                y = moe.expert(cfg, matrices(experts[e]), x)
                return jnp.where(asks[..., None], y[:, None].astype(found.dtype), found)

            return jax.lax.cond(asks.any(), run, lambda found: found, found), None

        found = jax.lax.scan(one, jnp.zeros((*ids.shape, x.shape[-1]), x.dtype), jnp.arange(own))[0]
        return jax.lax.psum(found, AXIS) if spread else found

    if not spread:
        return local(experts, x, ids, missed)
    rows = P('data' if len(x) % mesh.shape['data'] == 0 else None)
    return jax.shard_map(local, in_specs=(P(AXIS), rows, rows, rows), out_specs=rows, check_vma=False)(
        experts, x, ids, missed)
