"""Checkpoints: what was saved comes back bit for bit on any mesh, and nothing damaged is ever used."""

import json
import os
import re
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.errors import (
    CheckpointMismatch,
    ConfigError,
    FingerprintMismatch,
    FormatError,
    NoValidCheckpoint,
    SaveError,
)
from backbone.mesh import make_mesh
from harness import fingerprint, seal
from harness.checkpoint import Checkpoints, read_part

META = {'format': 1, 'fingerprint': {'seed': 3}}


def state(seed=0, width=24, dtype=jnp.float32):
    """What a run saves: flat parameters, an optimiser's named tuples, key data, a counter, and an empty part."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {'base/layers/attn/q/kernel': jax.random.normal(keys[0], (4, 16, width), dtype),
              'base/embed/tokens': jax.random.normal(keys[1], (48, 16)).astype(jnp.bfloat16)}
    moments = optax.adamw(1e-3).init(params)
    moments = jax.tree.map(lambda a: a + jax.random.normal(keys[2], a.shape).astype(a.dtype), moments)
    return {'params': params, 'ema': {}, 'rest': {
        'opt_state': moments, 'rng': np.array([seed, 7], np.uint32), 'bad_steps': jnp.int32(seed)}}


def placed(tree, mesh):
    """On a mesh: the two last axes split over whatever divides them."""
    def one(leaf):
        axes = [axis if size % mesh.shape[axis] == 0 else None
                for axis, size in zip(('data', 'model'), leaf.shape[-2:], strict=False)] if leaf.ndim > 1 else []
        return jax.device_put(leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), *axes)))
    return jax.tree.map(one, tree)


def like(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, 'sharding', None)), tree)


def same(a, b) -> bool:
    """The same tree, types and bits."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """Steps 10, 20, 30 on the disk, to be copied."""
    folder = tmp_path_factory.mktemp('checkpoints')
    saved = Checkpoints(folder)
    for step in (10, 20, 30):
        saved.save(step, state(step), META | {'step': step})
    saved.close()
    return folder


@pytest.fixture
def folder(three, tmp_path):
    return shutil.copytree(three, tmp_path / 'checkpoints')


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def largest(step):
    return max((path for path in step.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step):
    os.truncate(largest(step), largest(step).stat().st_size // 2)


def half_delete(step):
    for path in sorted(step.rglob('*'))[::2]:
        if path.is_file():
            path.unlink()


DAMAGE = {
    'truncated': (truncate, r'has \d+ of \d+ bytes'),
    'emptied': (lambda step: os.truncate(largest(step), 0), 'has 0 of'),
    'flipped': (lambda step: flip(largest(step), 500), 'does not match its checksum'),
    'missing': (lambda step: largest(step).unlink(), 'is missing'),
    'half deleted': (half_delete, 'is missing'),
    'empty folder': (lambda step: (shutil.rmtree(step), step.mkdir()), 'headway.json is missing'),
    'no seal': (lambda step: (step / seal.SEAL).unlink(), 'headway.json is missing'),
    'torn seal': (lambda step: os.truncate(step / seal.SEAL, 100), 'headway.json is damaged'),
    'flipped seal': (lambda step: flip(step / seal.SEAL, 200), 'headway.json'),
}


def test_round_trip(folder):
    step, parts, metadata = Checkpoints(folder).restore_latest_valid(like(state()))
    assert (step, metadata) == (30, META | {'step': 30})
    assert same(parts, state(30)) and not same(parts, state(20))


@pytest.mark.parametrize('damage,reason', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_step_is_told_and_the_one_before_it_used(folder, damage, reason):
    damage(folder / '30')
    lines = []
    checkpoints = Checkpoints(folder)
    step, parts, _ = checkpoints.restore_latest_valid(like(state()), report=lines.append)
    assert step == 20 and same(parts, state(20))
    assert len(lines) == 1 and str(folder / '30') in lines[0]
    assert re.search(reason, lines[0])
    assert checkpoints.steps() == [10, 20] and (folder / '30.invalid').exists()
    checkpoints.save(30, state(31), META)  # its place is free again
    checkpoints.close()
    assert same(Checkpoints(folder).restore_latest_valid(like(state()))[1], state(31))


def test_every_file_of_a_step_is_watched(folder):
    sealed, _ = seal.read(folder / '30')
    assert len(sealed['files']) > 10 and seal.fault(folder / '30', sealed['files']) == ''
    for name in sealed['files']:
        path = folder / '30' / name
        content = path.read_bytes()
        flip(path, len(content) // 2)
        assert seal.fault(folder / '30', sealed['files']) == f'{name} does not match its checksum'
        path.write_bytes(content)
    text = (folder / '30' / seal.SEAL).read_bytes()
    for place in range(0, len(text), 7):
        flip(folder / '30' / seal.SEAL, place)
        assert seal.read(folder / '30')[1], f'byte {place}'
        (folder / '30' / seal.SEAL).write_bytes(text)
    assert seal.read(folder / '30')[1] == ''


def test_without_a_valid_step_it_refuses_and_touches_nothing(folder):
    truncate(folder / '30')
    half_delete(folder / '20')
    (folder / '10' / seal.SEAL).unlink()
    before = sorted(folder.rglob('*'))
    with pytest.raises(NoValidCheckpoint, match=r'30: .*; 20: .*; 10: headway.json is missing.*to start over'):
        Checkpoints(folder).restore_latest_valid(like(state()))
    assert sorted(folder.rglob('*')) == before
    for step in (10, 20):
        shutil.rmtree(folder / f'{step}')
    (folder / '30').rename(folder / '30.invalid')
    with pytest.raises(NoValidCheckpoint, match='30.invalid: set aside'):
        Checkpoints(folder).restore_latest_valid(like(state()))


def test_there_never_was_one(tmp_path):
    (tmp_path / 'c' / '5.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)  # killed in the first save
    assert Checkpoints(tmp_path / 'c').restore_latest_valid(like(state())) is None


def test_another_model_names_the_leaves_and_uses_nothing_older(folder):
    other = like(state(width=16))
    other['params'] |= {f'base/extra/{i}': jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(7)}
    other['params']['base/embed/tokens'] = jax.ShapeDtypeStruct((48, 16), jnp.float32)
    del other['rest']['rng']
    with pytest.raises(CheckpointMismatch) as error:
        Checkpoints(folder).restore_latest_valid(other)
    for said in ('7 missing: params/base/extra/0, ', 'params/base/extra/4, ...', '1 left over: rest/rng',
                 '3 of another shape: params/base/layers/attn/q/kernel is [4, 16, 24], the model has [4, 16, 16]',
                 'rest/opt_state/0/mu/base/layers/attn/q/kernel',
                 '1 of another type: params/base/embed/tokens is bfloat16, the model has float32'):
        assert said in str(error.value)
    assert 'extra/5' not in str(error.value) and not list(folder.glob('*.invalid'))


def test_a_later_format_is_not_taken_for_damage(folder):
    sealed, _ = seal.read(folder / '30')
    (folder / '30' / seal.SEAL).write_text(seal._text(sealed | {'format': 2}))
    with pytest.raises(FormatError, match='format 2 is not read'):
        Checkpoints(folder).restore_latest_valid(like(state()))


def test_saved_on_one_mesh_loaded_on_another_and_back(tmp_path):
    meshes = [make_mesh(), make_mesh(stage=2, data=2, model=2), make_mesh(data=4, model=2), make_mesh()]
    original = state(5)
    for step, mesh in enumerate(meshes):
        target = placed(original, mesh)
        checkpoints = Checkpoints(tmp_path)
        if step:
            _, found, _ = checkpoints.restore_latest_valid(like(target))
            assert same(found, original)
            assert all(a.sharding == b.sharding for a, b in
                       zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True))
        checkpoints.save(step, target, META)
        checkpoints.close()
    kernel = placed(original, meshes[1])['params']['base/layers/attn/q/kernel']
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size  # it really was split


@pytest.mark.parametrize('shape', [{}, {'data': 2, 'model': 2}], ids=['one device', 'four devices'])
def test_the_state_may_be_donated_at_once(tmp_path, shape):
    current = {'params': placed({f'w{i}': jnp.full((256, 256), i, jnp.float32) for i in range(8)}, make_mesh(**shape))}
    host = {'params': {'count': np.arange(1000)}}
    advance = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2 + 1, tree), donate_argnums=0)
    checkpoints, expected = Checkpoints(tmp_path, max_to_keep=9), {}
    for step in range(4):
        expected[step] = jax.tree.map(lambda a: np.array(a, copy=True), current | {'host': host['params']})
        checkpoints.save(step, current | {'host': host['params']}, META)
        current = advance(current)  # while the save is under way
        current = advance(current)
        host['params']['count'] += 1
    checkpoints.close()
    for step, parts in expected.items():
        assert same(read_part(tmp_path, 'params', step)[1], parts['params'])
        assert same(read_part(tmp_path, 'host', step)[1], parts['host'])
    assert not same(expected[0], expected[1])


def test_what_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, {'params': {'a': jnp.ones(3)}}, META)
    checkpoints.close()
    assert checkpoints.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['10', '4', '8', '9']
    with pytest.raises(ConfigError, match='max_to_keep'):
        Checkpoints(tmp_path, max_to_keep=0)


def test_save_returns_early_and_older_steps_go_only_when_the_new_one_is_final(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    checkpoints.save(1, state(1), META)
    checkpoints.wait()
    write, reached, go = seal.write, threading.Event(), threading.Event()
    monkeypatch.setattr(seal, 'write', lambda *args: (reached.set(), go.wait(), write(*args)))
    checkpoints.save(2, state(2), META)
    assert reached.wait(30) and checkpoints.steps() == [1]  # everything is written, nothing is renamed
    go.set()
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    checkpoints.save(2, state(9), META)  # there already: left as it is
    checkpoints.close()
    assert same(Checkpoints(tmp_path).restore_latest_valid(like(state()))[1], state(2))


def test_synchronous(tmp_path):
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(1, state(), META)
    assert checkpoints.steps() == [1]
    checkpoints.close()


@pytest.mark.parametrize('surfaces', ['wait', 'save'])
def test_a_full_disk(folder, capfd, caplog, surfaces):
    checkpoints = Checkpoints(folder, max_to_keep=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {'params': {'a': jnp.arange(1 << 20, dtype=jnp.float32)}}
    with pytest.raises(SaveError) as error:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # the kernel refuses, as a full disk does
            checkpoints.save(40, big, META)
            checkpoints.wait() if surfaces == 'wait' else checkpoints.save(50, big, META)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f'{folder / "40"} cannot be saved: File too large; steps kept: 10, 20, 30'
    assert sorted(path.name for path in folder.iterdir()) == ['10', '20', '30']  # no half-written step fills it further
    assert capfd.readouterr().err == '' and caplog.text == ''  # it is said once, by the error
    checkpoints.save(40, state(40), META)  # when there is room again
    checkpoints.close()
    step, parts, _ = Checkpoints(folder).restore_latest_valid(like(state()))
    assert step == 40 and same(parts, state(40))


def test_what_a_kill_left_is_cleaned_at_the_start(folder):
    shutil.copytree(folder / '30', folder / '40.orbax-checkpoint-tmp')
    shutil.copytree(folder / '30', folder / '5.old')
    shutil.copytree(folder / '30', folder / '50.invalid')  # this one is kept
    assert Checkpoints(folder).steps() == [10, 20, 30]
    assert sorted(path.name for path in folder.iterdir()) == ['10', '20', '30', '50.invalid']


def test_read_part(folder):
    step, leaves = read_part(folder, 'params')
    assert step == 30 and same(leaves, jax.device_get(state(30)['params']))
    assert all(type(leaf) is np.ndarray for leaf in leaves.values())
    assert same(read_part(folder, 'rest', 10)[1]['opt_state/0/mu/base/embed/tokens'],
                state(10)['rest']['opt_state'][0].mu['base/embed/tokens'])
    with pytest.raises(CheckpointMismatch, match="no part 'head', only ema, params, rest"):
        read_part(folder, 'head')
    with pytest.raises(NoValidCheckpoint, match='11 cannot be used: headway.json is missing; steps here: 10, 20, 30'):
        read_part(folder, 'params', 11)
    truncate(folder / '30')
    assert read_part(folder, 'params')[0] == 20
    with pytest.raises(NoValidCheckpoint, match='30 cannot be used: '):
        read_part(folder, 'params', 30)
    with pytest.raises(NoValidCheckpoint, match='holds no checkpoint'):
        read_part(folder / 'nowhere', 'params')


CONFIG = {'task': {'kwargs': {'model': {'hidden': 8}}}, 'data': {'dataset': 'enwik8', 'data_dir': '/a'}, 'seed': 1,
          'optimizer': {'schedule': 'cosine', 'no_decay': ('x',)}, 'num_steps': 100, 'mesh': {'data': 1},
          'log_every': 5, 'checkpoint': {'every': 5}, 'eval': {'every': 1}}


def test_fingerprint_holds_what_changes_the_numbers():
    saved = fingerprint.fingerprint(CONFIG)
    assert saved == {'task.kwargs.model.hidden': 8, 'data.dataset': 'enwik8', 'seed': 1, 'num_steps': 100,
                     'optimizer.schedule': 'cosine', 'optimizer.no_decay': ['x']}
    saved = json.loads(json.dumps(saved))
    elsewhere = {'mesh': {'data': 8}, 'log_every': 1, 'checkpoint': {}, 'data': {'dataset': 'enwik8', 'data_dir': ''}}
    fingerprint.check(saved, fingerprint.fingerprint(CONFIG | elsewhere))
    other = {'seed': 2, 'num_steps': 200, 'optimizer': CONFIG['optimizer'] | {'decay': 0.1}}
    with pytest.raises(FingerprintMismatch, match=r'num_steps 100 -> 200; optimizer.decay absent -> 0.1; seed 1 -> 2'):
        fingerprint.check(saved, fingerprint.fingerprint(CONFIG | other))


def test_a_constant_rate_may_be_trained_longer():
    constant = CONFIG | {'optimizer': {'schedule': 'constant'}}
    fingerprint.check(fingerprint.fingerprint(constant), fingerprint.fingerprint(constant | {'num_steps': 200}))
