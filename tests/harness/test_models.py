"""A training directory as a model: its newest sound checkpoint, the averaged one, one step, frozen leaves and all."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from backbone import formats, lora, model, tokenizer
from backbone.config import ModelConfig
from backbone.errors import (
    CheckpointMismatch,
    FormatError,
    NoValidCheckpoint,
    RequestError,
    TensorMismatch,
    TokenizerError,
)
from backbone.formats.tensors import flatten, unflatten
from backbone.sampling import GREEDY
from configs import training
from harness import (
    artefacts,
    checkpoint,
    convert,
    generation,
    models,
    scoring,
    train,
    train_step,
    zoo,
)
from harness.launch import artefact as artefact_cli
from harness.metrics import ROWS
from tests.harness import gained

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
    config.task.kwargs = ml_collections.ConfigDict(kwargs if factory else {'model': SHAPE} | kwargs)
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


# --- models that are more than a plain base ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder of a run whose model has gains beside its base, what it trained)."""
    folder = tmp_path_factory.mktemp('runs') / 'gained'
    saved = run_directory(folder, (4,), factory='tests.harness.gained.build', model=SHAPE)[0]
    (folder / ROWS).write_text(json.dumps({'kind': 'eval', 'step': 4, 'loss': 5.5}) + '\n')
    return folder, saved


@pytest.fixture
def empty_zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, 'ROOT', tmp_path / 'zoo')


TOKENS = np.array([[5, 80, 3, 256, 7, 7, 9]], np.int32)


def reference(leaves: dict, tokens=TOKENS) -> np.ndarray:
    cfg = ModelConfig.from_dict(SHAPE)
    return np.asarray(jax.jit(lambda tree, tokens: gained.logits(cfg, tree, tokens))(unflatten(leaves), tokens))


def said(target, params) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: target.forward(p, TOKENS, target.init_cache(1, 8, 0)).logits)(params))


def test_the_whole_model_of_a_run(whole):
    folder, saved = whole
    loaded = models.load(folder)
    assert flatten(loaded.tree).keys() == saved.keys() and list(loaded.extra) == ['gained']
    assert loaded.base_hash == formats.params_hash(loaded.tree) != formats.params_hash(loaded.params)
    assert models.load(folder, ml_dtypes.bfloat16).extra['gained']['words'].dtype == ml_dtypes.bfloat16
    want = reference(saved)
    for packed in (True, False):
        target, params = models.target(loaded, packed=packed)
        np.testing.assert_allclose(said(target, params), want, rtol=1e-4, atol=1e-4)
        assert isinstance(params['base']['layers'], tuple) == packed
    plain = said(*models.target(dataclasses.replace(loaded, decodes=None, extra={})))
    assert np.abs(plain - want).max() > 0.1, 'its base alone is another model'
    assert models.target(loaded, 'bfloat16')[0].cache_dtype == 'bfloat16'


def test_a_plain_model_is_decoded_as_ever(plain):
    loaded = models.load(plain[0])
    target, params = models.target(loaded, 'bfloat16')
    assert target == model.PlainTarget(loaded.config, 'bfloat16', stacked=False) and list(params) == ['base']
    target, params = models.target(loaded, packed=False)
    assert target == model.PlainTarget(loaded.config) and params == {'base': loaded.params}


def test_generating_and_scoring_run_the_whole_model(whole, capsys):
    folder, saved = whole
    session = generation.Session.load(str(folder), 'prompt_lookup', ['block=2'], 'float32')
    loaded = models.load(folder)
    lossless = session.run(['abab'], 6, GREEDY, stream=False).tokens[0]
    best, base_best = (reference(leaves, np.array([list(b'abab') + lossless]))[0].argmax(-1)[3:-1].tolist()
                       for leaves in (saved, saved | {'gained/words': np.float32(1)}))
    assert lossless == best != base_best, 'what the whole model says, not its base'
    scorer = scoring.Scorer.of(loaded, progress=False)
    found = scorer.score([scoring.Row(tuple(map(int, TOKENS[0])), 1)])[0].logprobs
    law = jax.nn.log_softmax(reference(saved)[0], axis=-1)
    np.testing.assert_allclose(found, np.asarray(law)[np.arange(6), TOKENS[0, 1:]], rtol=1e-4, atol=1e-4)
    assert scorer.generate(['abab'], max_new_tokens=6) == [scorer._text(lossless)]
    with pytest.raises(RequestError, match='EarlyExit drafts with the layers of a plain model, and gained@4'):
        generation.Session.load(str(folder), 'early_exit', [], 'float32')


def test_a_whole_model_has_no_plain_form(whole, tmp_path):
    for form in formats.KINDS:
        with pytest.raises(FormatError, match='gained@4 has no plain form: .*gained'):
            convert.convert(str(whole[0]), tmp_path / form, form)
    assert not list(tmp_path.iterdir())


def test_parts_of_another_shape_are_named(whole, tmp_path, monkeypatch):
    task = gained.Gained.init
    monkeypatch.setattr(gained.Gained, 'init', lambda self, rng: task(self, rng) | {
        'gained': {'words': np.ones(9), 'more': np.ones(2)}})
    with pytest.raises(TensorMismatch, match=r'gained/words is \[257\], expected \[9\]'):
        models.load(whole[0])


@pytest.mark.parametrize('kind', ('whole', 'plain'))
def test_a_model_in_the_zoo(kind, request, empty_zoo):
    """Written by the command, read by name; int8 makes it another model, and its hash is that model's."""
    folder, saved = request.getfixturevalue(kind)
    (folder / ROWS).write_text(json.dumps({'kind': 'eval', 'step': 5, 'loss': 5.5}) + '\n')
    flags.FLAGS(['artefact'])
    with flagsaver.flagsaver(workdir=str(folder), name='little', int8=None):
        artefact_cli.main(['artefact'])
    run, found = models.load(folder), models.load('little')
    card = zoo.load('little')[1]
    assert card['base'] == 'itself' and card['base_hash'] == found.base_hash != run.base_hash
    assert found.decodes == run.decodes and found.config == run.config
    assert found.tokenizer.encode('aé') == [97, 195, 169]
    before, after = flatten(run.tree), flatten(found.tree)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {path for path in before if path.endswith('/kernel') or path == 'base/embed/tokens'}
    target, params = models.target(found)
    want = reference(after if kind == 'whole' else after | {'gained/words': np.float32(1)})
    np.testing.assert_allclose(said(target, params), want, rtol=1e-4, atol=1e-4)
    with flagsaver.flagsaver(workdir=str(folder), name='exact', int8=[]):
        artefact_cli.main(['artefact'])
    assert models.load('exact').base_hash == run.base_hash
    if kind == 'plain':
        assert found.base_hash == formats.params_hash(found.params)


def test_the_tokenizer_of_a_run_goes_with_it(plain, empty_zoo, tmp_path):
    folder = tmp_path / 'other'
    shutil.copytree(plain[0], folder)
    config = json.loads((folder / 'config.json').read_text())
    config['config']['data']['tokenizer'] = 'somewhere/else'
    (folder / 'config.json').write_text(json.dumps(config))
    card = {'base': '', 'config': {}, 'data': '', 'steps': 5, 'seed': 0, 'command': '', 'metrics': {}}
    artefacts.to_zoo('little', folder, card, None)
    assert (zoo.ROOT / 'little' / 'tokenizer' / 'tokenizer.json').is_file()
    assert models.load('little').tokenizer.encode('aé') == [97, 195, 169]
    (folder / 'tokenizer' / 'large').write_bytes(bytes(zoo.MAX_BYTES))
    with pytest.raises(FormatError, match='an artefact may have'):
        artefacts.to_zoo('large', folder, card, None)
    assert zoo.names() == ['little']


def test_an_artefact_that_drafts_is_no_model_and_the_other_way_round(whole, empty_zoo):
    card = {'base': 'some-model', 'base_hash': 'a' * 64, 'config': {}, 'data': '', 'steps': 5, 'seed': 0, 'command': '',
            'metrics': {}}
    zoo.save('head', {'w': np.ones(2, np.float32)}, card | {'drafter': {}})
    with pytest.raises(FormatError, match='head: this artefact drafts for some-model, it is not a model'):
        models.load('head')
    artefacts.to_zoo('little', whole[0], card, None)
    with pytest.raises(FormatError, match='little: this artefact drafts nothing'):
        artefacts.find('little', ModelConfig.from_dict(SHAPE), models.load('little').base_hash)
    path = zoo.ROOT / 'little' / zoo.CARD
    for where, key in (((), 'config'), (('decodes',), 'pack')):
        broken = json.loads(path.read_text())
        at = broken['model']
        for name in where:
            at = at[name]
        kept = path.read_text()
        del at[key]
        path.write_text(json.dumps(broken))
        with pytest.raises(FormatError, match=f'card.json: {key} is missing'):
            models.load('little')
        path.write_text(kept)
