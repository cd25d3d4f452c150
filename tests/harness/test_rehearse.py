"""Rehearsals with the real TPU compiler: every pod config, what is expected of it, and what must be refused."""

import importlib
import json
import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.config import ModelConfig
from backbone.errors import CompilerMissing, ConfigError
from backbone.formats.tensors import flatten
from configs import training
from harness import aot, rehearse, rehearse_report, roofline, topology
from harness.train_step import build_task, split

ROOT = pathlib.Path(__file__).parents[2]
PODS = sorted(path.stem for path in (ROOT / 'configs').glob('pod_*.py'))


@pytest.fixture(scope='module')
def compiler():
    try:
        topology.get('v5e:2x2')
    except CompilerMissing as error:
        pytest.skip(str(error))


def cut(name: str):
    """A pod config for 2x2 chips: two layers, a row a chip, everything else as it is."""
    config = importlib.import_module(f'configs.{name}').get_config()
    config.task.kwargs.overrides.num_layers = 2
    config.data.update({'batch_size': 4 * config.optimizer.accumulate, 'seq_len': 1024})
    config.mesh.data = -1
    stages = (config.rehearse.get('mesh') or {}).get('stage', 1)
    config.rehearse.update({'decode_batch': 4, 'mesh': {'stage': stages, 'data': 1, 'model': 4 // stages}})
    return config.lock()


def tiny(**mesh):
    config = training.defaults()
    config.task.kwargs.update({'model': training.llama(vocab=512, hidden=256, layers=2, heads=4, kv_heads=4,
                                                       intermediate=512, max_seq_len=256)})
    config.data.update({'batch_size': 8, 'seq_len': 128})
    config.compute_dtype = 'bfloat16'
    config.mesh.update(mesh)
    config.rehearse.update({'decode_batch': 8, 'prompt': 64, 'context': 128})
    return config


# pod_llama32_1b: the same programs as pod_llama31_8b, smaller.
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name == 'pod_llama32_1b' else name for name in PODS])
def test_pod_configs_compile_and_fit(compiler, name):
    """Cut to two layers, with the compiler not at its best: seconds, where the whole takes minutes."""
    check_pod(cut(name), quick=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', PODS)
def test_pod_configs_with_the_compiler_at_its_best(compiler, name):
    check_pod(cut(name), quick=False)


def check_pod(config, quick):
    task = build_task(config)
    drafts = hasattr(task, 'drafter')  # on a trunk whose own programs are another config's
    result = rehearse.rehearse(config, 'v5e:2x2', ('train', 'draft') if drafts else rehearse.PROGRAMS, quick=quick)
    assert result.fits and result.chips == 4 and result.mesh['data'] == 4
    train, *serving = result.programs
    for program in result.programs:
        assert program.trips_known and program.collectives and not program.refusal
        assert program.peak_bytes < program.usable_bytes
    kinds = {c.kind for c in train.collectives}
    # FSDP gathers weights and scatters gradients; the compiler may do either piecewise around a ring.
    assert kinds & {'all-gather', 'collective-permute'}
    assert kinds & {'reduce-scatter', 'all-reduce', 'collective-permute'}
    assert {c.axes for c in train.collectives if c.payload_bytes > 2**20} == {('data',)}
    # Parameters, and two moments of the trained ones, in float32, a quarter of them here; the step writes in place.
    assert train.aliased_bytes > 0.99 * train.output_bytes
    parts = split(flatten(jax.eval_shape(lambda: task.init(jax.random.key(0)))), task.trainable)
    trained, frozen = (sum(a.size for a in part.values()) for part in parts)
    assert train.argument_bytes == pytest.approx(4 * (3 * trained + frozen) / 4, rel=0.01)
    # Computed again backwards: about 4/3 of the model's own FLOPs, and all S x S scores.
    assert 1.0 < train.flops * 4 / train.model_flops < 2.0 and 0 < train.most_mfu < 1
    if drafts:
        check_draft(task.head, *serving)
    else:
        (check_decoding if config.rehearse.mesh.get('stage', 1) == 1 else check_stages)(*serving)


def check_decoding(prefill, decode):
    assert {c.axes for c in decode.collectives if c.kind == 'all-reduce'} == {('model',)}
    assert prefill.flops * 4 == pytest.approx(prefill.model_flops, rel=0.1)
    assert decode.memory_s > decode.compute_s


def check_stages(prefill, decode):
    """Two stages: one shift a step, sums over the stages, and no weight moves. Both run every tick of a prompt."""
    kinds = {(c.kind, c.axes): c.count for c in decode.collectives}
    assert kinds['collective-permute', ('stage',)] == kinds['all-reduce', ('stage',)] == 1
    assert max(c.payload_bytes for c in decode.collectives) < 2**20
    assert 2.0 < prefill.flops * 4 / prefill.model_flops < 2.6
    assert decode.memory_s > decode.compute_s


def check_draft(head, draft):
    """The words' rows and the factors are split over the chips, and stay where they are: only activations travel."""
    weights = head.words * head.hidden_size + 2 * head.horizon * head.rank * head.hidden_size * head.inner_rank
    assert draft.argument_bytes == pytest.approx(2 * weights / 4, rel=0.02)
    assert 2 * weights / 4 < draft.bytes < 3 * 2 * weights / 4
    assert {c.axes for c in draft.collectives} == {('model',)}
    assert max(c.payload_bytes for c in draft.collectives) < 2 * weights / 4 / 16


def test_tiny_on_one_axis_or_the_other(compiler):
    """data=4 moves weights over data; model=4 activations over model; nothing else."""
    spread = rehearse.rehearse(tiny(data=4), 'v5e:2x2', ('train',), quick=True).programs[0]
    assert {c.axes for c in spread.collectives} == {('data',)}
    across = rehearse.rehearse(tiny(model=4), 'v5e:2x2', ('train',), quick=True).programs[0]
    assert {c.axes for c in across.collectives} == {('model',)}
    assert across.flops == pytest.approx(spread.flops, rel=0.1)
    # Norms aside, a quarter of parameters and moments is on each chip either way.
    assert spread.argument_bytes == pytest.approx(across.argument_bytes, rel=0.05)
    alone = rehearse.rehearse(tiny(), 'v5e:1x1', ('decode',), quick=True).programs[0]
    assert alone.collectives == () and alone.link_s == 0


def test_what_does_not_fit_is_named(compiler):
    config = tiny(data=4)
    config.task.kwargs.model.max_seq_len = 65_536
    config.rehearse.update({'decode_batch': 512, 'context': 65_536})  # 17 GB of keys and values on each chip
    result = rehearse.rehearse(config, 'v5e:2x2', ('decode',), quick=True)
    decode = result.programs[0]
    assert not decode.fits and not result.fits
    assert '(15.75G)' in decode.refusal and decode.peak_bytes > decode.usable_bytes
    assert decode.largest[0].argument and decode.largest[0].bytes == 2 * 128 * 4 * 65_536 * 64 * 2
    told = rehearse_report.text(result)
    assert 'DOES NOT FIT' in told and 'the arguments alone are' in told
    assert 'does not fit: decode' in told and 'nothing was run' in told
    json.dumps(rehearse_report.as_dict(result))


def square(name, size):
    """y y with y = x x^T, float32 [size, size], on every chip of a topology."""
    devices, chip = topology.get(name)
    mesh = rehearse.whole_mesh({'data': -1}, devices, name, 'mesh')
    x = jax.ShapeDtypeStruct((size, 256), 'float32', sharding=NamedSharding(mesh, P()))

    def fn(x):
        y = x @ x.T
        return y @ y

    return aot.Program('square', 'y y', mesh, lambda: jax.jit(fn).lower(x), 0.0, 'float32'), chip


@pytest.mark.parametrize(('size', 'where'), [(49_152, 'v5e'), (65_536, 'v5p'), (1 << 18, None)])
def test_the_first_thing_that_does_not_fit(compiler, size, where):
    """18 GiB: the compiler counts on; 32 GiB: it counts where there is room; 512 GiB: it names the array."""
    program, chip = square('v5e:2x2', size)
    found = aot.compile_program(program, chip, True, lambda: square('v5p:2x2x1', size)[0])
    assert not found.fits and '(15.75G)' in found.refusal and found.usable_bytes == chip.usable_bytes
    assert found.largest[0].what == f'f32[{size},{size}]'
    assert found.peak_bytes == 0 if where is None else found.peak_bytes > 2 * 4 * size**2
    told = rehearse_report.text(rehearse.Rehearsal('v5e:2x2', chip.name, 4, {}, True, (found,), ()))
    assert f'first to look at: f32[{size},{size}]' in told


@pytest.mark.parametrize(('change', 'name', 'message'), [
    ({}, 'v9z:2x2', 'not one of a known kind; examples: v5e:2x2'),
    ({}, 'v5e-16', 'examples'),
    ({}, 'v5e:3x3', 'not divisible'),
    ({'mesh.data': 2}, 'v5e:2x2', 'has 2 chips, v5e:2x2 has 4'),
    ({'mesh.data': 8}, 'v5e:2x2', 'needs 8 devices'),
    ({'mesh.data': -1, 'mesh.model': 3}, 'v5e:2x2', 'does not divide 4'),
    ({'mesh.data': 4, 'data.batch_size': 6}, 'v5e:2x2', 'batch_size 6'),
    ({'mesh.data': 4, 'rehearse.decode_batch': 6}, 'v5e:2x2', 'decode_batch 6'),
    ({'mesh.data': 4, 'rehearse.prompt': 999}, 'v5e:2x2', 'prompt 999'),
    ({'mesh.data': 2, 'mesh.stage': 2}, 'v5e:2x2', 'nothing that decodes on stages'),
    ({'mesh.data': 4, 'task.factory': 'no.where'}, 'v5e:2x2', 'no.where'),
])
def test_bad_input_is_named(compiler, change, name, message):
    config = tiny()
    for key, value in change.items():
        group, _, last = key.partition('.')
        config[group][last] = value
    with pytest.raises(ConfigError, match=message):
        rehearse.rehearse(config, name, ('decode',), quick=True)


def test_a_missing_compiler_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
    monkeypatch.setattr(topology, 'SIDE_FOLDER', tmp_path)
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(CompilerMissing, match='make setup'):
        topology.library()
    (tmp_path / 'unavailable.txt').write_text('ERROR: no network\n')
    with pytest.raises(CompilerMissing, match='ERROR: no network'):
        topology.library()
    monkeypatch.setattr(topology, 'GPU_FOLDER', tmp_path)
    with pytest.raises(CompilerMissing, match='make gpu-compiler'):
        topology.get('h200:1')


def test_the_command(compiler, tmp_path):
    """Two at a time, as they may well be started; the exit code tells; the environment stays quiet."""
    flags = ['--config=configs/base_enwik8.py:tiny', '--topology=v5e:2x2', '--quick', '--programs=train']
    run = lambda *more: subprocess.Popen(
        [sys.executable, '-m', 'harness.launch.rehearse', *flags, *more], cwd=ROOT, text=True,
        env={k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    good = run('--config.mesh.data=4', f'--json={tmp_path}/out.json')
    bad = run('--config.mesh.data=3')
    out, err = good.communicate(timeout=120)
    assert (good.returncode, err) == (0, "") and "every program fits" in out
    assert json.loads((tmp_path / 'out.json').read_text())['programs'][0]['fits'] is True
    _, err = bad.communicate(timeout=120)
    assert bad.returncode == 2 and err.startswith('headway: error: ') and err.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'data'), [('h200:1', 1), ('h200:8', 8)])
def test_gpus(name, data):
    try:
        result = rehearse.rehearse(tiny(data=data), name)
    except CompilerMissing as error:
        pytest.skip(str(error))
    assert result.fits and result.chips == data and result.programs[0].trips_known
    assert {c.axes for c in result.programs[0].collectives} == ({('data',)} if data > 1 else set())


@pytest.mark.slow
@pytest.mark.parametrize('name', ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'))
def test_usable_memory_is_what_the_compiler_says(compiler, name):
    devices, chip = topology.get(name)
    one = jax.sharding.SingleDeviceSharding(devices[0])
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 20), 'float32', sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf'\({chip.usable_bytes / 2**30:.2f}G\)'):
        jax.jit(lambda x: jax.numpy.sin(x @ x.T)).lower(huge).compile()


# --- roofline -------------------------------------------------------------------------------------------------


def test_collective_seconds_by_hand():
    v5e = roofline.DEVICES['tpu-v5e']
    # 400 GB/s in both directions over four links; a ring along one of two dimensions has half of one direction's 200.
    assert roofline.collective_seconds(v5e, 'all-gather', 1e9, 4, 1) == pytest.approx(0.75e9 / 100e9)
    assert roofline.collective_seconds(v5e, 'all-reduce', 1e9, 16, 2) == pytest.approx(2 * 15 / 16 * 1e9 / 200e9)
    assert roofline.collective_seconds(roofline.DEVICES['h200'], 'collective-permute', 1e9, 2) == pytest.approx(1 / 450)


def test_training_flops_by_hand():
    config = tiny()
    cfg = ModelConfig.from_dict(config.task.kwargs.model.to_dict())
    layer = 4 * 256 * 256 + 3 * 256 * 512
    seen = 128 * 129 // 2
    forward = 2 * 128 * (2 * layer + 256 * 512) + 2 * (2 * 2 * 256) * seen
    assert roofline.train_flops(cfg, 8, 128) == 3 * 8 * forward


# --- launch files ---------------------------------------------------------------------------------------------


def loop(tmp_path, script, **kwargs):
    command = tmp_path / 'command'
    command.write_text(f'#!/bin/sh\n{script}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return subprocess.Popen(['configs/launch/until_finished.sh', tmp_path, command], cwd=ROOT, text=True,
                            env=os.environ | {'HEADWAY_RETRY_SECONDS': '0', 'DIR': str(tmp_path)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_the_restart_loop_retries_a_crash_and_stops_when_finished(tmp_path):
    run = loop(tmp_path, 'echo x >> $DIR/log; [ $(wc -l < $DIR/log) = 3 ] || exit 134; touch $DIR/finished')
    assert run.wait(20) == 0
    assert (tmp_path / 'log').read_text() == 'x\n' * 3


def test_the_restart_loop_does_not_retry_a_wrong_config(tmp_path):
    assert loop(tmp_path, 'echo x >> $DIR/log; exit 2').wait(20) == 2
    assert (tmp_path / 'log').read_text() == 'x\n'


def test_the_restart_loop_hands_a_signal_on(tmp_path):
    run = loop(tmp_path, "trap 'echo saved > $DIR/log; exit 0' TERM; echo up; while :; do sleep 0.05; done")
    assert run.stdout.readline() == 'up\n'
    run.terminate()
    assert run.wait(20) == 75 and (tmp_path / 'log').read_text() == 'saved\n'
