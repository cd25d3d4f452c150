"""A run of distillation by name: the hybrid, the drafter, an artefact, a model without the attentions it has lost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from backbone import formats, tokenizer
from backbone.errors import FormatError
from backbone.formats.tensors import Loaded, flatten, params_hash
from backbone.layout import pack
from backbone.model import PlainTarget
from configs import rad as config_file
from harness import artefacts, models, train, zoo
from harness.baselines import Autoregressive
from harness.decode import generate
from rad import model
from rad.target import HybridTarget
from scripts import rad_export
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=257, hidden=16, heads=2, kv_heads=1)
TOKENS = np.random.default_rng(0).integers(0, 256, (1, 9)).astype(np.int32)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder of a run, path of its base): distilled for a few steps on a file's text, from a base in a file."""
    folder = tmp_path_factory.mktemp('rad')
    base = jax.tree.map(np.asarray, lively(CFG))
    formats.save(Loaded(CFG, base, tokenizer.of_bytes(), 'base', params_hash(base)), folder / 'base', 'headway')
    rng = np.random.default_rng(0)
    (folder / 'text').mkdir()
    for name in ('train', 'validation'):
        rows = [{'prompt': f'q{i}', 'text': ' '.join(rng.choice(['abc', 'dce', 'bad'], 30))} for i in range(40)]
        (folder / 'text' / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = config_file.get_config('tiny/set/shared')
    config.task.kwargs = {'base': str(folder / 'base'), 'layers': (1, 2), 'share_out': True, 'loss_chunk': 16}
    config.data.update({'dataset': 'selfgen', 'manual_dir': str(folder / 'text'), 'tokenizer': 'bytes', 'seq_len': 32,
                        'batch_size': 4, 'data_dir': str(folder / 'made')})
    config.num_steps, config.optimizer.warmup_steps, config.checkpoint.every = 20, 5, 20
    config.eval.update({'every': 10, 'batches': 2})
    assert train.run(config, folder / 'run', say=lambda *_: None) == 'finished'
    return str(folder / 'run'), str(folder / 'base')


@pytest.fixture(scope='module')
def loaded(run):
    return models.load(run[0])


def said(loaded, packed):
    target, params = models.target(loaded, packed=packed)
    return np.asarray(jax.jit(lambda p: target.forward(p, TOKENS, target.init_cache(1, 16, 8)).logits)(params))


def test_it_learns_and_is_a_model_by_name(run, loaded):
    rows = [json.loads(line) for line in open(f'{run[0]}/metrics.jsonl')]
    kl = [row['kl'] for row in rows if row['kind'] == 'eval']
    assert kl[-1] < kl[0] and all(0 <= row['drafts_kept'] <= 4 for row in rows if row['kind'] == 'eval')
    target, _ = models.target(loaded)
    assert isinstance(target, HybridTarget) and set(loaded.tree) == {'base', 'rad'}
    assert 'out_proj' not in loaded.tree['rad']['mixers']
    whole = loaded.tree['rad']['mixers'] | {'out_proj': {
        'kernel': loaded.params['layers']['attn']['o']['kernel'][np.array([1, 2])]}}
    want = model.forward(CFG, target.rcfg, {'base': loaded.params, 'rad': {'mixers': whole}}, TOKENS)
    np.testing.assert_allclose(said(loaded, False), want, atol=2e-5)
    np.testing.assert_allclose(said(loaded, True), want, atol=2e-5)
    layers = models.pack(loaded)['base']['layers']
    assert ['attn' in layer for layer in layers] == [True, False, False, True], 'what was replaced is not in memory'


def test_it_drafts_for_its_base_by_name(run):
    base = formats.load(run[1])
    drafter, ready = artefacts.find(run[0], CFG, base.base_hash, {'block': 2})
    packed, target = pack(base.params), PlainTarget(CFG, stacked=False)
    params = {'base': packed} | ready(packed, jnp.float32)
    prompts = [[1, 2, 3], [200]]
    got, want = (generate(target, d, params, prompts, max_new_tokens=12).tokens for d in (drafter, Autoregressive()))
    assert got == want
    with pytest.raises(FormatError, match='the base given has x'):
        artefacts.find(run[0], CFG, 'x')


@pytest.mark.parametrize('form', ('hf', 'gguf'))
def test_the_kept_base_goes_out_unchanged(run, loaded, tmp_path, form):
    path = tmp_path / ('base.gguf' if form == 'gguf' else 'base')
    rad_export.main(rad_export.parse([f'--workdir={run[0]}', f'--base={path}', f'--form={form}']))
    for name, a in flatten(formats.load(path).params).items():
        np.testing.assert_array_equal(a, flatten(formats.load(run[1]).params)[name], err_msg=name)
    with pytest.raises(FormatError):
        formats.save(loaded, tmp_path / 'whole', form)  # a hybrid has no such form


def test_by_itself_it_has_no_attention_that_was_replaced(run, loaded, tmp_path):
    rad_export.main(rad_export.parse([f'--workdir={run[0]}', f'--out={tmp_path / "hybrid"}']))
    stored = load_file(tmp_path / 'hybrid' / zoo.WEIGHTS)
    assert stored['base/layers/attn/q/kernel'].shape[0] == 2 and stored['base/layers/mlp/up/kernel'].shape[0] == 4
    assert stored['rad/mixers/out_proj/kernel'].shape == (2, 16, 16)
    alone = models.load(tmp_path / 'hybrid')
    assert alone.config == CFG and alone.base_hash != loaded.base_hash and alone.tokenizer.encode('a') == [97]
    np.testing.assert_allclose(said(alone, True), said(loaded, True), atol=1e-6)
    np.testing.assert_allclose(said(alone, False), said(loaded, False), atol=1e-6)
    with pytest.raises(FormatError, match='exists'):
        rad_export.main(rad_export.parse([f'--workdir={run[0]}', f'--out={tmp_path / "hybrid"}']))


def test_an_artefact_holds_the_mixers_and_is_both(run, loaded, tmp_path, monkeypatch):
    card = artefacts.card_of(run[0])
    artefacts.to_zoo('tiny_rad', run[0], card, ('.*in_proj/kernel',), root=tmp_path)
    monkeypatch.setattr(zoo, 'ROOT', tmp_path)
    made = models.load('tiny_rad')
    assert set(load_file(tmp_path / 'tiny_rad' / zoo.WEIGHTS)) >= {'rad/mixers/in_proj/kernel.scale', 'rad/mixers/D'}
    assert not any(name.startswith('base') for name in load_file(tmp_path / 'tiny_rad' / zoo.WEIGHTS))
    np.testing.assert_allclose(said(made, True), said(loaded, True), atol=0.05)  # int8
    drafter, ready = artefacts.find('tiny_rad', CFG, formats.load(run[1]).base_hash, {'block': 3})
    mixers = ready(pack(made.params), jnp.float32)['rad']['mixers']
    assert drafter.block == 3 and isinstance(mixers, tuple) and len(mixers) == 2
