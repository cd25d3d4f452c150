"""Compiles what a config would run for hardware that is not here, and reads what the compiler says of it.

The real compiler does the work on a CPU host, nothing is allocated and nothing runs. So memory is what the program
will really be given; times are estimates: the compiler's own, and the least that the chip's data sheet allows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.errors import ConfigError
from backbone.mesh import AXES, make_mesh, shardings
from backbone.sampling import GREEDY
from harness import components, decode, roofline, topology
from harness.aot import Compiled, Program, compile_program
from harness.baselines import Autoregressive
from harness.train_step import StepPlan, plan

PROGRAMS = ('train', 'prefill', 'decode')
DRAFTING = ('draft', 'round')  # of a task whose Task.drafter (harness/artefacts.py) drafts


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    topology: str
    device: str
    chips: int
    mesh: dict[str, int]
    quick: bool
    programs: tuple[Compiled, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def rehearse(config: Any, topology_name: str, names: tuple[str, ...] = PROGRAMS, *, quick: bool = False,
             say: Callable = lambda _: None) -> Rehearsal:
    """Compiles the programs `names` of a training config for a topology.

    quick: the compiler tries less hard, several times faster; memory and collectives then differ somewhat from what
    a real run gets, and are rather worse.
    Errors: ConfigError (unknown topology, a mesh that is not its size, a batch that does not divide),
    CompilerMissing, and what the task raises.
    """
    unknown = [name for name in names if name not in PROGRAMS + DRAFTING]
    if unknown:
        raise ConfigError(f'unknown program {", ".join(unknown)}, one of {", ".join(PROGRAMS + DRAFTING)}')
    devices, chip = topology.get(topology_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        done = []
        for program in programs(config, devices, topology_name, names):
            say(f'compiling {program.name}: {program.what}')
            done.append(compile_program(program, chip, quick, lambda name=program.name: _with_room(
                config, topology_name, name)))
    notes = tuple(dict.fromkeys(str(w.message) for w in caught if 'replicated' in str(w.message)))
    mesh = whole_mesh(config.mesh, devices, topology_name, 'mesh')
    return Rehearsal(topology_name, chip.name, len(devices), dict(mesh.shape), quick, tuple(done), notes)


def whole_mesh(sizes: Any, devices: list[jax.Device], name: str, where: str) -> Mesh:
    """The mesh over all chips. Errors: ConfigError where its sizes do not multiply to their number."""
    axes = {axis: sizes.get(axis, 1) for axis in AXES}
    try:
        mesh = make_mesh(**axes, devices=devices)
    except ConfigError as error:
        raise ConfigError(f'{where} on {name}: {error}') from error
    if mesh.size != len(devices):
        raise ConfigError(f'{where} {axes} has {mesh.size} chips, {name} has {len(devices)}: set --config.{where}.data '
                          'and the other axes so that they multiply to it, or data=-1 for what the others leave')
    return mesh


# --- the programs ---------------------------------------------------------------------------------------------


def programs(config: Any, devices: list[jax.Device], name: str, names: tuple[str, ...]) -> Iterator[Program]:
    mesh = whole_mesh(config.mesh, devices, name, 'mesh')
    step = plan(config, mesh, load=False)
    rows, size = config.data.batch_size, config.data.seq_len
    if 'train' in names:
        needed = (step.task.train_flops(rows, size) if hasattr(step.task, 'train_flops') else
                  roofline.train_flops(step.task.cfg, rows, size))
        yield Program('train', f'{rows} x {size} tokens a step over {_words(mesh)}, {config.compute_dtype}', mesh,
                      lambda: step.step.lower(step.state, step.batch), needed, config.compute_dtype)
    if not hasattr(step.task, 'target') or not {'prefill', 'decode', *DRAFTING} & set(names):
        return
    # Serving has its own best mesh: nothing is gained by gathering weights for every token.
    serving = config.rehearse.get('mesh') or config.mesh
    where = 'rehearse.mesh' if config.rehearse.get('mesh') else 'mesh'
    mesh = whole_mesh(serving, devices, name, where)
    if mesh.shape['stage'] > 1 and not hasattr(step.task, 'staged'):
        raise ConfigError(f'{where}.stage {mesh.shape["stage"]}: {config.task.factory} has nothing that decodes on '
                          'stages')
    batch, prompt, context = (config.rehearse[key] for key in ('decode_batch', 'prompt', 'context'))
    if batch % mesh.shape['data']:
        raise ConfigError(f'rehearse.decode_batch {batch} is not a multiple of {where}.data {mesh.shape["data"]}')
    if not 0 < prompt <= context:
        raise ConfigError(f'rehearse.prompt {prompt} must be positive and at most rehearse.context {context}')
    context = min(context, step.task.cfg.max_seq_len)  # the defaults are for models that have the room
    prompt = min(prompt, context)
    serve = _Serving(step, mesh, batch, prompt, context, config.rehearse.get('unrolled', False))
    cfg = step.task.cfg
    flops = lambda **tokens: roofline.step_cost(cfg, batch=batch, dtype='bfloat16', **tokens).flops
    unread = 2 * batch * (prompt - 1) * (cfg.embed_size or cfg.hidden_size) * cfg.vocab_size  # logits of a prompt
    if 'prefill' in names:
        yield Program('prefill', f'{batch} prompts of {prompt} tokens over {_words(mesh)}, bfloat16', mesh,
                      serve.prefill, flops(k_tokens=prompt) - unread, 'bfloat16')
    if 'decode' in names:
        yield Program('decode', f'{batch} rows, one token each after {context} over {_words(mesh)}, bfloat16', mesh,
                      lambda: serve.decode(Autoregressive()), flops(k_tokens=1, context=context), 'bfloat16')
    if not {*DRAFTING} & set(names):
        return
    if not hasattr(step.task, 'drafter'):
        raise ConfigError(f'{config.task.factory} trains nothing that drafts: no {" or ".join(DRAFTING)} to compile')
    spec = step.task.drafter()
    drafter = components.build(spec['factory'], spec['kwargs'], {'cfg': cfg}, 'task.drafter')
    if 'draft' in names:
        yield Program('draft', f'{batch} rows, {drafter.block} drafts each over {_words(mesh)}, bfloat16', mesh,
                      lambda: serve.draft(drafter, spec['params']), 0.0, 'bfloat16')
    if 'round' in names:
        yield Program('round', f'{batch} rows, {drafter.block} drafts each and their verification after {context} over '
                      f'{_words(mesh)}, bfloat16', mesh, lambda: serve.decode(drafter, spec['params']),
                      flops(k_tokens=drafter.block + 1, context=context), 'bfloat16')


def _words(mesh: Mesh) -> str:
    return ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or 'one chip'


class _Serving:
    """The programs of harness/decode.py on shapes: bfloat16 parameters and cache, plain decoding.

    On a mesh of stages it is `task.staged` that decodes: a Target with `pack` and `shardings` of its own. unrolled:
    a plain model's layers one by one, as those of stages are, instead of a scan over them.
    """

    def __init__(self, step: StepPlan, mesh: Mesh, batch: int, prompt: int, context: int, unrolled: bool):
        cfg, self.mesh = step.task.cfg, mesh
        half = lambda a: jax.ShapeDtypeStruct(
            a.shape, jnp.bfloat16 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)
        params, spread = step.tree(step.state), lambda tree: shardings(cfg, tree, mesh)
        if mesh.shape['stage'] > 1:
            target = step.task.staged
            params, spread = jax.eval_shape(lambda p: target.pack(p, jnp.bfloat16), params), (
                lambda tree: target.shardings(tree, mesh))
        elif unrolled:
            target = dataclasses.replace(step.task.target, stacked=False)
            params = jax.eval_shape(lambda p: _unrolled(p, jnp.bfloat16), params)
        else:
            target, params = step.task.target, jax.tree.map(half, params)
        self.target = dataclasses.replace(target, cache_dtype='bfloat16')
        self.place = lambda tree: jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, spread(tree))
        self.params = self.place(params)
        self.context, self.prompt, self.dtype = context, prompt, jnp.dtype('bfloat16')
        self.rows = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
            (batch, *shape), dtype, sharding=NamedSharding(mesh, P('data')))
        self.alike = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, P())), tree)

    def cache(self, block: int) -> Any:
        batch = self.rows().shape[0]
        return self.place(jax.eval_shape(lambda: self.target.init_cache(batch, self.context, block)))

    def with_drafter(self, drafter: Any, name: str) -> Any:
        """The parameters with params[name], what the drafter reads, ready for decoding where that is another form."""
        if not hasattr(drafter, 'ready'):
            return self.params
        ready = jax.eval_shape(lambda part, base: drafter.ready(part, base, self.dtype),
                               self.params[name], self.params['base'])
        return self.place({'base': self.params['base'], name: ready})

    def prefill(self) -> Any:
        return decode.run_prompt.lower(self.target, (), self.params, self.rows(self.prompt), self.cache(0), self.rows())

    def draft(self, drafter: Any, name: str) -> Any:
        cache, rng = self.cache(drafter.block), self.alike(jax.eval_shape(lambda: jax.random.key(0)))
        state = self.alike(jax.eval_shape(lambda: drafter.init_state(cache.tokens.shape[0], self.context)))
        run = jax.jit(lambda params, cache, state, rng: drafter.draft(params, cache, state, rng, GREEDY)[0].tokens)
        return run.lower(self.with_drafter(drafter, name), cache, state, rng)

    def decode(self, drafter: Any, name: str = '') -> Any:
        params = self.with_drafter(drafter, name) if name else self.params
        cache = self.cache(drafter.block)
        counts = jax.ShapeDtypeStruct((drafter.block + 1,), jnp.int32)
        state = decode.DecodeState(
            cache, self.alike(jax.eval_shape(lambda: drafter.init_state(cache.tokens.shape[0], self.context))),
            self.alike(jax.eval_shape(lambda: jax.random.key(0))), self.rows(), self.rows(dtype=jnp.bool_), self.rows(),
            self.alike(counts), self.alike(counts))
        return decode.decode_one.lower(self.target, drafter, params, state, sampling=GREEDY, stops=())


def _unrolled(params: dict, dtype: Any) -> dict:
    """A plain model's parameters with a tuple of layers, matrices in `dtype`, vectors in float32."""
    layers = params['base']['layers']
    depth = jax.tree.leaves(layers)[0].shape[0]
    base = params['base'] | {'layers': tuple(jax.tree.map(lambda a: a[k], layers) for k in range(depth))}
    return {'base': jax.tree.map(lambda a: a.astype(dtype if a.ndim > 1 else jnp.float32), base)}


def _with_room(config: Any, name: str, program: str) -> Program | None:
    """The same for the same arrangement of the TPU with the most memory, v5p; None where that is not to be had."""
    kind, _, shape = name.partition(':')
    if kind not in ('v5e', 'v6e'):
        return None
    try:
        devices, _ = topology.get(f'v5p:{shape}x1')
    except ConfigError:
        return None
    return next(programs(config, devices, name, (program,)), None)
