"""Stacks as stages: decoding and training on a 'stage' axis are those of one device, and little travels."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone import cache as caches
from backbone.errors import ConfigError
from backbone.mesh import make_mesh, shardings
from harness import hlo, hlo_costs, metrics
from harness.baselines import PromptLookup
from harness.decode import generate
from stagformer import model, pipeline, pipeline_training
from stagformer.config import StagFormerConfig
from stagformer.pipeline import StagedTarget
from stagformer.target import StagFormerTarget
from stagformer.task import StagFormerTask
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
ROOT = pathlib.Path(__file__).parents[2]
V, D, B = 96, 32, 4


def make(stacks, depth=1, **options):
    layers = depth if options.get('shared') else stacks * depth
    cfg = StagFormerConfig.even(tiny_config(vocab=V, hidden=D, layers=layers), stacks, **options)
    like, rng = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0))), np.random.default_rng(0)

    def one(path, a):
        noise = rng.standard_normal(a.shape, np.float32)
        kernel = path[-1].key in ('kernel', 'tokens')
        return jnp.asarray(1.2 * noise / a.shape[-2] ** 0.5 if kernel else 1 + 0.2 * noise)

    return cfg, jax.tree_util.tree_map_with_path(one, like)


def placed(target, params, mesh):
    packed = jax.jit(target.pack)(params)
    return jax.device_put(packed, target.shardings(packed, mesh))


# --- decoding ---------------------------------------------------------------------------------------------------------

# stacks, options of the model, of the target, of the mesh
CASES = {
    'two': (2, {}, {'piece': 4, 'head': 'split'}, {}),
    'four_mapped': (4, {'window': 3, 'mix': True}, {'way': 'shard_map', 'piece': 4}, {}),
    'two_of_shared': (2, {'shared': True}, {}, {'data': 2, 'model': 2}),
    'two_mapped': (2, {'context_norm': False, 'depth': 2}, {'way': 'shard_map', 'head': 'split'}, {}),
    'four': (4, {'mix': True, 'cross_rope': False}, {'piece': 3, 'head': 'split'}, {'model': 2}),
    'two_wide': (2, {'window': 1, 'cross_kv_heads': 1}, {'piece': 6}, {'data': 4}),
    'two_deep_of_shared': (2, {'shared': True, 'window': 3, 'depth': 2}, {'piece': 4}, {'data': 2}),
}
QUICK = ('two', 'four_mapped', 'two_of_shared')


@pytest.mark.parametrize('case', [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in QUICK)])
def test_stages_decode_what_one_device_does(case):
    """Uneven prompts, then tokens one by one, and with a window a block of which half is rejected: the logits of whole
    sequences at once."""
    stacks, options, way, axes = CASES[case]
    cfg, params = make(stacks, **options)
    tokens = np.random.default_rng(0).integers(0, V, (B, 24))
    lengths = np.array([12, 3, 7, 1])
    rows = np.zeros((B, 17), int)
    for row, t, n in zip(rows, tokens, lengths, strict=True):
        row[:n + 5] = np.concatenate([t[:n], t[12:17]])
    whole = np.asarray(jax.jit(lambda p, t: model.forward(cfg, p, t))(params, rows))
    wanted = np.stack([logits[n - 1:n + 5] for logits, n in zip(whole, lengths, strict=True)])  # [B, 6, V]

    with jax.set_mesh(mesh := make_mesh(stage=stacks, **axes)):
        target = StagedTarget(cfg, **way)
        packed, cache = placed(target, params, mesh), target.init_cache(B, 40, 3)
        prompt = jax.jit(lambda p, c, t, n: target.forward(p, t, c, logits_at=n - 1))
        block = jax.jit(lambda p, c, t: target.forward(p, t, c))
        found = prompt(packed, cache, tokens[:, :12], lengths)
        seen, cache = [found.logits], caches.commit(found.cache, lengths - 1, tokens[:, 12])
        wrong = (tokens[:, 15:17] + 1) % V
        plan = [(12, 1, 1), (13, 4, 2), (15, 1, 1), (16, 1, 1)] if cfg.window else [(i, 1, 1) for i in range(12, 17)]
        for first, size, kept in plan:
            fed = tokens[:, first:first + kept]
            found = block(packed, cache, np.concatenate([fed, wrong], 1) if size > 1 else fed)
            seen.append(found.logits[:, :kept])
            cache = caches.commit(found.cache, np.full(B, kept - 1), tokens[:, first + kept])
    np.testing.assert_allclose(np.concatenate(seen, 1), wanted, atol=1e-5, rtol=1e-5)


def test_the_harness_generates_on_stages():
    cfg, params = make(2)
    prompts, drafter = [[1, 2, 3, 1, 2], [7]], PromptLookup(2)
    run = lambda target, p: generate(target, drafter, p, prompts, max_new_tokens=8).tokens
    one, mesh = run(StagFormerTarget(cfg), params), make_mesh(stage=2)
    with jax.set_mesh(mesh):
        target = StagedTarget(cfg, piece=8)
        assert run(target, placed(target, params, mesh)) == one


def talk(target, params, mesh, spread=lambda tree: tree):
    """Kinds and bytes of everything that travels in one greedy step."""
    with jax.set_mesh(mesh):
        packed = spread(placed(target, params, mesh))
        cache = target.init_cache(B, 16, 0)
        program = jax.jit(lambda p, c: pipeline.greedy_step(target, p, c)).lower(packed, cache).compile()
    found = hlo_costs.collectives(hlo.parse(program.as_text()))
    return sorted((c.kind, c.payload) for c in found for _ in range(c.count))


@pytest.mark.parametrize('way', pipeline.WAYS)
@pytest.mark.parametrize(('stacks', 'head'), [(2, 'whole'), (4, 'split')])
def test_what_travels_in_a_step(way, stacks, head):
    """A residual a stage up, a residual to all; with the head split, also everyone's best word."""
    cfg, params = make(stacks)
    row = B * D * 4
    more = [('all-reduce', stacks * 2 * B * 4)] if head == 'split' else []
    wanted = sorted([('all-reduce', row), ('collective-permute', row), *more])
    assert talk(StagedTarget(cfg, way=way, head=head), params, make_mesh(stage=stacks)) == wanted


def test_weights_that_lie_elsewhere_would_be_seen_to_travel():
    """The control: one kernel of every layer cut over the stages instead of lying on its own."""
    cfg, params = make(2)
    mesh = make_mesh(stage=2)

    def spread(tree):
        for layer in tree['base']['layers']:
            layer['mlp']['down']['kernel'] = jax.device_put(layer['mlp']['down']['kernel'],
                                                            NamedSharding(mesh, P(None, None, 'stage')))
        return tree

    assert len(talk(StagedTarget(cfg), params, mesh, spread)) > 2


def test_best_word_of_parts_is_the_first_of_equals():
    """As argmax has it, over the parts of the model axis and of the stages."""
    logits = np.random.default_rng(0).standard_normal((B, V)).astype(np.float32)
    logits[0, [5, 70]] = logits[1, [30, 31]] = 9
    logits[2] = -np.inf
    logits[2, 60] = -1e9
    with jax.set_mesh(make_mesh(stage=2, model=2)):
        got = jax.jit(pipeline.best_of_parts)(logits)
    np.testing.assert_array_equal(got, logits.argmax(-1))


def test_bad_input_is_named():
    cfg, params = make(2)
    with pytest.raises(ConfigError, match='lag must be 1'):
        StagedTarget(make(2, lag=0)[0])
    with pytest.raises(ConfigError, match='equal depth'):
        StagedTarget(StagFormerConfig(tiny_config(layers=3), (2, 1)))
    with pytest.raises(ConfigError, match='way: unknown'):
        StagedTarget(cfg, way='pmap')
    with pytest.raises(ConfigError, match='head: unknown'):
        StagedTarget(cfg, head='third')
    target = StagedTarget(cfg)
    with pytest.raises(ConfigError, match='longer than the context'):
        target.init_cache(1, 97, 0)
    packed, cache = jax.jit(target.pack)(params), target.init_cache(1, 8, 0)
    run = lambda target: target.forward(packed, jnp.zeros((1, 1), jnp.int32), cache)
    with pytest.raises(ConfigError, match='stage=2 in force .*got none'):
        run(target)
    with jax.set_mesh(make_mesh(stage=4)), pytest.raises(ConfigError, match='got stage=4'):
        run(target)
    with jax.set_mesh(make_mesh(stage=2, model=2)), pytest.raises(ConfigError, match='takes a mesh of stages only'):
        run(StagedTarget(cfg, way='shard_map'))
    with pytest.raises(ConfigError, match='no resume'):
        target.forward(packed, jnp.zeros((1, 1), jnp.int32), cache, taps=('hidden:0',))


# --- training ---------------------------------------------------------------------------------------------------------

# stacks, options of the model, microbatches, the mesh
TRAINED = {
    'two': (2, {'depth': 2}, 4, {'stage': 2, 'data': 2}),
    'four_of_shared': (4, {'shared': True, 'window': 2, 'mix': True}, 2, {'stage': 4}),
    'four': (4, {'mix': True}, 8, {'stage': 4, 'model': 2}),
    'two_at_once': (2, {'context_norm': False, 'window': 1}, 1, {'stage': 2}),
    'no_stages': (2, {}, 4, {'data': 2}),
}
QUICK_TRAINED = ('two',)


@pytest.mark.parametrize('case', [*QUICK_TRAINED, *(pytest.param(c, marks=pytest.mark.slow) for c in TRAINED
                                                    if c not in QUICK_TRAINED)])
def test_stages_train_as_one_device(case):
    """Loss and gradients, with packed documents and padding."""
    stacks, options, micro, axes = TRAINED[case]
    cfg, params = make(stacks, **options)
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 4, (8, 10)))
    batch = {'tokens': rng.integers(0, V, (8, 10)), 'targets': rng.integers(0, V, (8, 10)), 'segments': segments,
             'positions': np.stack([np.concatenate([np.arange((s == i).sum()) for i in (1, 2, 3)]) for s in segments]),
             'weights': (rng.random((8, 10)) < 0.8).astype(np.float32)}

    def step(task):
        return jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, b, jax.random.key(0))[0]))

    loss, grads = step(StagFormerTask(cfg))(params, batch)
    task, mesh = StagFormerTask(cfg, microbatches=micro, remat='full'), make_mesh(**axes)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings(cfg.base, params, mesh, fsdp=True))
        rows = jax.device_put(batch, NamedSharding(mesh, P('data')))
        program = step(task).lower(spread, rows).compile()
        theirs, found = program(spread, rows)
    assert float(theirs) == pytest.approx(float(loss), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, grads)
    travels = {c.kind for c in hlo_costs.collectives(hlo.parse(program.as_text()))}
    assert ('collective-permute' in travels) or axes.get('stage', 1) == 1
    if axes.get('stage', 1) > 1 and not cfg.shared:  # each stage holds its own layers
        assert spread['base']['layers']['mlp']['up']['kernel'].sharding.spec[0] == 'stage'


def test_bad_input_in_training_is_named():
    cfg, params = make(2)
    tokens = jnp.zeros((6, 4), jnp.int32)
    with pytest.raises(ConfigError, match='microbatches must be at least 1'):
        StagFormerTask(cfg, microbatches=-1)
    with pytest.raises(ConfigError, match='lag must be 1'):
        StagFormerTask(make(2, lag=0)[0], microbatches=2)
    with pytest.raises(ConfigError, match='6 rows are not 4 microbatches'):
        pipeline_training.final_outputs(cfg, params, tokens, 4)
    with jax.set_mesh(make_mesh(stage=4)), pytest.raises(ConfigError, match='stage=2 or 1, got 4'):
        pipeline_training.final_outputs(cfg, params, tokens, 2)


@pytest.mark.slow
def test_two_processes_train_a_stage_each(tmp_path):
    """Each of two processes holds one stage; their losses are those of one process without stages."""
    pages = (f'  <page>\n    <title>{i}</title>\n{"river stone layer " * (5 + i % 9)}\n  </page>\n' for i in range(200))
    (tmp_path / 'enwik8').write_text('<mediawiki>\n' + ''.join(pages))
    (tmp_path / 'config.py').write_text('from configs import stagformer\n\n\ndef get_config(micro):\n'
                                        "    config = stagformer.get_config('toy/separate')\n"
                                        '    config.task.kwargs.microbatches = int(micro)\n    return config\n')
    changes = {'dataset': 'enwik8', 'manual_dir': tmp_path, 'data_dir': tmp_path / 'store', 'seq_len': 32,
               'batch_size': 8}
    flags = ['--config.num_steps=6', '--config.log_every=2',
             *(f'--config.data.{key}={value}' for key, value in changes.items())]

    def start(name, micro, *more):
        return subprocess.Popen(
            [sys.executable, '-m', 'harness.launch.train', f'--config={tmp_path}/config.py:{micro}', *flags,
             f'--workdir={tmp_path / name}', *more], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})

    def finish(*processes):
        said = [process.communicate(timeout=400) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), said

    finish(start('one', 0))
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    finish(*(start('two', 4, '--config.mesh.stage=2', '--num_processes=2', f'--coordinator=localhost:{port}',
                   f'--process_id={i}') for i in range(2)))
    losses = lambda name: {(row['step'], row['kind']): row['loss'] for row in metrics.rows(tmp_path / name)
                           if row['kind'] != 'event'}
    assert losses('two') == pytest.approx(losses('one'), abs=1e-5) and len(losses('one')) >= 3
