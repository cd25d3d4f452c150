"""The only place that makes a mesh, and the table from parameter paths to mesh axes.

Parameter path -> logical axes -> mesh axes. Modules know nothing of it. Every mesh has the axes
('stage', 'data', 'expert', 'model'), all of type Auto: stock Linen layers fail under Explicit ones.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.config import ModelConfig
from backbone.errors import ConfigError

AXES = ('stage', 'data', 'expert', 'model')

# '/'-joined path (of a stacked or unstacked tree) -> logical axes of the trailing dimensions.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'.*embed/tokens', ('vocab', 'embed')),
    (r'.*embed/positions', (None, 'embed')),
    (r'.*embed/project_(in|out)/kernel', (None, None)),
    (r'.*attn/q/kernel', ('embed', 'heads')),
    (r'.*attn/[kv]/kernel', ('embed', 'kv_heads')),
    (r'.*attn/o/kernel', ('heads', 'embed')),
    (r'.*attn/q/bias', ('heads',)),
    (r'.*attn/[kv]/bias', ('kv_heads',)),
    (r'.*mlp/(gate|up)/kernel', ('embed', 'mlp')),
    (r'.*mlp/down/kernel', ('mlp', 'embed')),
    (r'.*mlp/(gate|up)/bias', ('mlp',)),
    (r'.*moe/experts/(gate|up)', ('expert', 'embed', 'mlp')),
    (r'.*moe/experts/down', ('expert', 'mlp', 'embed')),
    (r'.*moe/shared/(gate|up)/kernel', ('embed', 'mlp')),
    (r'.*moe/shared/down/kernel', ('mlp', 'embed')),
    (r'.*lm_head/kernel', ('embed', 'vocab')),
    # A CP head (tensorhead/head.py): factors [n, r, d, words or d].
    (r'.*tensorhead/gate/kernel', (None, 'component')),
    (r'.*tensorhead/gate/bias', ('component',)),
    (r'.*tensorhead/factors/kernel', (None, 'component', 'embed', 'vocab')),
    (r'.*tensorhead/factors/bias', (None, 'component', None)),
    (r'.*tensorhead/factors/down', (None, 'component', 'embed', None)),
    (r'.*tensorhead/factors/up', (None, 'component', None, 'embed')),
    # The same as it decodes (tensorhead/packed.py): factors [n, r, out, in], whose rows become one axis in the product,
    # so what is contracted is split; and the words' rows of the unembedding.
    (r'.*tensorhead/(first|later)/(kernel_t|down_t)', (None, 'component', None, 'mlp')),
    (r'.*tensorhead/(first|later)/up', (None, 'component', 'mlp', None)),
    (r'.*tensorhead/unembed', ('vocab', 'embed')),
    # The cross-attention of stacks (stagformer/model.py), and as it decodes on stages (stagformer/layout.py).
    (r'.*cross/(\d+/)?q/kernel', ('embed', 'heads')),
    (r'.*cross/(\d+/)?[kv]/kernel', ('embed', 'kv_heads')),
    (r'.*cross/(\d+/)?o/kernel', ('heads', 'embed')),
    (r'.*publish/kernel', ('embed', None, 'kv_heads')),
    # Recurrent mixers (backbone/mamba2.py). The columns of in_proj are of five kinds and are cut anywhere.
    (r'.*mixers/(\d+/)?in_proj/kernel', ('embed', 'mlp')),
    (r'.*mixers/(\d+/)?out_proj/kernel', ('heads', 'embed')),
    # The cache.
    (r'.*layers/((self|cross|kv|\d+)/)*(k|v)', ('batch', 'kv_heads', None, None)),
    (r'.*layers/((ssm|\d+)/)*state', ('batch', 'heads', None, None)),
    (r'.*layers/((ssm|\d+)/)*log/(x|B)', ('batch', None, 'kv_heads', None)),
    (r'.*layers/((ssm|\d+)/)*log/(dt|la)', ('batch', None, 'heads')),
    (r'.*layers/((ssm|\d+)/)*(tail|log/conv)', ('batch', None, None)),
    (r'.*layers/((ssm|\d+)/)*at', ('batch',)),
    (r'.*', ()),
)

# A plain model's stacked layers: neighbours in depth lie on the same stage, where there are stages.
_STACKED = r'(.*/)?base/layers/(?!\d+/).*'

MESH_AXIS = {'vocab': 'model', 'heads': 'model', 'kv_heads': 'model', 'mlp': 'model', 'batch': 'data',
             'expert': 'expert', 'component': 'expert', 'layer': 'stage'}


def make_mesh(stage: int = 1, data: int = 1, expert: int = 1, model: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of stage*data*expert*model devices; data=-1 takes what the others leave of the devices.

    Errors: ConfigError when there are fewer, or when the others do not divide them.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data == -1 and min(rest := (stage, expert, model)) >= 1:
        data, left = divmod(len(devices), math.prod(rest))
        if left:
            raise ConfigError(f'mesh.data=-1: stage {stage} x expert {expert} x model {model} does not divide '
                              f'{len(devices)} devices')
    shape = (stage, data, expert, model)
    needed = math.prod(shape)
    if min(shape) < 1 or needed > len(devices):
        raise ConfigError(f'mesh {dict(zip(AXES, shape, strict=True))} needs {needed} devices, {len(devices)} are here')
    if devices[0].platform == 'tpu' and needed == len(devices):
        # Axes along the dimensions of the torus: neighbours in the mesh are neighbours on the wire.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices[:needed]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(cfg: ModelConfig, tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """A NamedSharding for every leaf of a parameter tree or cache (arrays or shape structs).

    fsdp: also split the 'embed' axis over `data`. What an axis does not divide is replicated, with one warning for
    each such axis and number.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(cfg, tree, mesh, fsdp))


def specs(cfg: ModelConfig, tree: Any, mesh: Mesh | AbstractMesh, fsdp: bool = False,
          also: Callable[[str, P], P] = lambda path, spec: spec) -> Any:
    """The same as PartitionSpecs, one entry a dimension. also: the last word on a leaf, by its '/'-joined path."""
    undivided: dict[tuple, str] = {}

    def one(path, leaf):
        name = '/'.join(_key(k) for k in path)
        axes = next(axes for pattern, axes in RULES if re.fullmatch(pattern, name))
        axes = (None,) * (len(leaf.shape) - len(axes)) + tuple(axes)
        if re.fullmatch(_STACKED, name) and leaf.shape[0] % mesh.shape['stage'] == 0:
            axes = ('layer', *axes[1:])
        places = [_place(cfg, mesh, axis, size, fsdp) for axis, size in zip(axes, leaf.shape, strict=True)]
        for units, axis, target in [p for p in places if isinstance(p, tuple)]:
            undivided.setdefault((units, axis, target), name)
        return also(name, P(*(p if isinstance(p, str) else None for p in places)))

    placed = jax.tree_util.tree_map_with_path(one, tree)
    for (units, axis, target), name in undivided.items():
        warnings.warn(f'{name}: {units} {axis} are not divided by {target}={mesh.shape[target]}; replicated',
                      stacklevel=2)
    return placed


def _key(entry: Any) -> str:
    return str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry))))


def _place(cfg: ModelConfig, mesh: Mesh, axis: str | None, size: int, fsdp: bool) -> str | tuple | None:
    """A mesh axis, None, or (units, axis, mesh axis) of one that does not divide."""
    target = 'data' if axis == 'embed' and fsdp else MESH_AXIS.get(axis or '')
    if target is None or mesh.shape[target] == 1:
        return None
    # A head is not cut in two: count heads, not columns.
    units = {'heads': cfg.attention.num_heads, 'kv_heads': cfg.attention.num_kv_heads}.get(axis, size)
    whole = units % mesh.shape[target] == 0 and size % mesh.shape[target] == 0  # a mixer may have other heads
    return target if whole else (units, axis, target)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh in force (`jax.set_mesh`); outside of one, x itself.

    axes: a logical axis of MESH_AXIS for each dimension of x, or None. What an axis does not divide is left free.
    Without the pin on the batch axis the partitioner may follow the sharded weights instead and gather activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    def place(axis: str | None, size: int) -> str | None:
        target = MESH_AXIS.get(axis or '')
        return target if target is not None and size % mesh.shape[target] == 0 else None

    return jax.lax.with_sharding_constraint(x, P(*map(place, axes, x.shape)))


def ways(axis: str, size: int) -> int:
    """Into how many pieces the mesh in force cuts a logical axis of `size`; 1 outside of one, or where it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    pieces = 1 if mesh.empty else mesh.shape[MESH_AXIS[axis]]
    return pieces if size % pieces == 0 else 1


def start_processes(coordinator: str | None = None, num_processes: int | None = None,
                    process_id: int | None = None) -> None:
    """Multi-process start: TPU pods, Slurm and Open MPI are detected by JAX; else give all three."""
    jax.distributed.initialize(coordinator, num_processes, process_id)
