"""One training step for every task: a jitted function of (state, batch), planned before anything is allocated.

`plan` gives shapes and shardings of state and batch and the jitted functions; `headway-rehearse` compiles the same
plan for hardware that is not here. Parameters are flat, {'base/layers/attn/q/kernel': array}, split into what the
task trains and what stays frozen: a frozen leaf has no gradient and no optimiser state.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.errors import CheckpointMismatch, ConfigError, TensorMismatch
from backbone.formats.tensors import flatten, params_hash, unflatten
from backbone.mesh import AXES, make_mesh, shardings
from harness import components, optimizer

Array = jax.Array
BATCH_KEYS = {'tokens': jnp.int32, 'targets': jnp.int32, 'segments': jnp.int32, 'positions': jnp.int32,
              'weights': jnp.float32}


@struct.dataclass
class TrainState:
    """Everything a run is. params, frozen, ema: flat dicts; ema is empty where there is none.

    step: steps done. rng [2] uint32: key data, folded with the step and never advanced. bad_steps: non-finite ones
    in a row.
    """

    step: Array
    params: dict[str, Array]
    frozen: dict[str, Array]
    opt_state: Any
    ema: dict[str, Array]
    rng: Array
    bad_steps: Array


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """init(rng) -> TrainState; step(state, batch) -> (state, metrics), the state donated; evaluate(params, batch) ->
    metrics. state, batch: trees of ShapeDtypeStruct with shardings. Call all of them under `jax.set_mesh(mesh)`.
    frozen_hash: params_hash of the frozen leaves that came from files ('' where none did)."""

    task: Any
    mesh: Mesh
    init: Callable[[], TrainState]
    step: Callable
    evaluate: Callable
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen_hash: str

    def tree(self, state: TrainState, ema: bool = True) -> dict:
        """The whole parameter tree a task takes; with `ema`, the averaged leaves where there are any."""
        return unflatten(state.frozen | (state.ema if ema and state.ema else state.params))


def plan(config: Any, mesh: Mesh | None = None, task: Any = None, load: bool = True) -> StepPlan:
    """Errors: ConfigError for sizes that do not divide and patterns that match nothing; what the task raises.

    mesh: default, this process group's devices in the shape of config.mesh. load: False leaves out what the task
    reads from files (`task.load`), for looking at shapes only.
    """
    mesh = build_mesh(config) if mesh is None else mesh
    task = build_task(config) if task is None else task
    rows, micro = config.data.batch_size, config.optimizer.accumulate
    if rows % (micro * mesh.shape['data']):
        raise ConfigError(f'data.batch_size {rows} is not a multiple of mesh.data {mesh.shape["data"]} x '
                          f'optimizer.accumulate {micro}')
    transform = optimizer.make(config.optimizer)
    loaded = flatten(task.load()) if load and hasattr(task, 'load') else {}
    if load and config.get('start'):
        loaded |= trained_before(config.start, task.trainable)

    def init(rng: Array, loaded: dict[str, Array]) -> TrainState:
        leaves = flatten(task.init(jax.random.wrap_key_data(rng))) | loaded
        params, frozen = split(leaves, task.trainable)
        ema = dict(params) if config.ema_decay else {}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, frozen, transform.init(params), ema, rng, zero)

    key = jax.random.key_data(jax.random.key(config.seed))
    abstract = jax.eval_shape(init, key, loaded)
    check_loaded(jax.eval_shape(lambda: flatten(task.init(jax.random.key(0)))), loaded)
    place = shardings(task.cfg, abstract, mesh, config.mesh.fsdp)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, place)
    by_row = NamedSharding(mesh, P('data'))
    shape = (rows, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_row) for name, dtype in BATCH_KEYS.items()}
    if getattr(task, 'cached', False):  # harness/data/features.py
        base = unflatten(abstract.params | abstract.frozen)['base']
        batch |= {name: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=by_row)
                  for name, a in jax.eval_shape(task.features, base, batch).items()}
    everywhere, dtype = NamedSharding(mesh, P()), jnp.dtype(config.compute_dtype)

    def start() -> TrainState:
        values = {path: jax.device_put(a, (place.params | place.frozen)[path]) for path, a in loaded.items()}
        return jax.jit(init, out_shardings=place)(key, values)

    frozen = {path: a for path, a in loaded.items() if path in abstract.frozen}
    return StepPlan(
        task, mesh, start,
        jax.jit(step_function(config, task, transform), donate_argnums=0, out_shardings=(place, everywhere)),
        jax.jit(lambda params, batch: with_loss(task.loss(narrow(params, dtype), batch, jax.random.key(0))),
                out_shardings=everywhere),
        state, batch, params_hash(frozen) if frozen else '')


def build_mesh(config: Any) -> Mesh:
    """This process group's devices in the shape of config.mesh."""
    return make_mesh(**{axis: config.mesh[axis] for axis in AXES})


def build_task(config: Any) -> Any:
    """The task a config names."""
    kwargs = config.task.kwargs
    return components.build(config.task.factory, kwargs.to_dict() if hasattr(kwargs, 'to_dict') else kwargs, {}, 'task')


def split(leaves: Mapping[str, Any], trainable: tuple[str, ...]) -> tuple[dict, dict]:
    """(trained, frozen) by regexes that must fully match a path. Errors: ConfigError for one that matches none."""
    idle = [p for p in trainable if not any(re.fullmatch(p, path) for path in leaves)]
    if idle or not trainable:
        raise ConfigError(f'trainable: {", ".join(map(repr, idle)) or "no pattern"} matches no parameter')
    chosen = {path for path in leaves if any(re.fullmatch(p, path) for p in trainable)}
    return ({path: a for path, a in leaves.items() if path in chosen},
            {path: a for path, a in leaves.items() if path not in chosen})


def trained_before(folder: str, trainable: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What another run trained and this one trains on: the newest checkpoint of its directory, averaged where it is.

    Errors: those of checkpoint.read_part.
    """
    from harness import checkpoint
    try:
        leaves = checkpoint.read_part(Path(folder) / 'checkpoints', 'ema')[1]
    except CheckpointMismatch:
        leaves = {}
    return split(leaves or checkpoint.read_part(Path(folder) / 'checkpoints', 'params')[1], trainable)[0]


def check_loaded(expected: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    wrong = [f'{path} {tuple(a.shape)}' + (f', not {expected[path].shape}' if path in expected else '')
             for path, a in loaded.items() if path not in expected or expected[path].shape != tuple(a.shape)]
    if wrong:
        raise TensorMismatch(f'what the task loads does not fit its model: {"; ".join(wrong[:5])}')


def narrow(tree: Any, dtype: Any) -> Any:
    """Floating leaves in the type the products run in."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def with_loss(found: tuple[Array, dict[str, Array]]) -> dict[str, Array]:
    return {'loss': found[0], 'weight': jnp.ones(())} | found[1]


def step_function(config: Any, task: Any, transform: optax.GradientTransformation) -> Callable:
    """(state, batch) -> (state, metrics). A step whose loss or gradient is not finite changes no parameter."""
    rate = optimizer.learning_rate(config.optimizer, config.num_steps)
    micro, decay = config.optimizer.accumulate, config.ema_decay
    dtype = jnp.dtype(config.compute_dtype)

    by_step = getattr(task, 'by_step', False)

    def loss(params: dict, frozen: dict, batch: dict, rng: Array):
        # Cast first: under FSDP the shards then travel in the narrow type.
        found = task.loss(unflatten(narrow(params | frozen, dtype)), batch, rng)
        return found[0], with_loss(found)

    def gradients(state: TrainState, batch: dict, rng: Array):
        def of(part: dict, key: Array):
            part = part | {'step': state.step} if by_step else part
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, part, key)
            return grads, metrics

        if micro == 1:
            return of(batch, rng)

        def add(total, item):
            found = of(*item)
            weight = found[1]['weight']
            scaled = jax.tree.map(lambda a: a * weight, (found[0], found[1] | {'weight': jnp.ones(())}))
            return jax.tree.map(jnp.add, total, scaled), None

        # Rows a, a + micro, ... make a microbatch: each device keeps its own rows.
        parts = jax.tree.map(lambda a: a.reshape(-1, micro, *a.shape[1:]).swapaxes(0, 1), batch)
        shapes = jax.eval_shape(of, jax.tree.map(lambda a: a[0], parts), rng)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add, zeros, (parts, jax.random.split(rng, micro)))
        total = metrics.pop('weight')
        mean = jax.tree.map(lambda a: a / jnp.maximum(total, 1e-9), (grads, metrics))
        return mean[0], mean[1] | {'weight': total}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, metrics = gradients(state, batch, rng)
        norm = optax.global_norm(grads)
        fine = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        step_size = rate(state.step)
        params = jax.tree.map(lambda p, u: p - step_size * u, state.params, updates)
        ema = optimizer.average(state.ema, params, decay) if state.ema else state.ema
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
        state = state.replace(
            step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema), bad_steps=jnp.where(fine, 0, state.bad_steps + 1))
        return state, metrics | {'grad_norm': norm, 'learning_rate': jnp.asarray(step_size, jnp.float32),
                                 'bad_steps': state.bad_steps}

    return step


def place_batch(batch: Mapping[str, np.ndarray], structs: Mapping[str, jax.ShapeDtypeStruct], first: int) -> dict:
    """Host rows first.. of the global batch -> global arrays; each device takes the rows that are its own."""
    def one(name: str, like: jax.ShapeDtypeStruct) -> Array:
        def mine(index):
            rows = index[0].indices(like.shape[0])
            return batch[name][rows[0] - first:rows[1] - first].astype(like.dtype, copy=False)
        return jax.make_array_from_callback(like.shape, like.sharding, mine)
    return {name: one(name, like) for name, like in structs.items()}


def host_rows(struct: jax.ShapeDtypeStruct) -> slice:
    """The rows of the global batch this process's devices need."""
    spans = [index[0].indices(struct.shape[0]) for index in
             struct.sharding.addressable_devices_indices_map(struct.shape).values()]
    return slice(min(s[0] for s in spans), max(s[1] for s in spans))
