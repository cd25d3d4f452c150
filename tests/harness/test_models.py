"""A training directory as a model: its newest sound checkpoint, the averaged one, one step, frozen leaves and all."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest

from backbone import formats, lora, model, tokenizer
from backbone.config import ModelConfig
from backbone.errors import CheckpointMismatch, FormatError, NoValidCheckpoint, TokenizerError
from backbone.formats.tensors import flatten, unflatten
from configs import training
from harness import checkpoint, convert, models, train, train_step

TINY = Path(__file__).resolve().parents[1] / 'golden' / 'tiny'
SHAPE = training.llama(vocab=257, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24, max_seq_len=64)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen base from a file, adapters that are trained, and a head that init makes and nobody trains."""

    cfg: ModelConfig
    trainable: tuple[str, ...] = ('lora/.*',)

    def init(self, rng):
        base = model.init_params(self.cfg, rng)
        return {'base': base, 'lora': lora.init(base, rng, rank=2), 'scale': {'alpha': jax.random.normal(rng, ())}}

    def load(self):
        return {'base': filled(model.abstract_params(self.cfg), 77)}

    def merged(self, params):
        return lora.merge(params['base'], params['lora'], float(params['scale']['alpha']))


def filled(tree: dict, seed: int) -> dict:
    """Random arrays of the tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / 4, tree)


def adapted() -> Adapted:
    return Adapted(ModelConfig.from_dict(SHAPE))


def run_directory(folder: Path, steps=(3, 5), ema=0.0, seed=0, factory=None, **kwargs) -> list[dict]:
    """What headway-train leaves behind after those steps; returns the trained leaves saved at each."""
    config = training.defaults()
    config.seed, config.ema_decay = seed, ema
    config.task.kwargs = ml_collections.ConfigDict({} if factory else {'model': SHAPE} | kwargs)
    config.task.factory = factory or config.task.factory
    train.claim(folder, config, True)
    tokenizer.of_bytes().save(folder / models.TOKENIZER)
    task = train_step.build_task(config)
    shapes, saved = flatten(jax.eval_shape(task.init, jax.random.key(0))), []
    checkpoints = checkpoint.Checkpoints(folder / models.CHECKPOINTS, asynchronous=False)
    for step in steps:
        params, _ = train_step.split(filled(shapes, step), task.trainable)
        parts = {'params': params, 'rest': {'rng': np.zeros(2, np.uint32)}}
        checkpoints.save(step, parts | ({'ema': {k: v / 2 for k, v in params.items()}} if ema else {}), {'step': step})
        saved.append(params)
    checkpoints.close()
    return saved


def same(loaded, base: dict) -> bool:
    found = flatten(loaded.params)
    return found.keys() == base.keys() and all((found[path] == base[path]).all() for path in base)


def base_of(leaves: dict) -> dict:
    return {path.removeprefix('base/'): a for path, a in leaves.items() if path.startswith('base/')}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'plain'
    return folder, run_directory(folder)


def test_newest_step_and_a_certain_one(plain):
    folder, saved = plain
    loaded = models.load(folder)
    assert same(loaded, base_of(saved[1])) and not same(loaded, base_of(saved[0]))
    assert (loaded.name, loaded.config.to_dict()) == ('plain@5', ModelConfig.from_dict(SHAPE).to_dict())
    assert loaded.tokenizer.encode('aé') == [97, 195, 169] and loaded.base_hash == formats.params_hash(loaded.params)
    early = models.load(f'{folder}@3', ml_dtypes.bfloat16)
    assert early.name == 'plain@3' and early.base_hash == models.load(f'{folder}@3').base_hash != loaded.base_hash
    assert {leaf.dtype for leaf in jax.tree.leaves(early.params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_converting_a_run(plain, tmp_path):
    """Every form that is written can be made from a run, and is the same model with the same tokenizer."""
    for form in ('hf', 'gguf', 'headway'):
        assert convert.convert(str(plain[0]), tmp_path / form, form, check=form == 'hf') in (None, convert.Agreement(
            64, 0.0, 0.0, 1.0, 1.0, *[pytest.approx(5.5, abs=5)] * 2))
        copy = formats.load(tmp_path / form)
        assert same(copy, flatten(models.load(plain[0]).params)) and copy.tokenizer.encode('aé') == [97, 195, 169]


def test_what_is_not_a_run_is_read_as_before(plain, tmp_path):
    assert same(models.load(TINY / 'llama'), flatten(formats.load(TINY / 'llama').params))
    assert models.is_workdir(plain[0]) and not models.is_workdir(TINY / 'llama') and not models.is_workdir(tmp_path)
    with pytest.raises(FormatError, match='@3 means nothing'):
        models.load(f'{TINY / "llama"}@3')
    with pytest.raises(FormatError, match='no such file'):
        models.load(tmp_path / 'absent')


def test_the_average_where_there_is_one(tmp_path):
    saved = run_directory(tmp_path, steps=(2,), ema=0.9)
    assert same(models.load(tmp_path), {path: a / 2 for path, a in base_of(saved[0]).items()})


def test_frozen_leaves_come_from_the_task(tmp_path):
    """The base from its file, a scale from its init, the adapters from the checkpoint; merged as the task says."""
    saved = run_directory(tmp_path, steps=(2,), seed=5, factory=f'{__name__}.adapted')[0]
    assert saved and all(path.startswith('lora/') for path in saved)
    task, alphas = adapted(), [float(jax.random.normal(jax.random.key(seed), ())) for seed in (5, 6)]
    right, wrong = (flatten(lora.merge(task.load()['base'], unflatten(saved)['lora'], alpha)) for alpha in alphas)
    found = models.load(tmp_path)
    for path, leaf in flatten(found.params).items():
        np.testing.assert_allclose(leaf, right[path], rtol=1e-5, atol=1e-6)
    path = 'layers/attn/q/kernel'
    for other in (wrong[path], flatten(task.load()['base'])[path]):
        assert float(np.abs(flatten(found.params)[path] - other).max()) > 1e-2
    assert found.base_hash == formats.params_hash(found.params)


def test_errors_name_what_is_wrong(tmp_path, plain):
    with pytest.raises(NoValidCheckpoint, match='no checkpoint of step 4, only of 3, 5'):
        models.load(f'{plain[0]}@4')
    run_directory(tmp_path / 'young', steps=())
    with pytest.raises(NoValidCheckpoint, match='young has no checkpoint yet'):
        models.load(tmp_path / 'young')
    run_directory(tmp_path / 'x', steps=(1,))
    config = json.loads((tmp_path / 'x' / 'config.json').read_text())

    def rewrite(**changes):
        changed = json.loads(json.dumps(config))
        for path, value in changes.items():
            group, _, key = path.rpartition('__')
            at = changed
            for name in filter(None, group.split('__')):
                at = at[name]
            at[key] = value
        (tmp_path / 'x' / 'config.json').write_text(json.dumps(changed))

    for changes, error, named in (({'format': 99}, FormatError, 'version 99'),
                                  ({'config__ema_decay': 0.5}, CheckpointMismatch, "no part 'ema'"),
                                  ({'config__task__kwargs__model__hidden_size': 32}, FormatError, 'expected'),
                                  ({'config__task__kwargs__model__vocab_size': 9}, FormatError, 'expected')):
        rewrite(**changes)
        with pytest.raises(error, match=named):
            models.load(tmp_path / 'x')
    (tmp_path / 'x' / 'config.json').write_text('{"format": 1')
    with pytest.raises(FormatError, match='config.json cannot be read'):
        models.load(tmp_path / 'x')
    rewrite()
    (tmp_path / 'x' / 'tokenizer' / 'tokenizer.json').write_text('{')
    with pytest.raises(TokenizerError, match='damaged'):
        models.load(tmp_path / 'x')
