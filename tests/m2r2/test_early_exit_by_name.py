"""Early exit as an artefact: --model=NAME decodes with it, and a row of the comparison says what it loses."""

import dataclasses

import jax
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.errors import ConfigError, FormatError, RequestError
from backbone.formats.tensors import Loaded, params_hash
from backbone.layout import pack
from configs import compare as compare_config
from harness import artefacts, compare, drafters, models, zoo
from harness.scoring import Scorer
from m2r2 import exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.early_exit import EarlyExitTarget
from m2r2.gate_task import GateTask
from m2r2.gates import GateConfig
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=257, layers=3)
M, GATE = M2R2Config.of(CFG, {'exits': (1, 2), 'rank': 4}), GateConfig('mlp', 8)
PROMPTS = [[5, 9, 40], [7]]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(zoo with one artefact, 'quick', of a base that lies in a folder; the base's parameters; the artefact's tree)."""
    root = tmp_path_factory.mktemp('made')
    base = jax.tree.map(np.asarray, lively(CFG))
    formats.save(Loaded(CFG, base, tokenizer.of_bytes(), 'small', params_hash(base)), root / 'base', 'headway')
    tree = jax.tree.map(np.asarray, {'m2r2': streams.init_params(M, CFG, jax.random.key(1)),
                                     'm2r2_gates': gates.init_params(GATE, M, jax.random.key(2))})
    kwargs = {'model': CFG.to_dict(), 'm2r2': M.to_dict(), 'gate': GATE.to_dict(), 'thresholds': (0.5, 0.5)}
    card = {'base': str(root / 'base'), 'base_hash': params_hash(base), 'config': {}, 'data': 'none', 'steps': 0,
            'seed': 0, 'command': 'none', 'metrics': {},
            'target': {'factory': 'm2r2.early_exit.build', 'kwargs': kwargs, 'pack': 'm2r2.early_exit.pack',
                       'params': ['m2r2', 'm2r2_gates']}}
    zoo.save('quick', tree, card, root / 'zoo')
    return root, base, tree


@pytest.fixture
def shelf(made, monkeypatch):
    monkeypatch.setattr(zoo, 'ROOT', made[0] / 'zoo')
    return made


def test_a_name_decodes_as_the_target_with_its_parameters_does(shelf):
    root, base, tree = shelf
    loaded = models.load('quick')
    target, params = models.target(loaded)
    direct = EarlyExitTarget(CFG, M, GATE, (0.5, 0.5), stacked=False)
    assert target == direct and loaded.name == 'quick'
    assert loaded.base_hash != models.load(root / 'base').base_hash, 'another model than its base'
    expected = {'base': pack(base), 'm2r2': exits.pack(M, tree['m2r2'], pack(base)), 'm2r2_gates': tree['m2r2_gates']}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_what_it_cannot_do_is_said(shelf, monkeypatch):
    root, base, tree = shelf
    loaded = models.load('quick')
    with pytest.raises(RequestError, match='quick approximates its base'):
        Scorer.of(loaded)
    with pytest.raises(FormatError, match='no plain form'):
        loaded.check_plain()
    with pytest.raises(FormatError, match='drafts nothing'):
        drafters.load('quick', models.load(root / 'base'), [])
    with pytest.raises(ConfigError, match='kv_fill'):
        models.make_target(loaded, arguments={'kv_fill': 'guess'})
    other = jax.tree.map(lambda a: a + 1, base)
    formats.save(Loaded(CFG, other, tokenizer.of_bytes(), 'small', params_hash(other)), root / 'other', 'headway')
    card = zoo.load('quick')[1]
    zoo.save('moved', tree, card | {'base': str(root / 'other')}, root / 'zoo')
    with pytest.raises(FormatError, match='trained on .* the base given has'):
        models.load('moved')
    monkeypatch.setattr(artefacts, '_task', lambda folder: GateTask(CFG, M, GATE))
    with pytest.raises(FormatError, match='the artefact with scripts/m2r2_artefact.py'):
        artefacts.to_zoo('gates', root / 'run', {}, None)


def test_a_row_of_the_comparison(shelf):
    config = compare_config.get_config('tiny')
    config.model, config.dtypes, config.repeats, config.time_parts = str(shelf[0] / 'base'), ('float32',), 1, False
    config.identity_batch_sizes, config.curve, config.max_new_tokens, config.prompts.count = (), (1,), 6, 1
    quick = lambda *thresholds: compare_config.method(artefact='quick', mode='approximate',
                                                      target_kwargs={'thresholds': thresholds})
    config.methods = {'plain': config.methods.plain, 'leaves': quick(0.0, 0.0), 'stays': quick(2.0, 2.0)}
    rows = {row.method: row for row in compare.run(config, progress=False).rows}
    assert rows['stays'].identical_rate == rows['stays'].quality == 1 > rows['leaves'].quality
    assert rows['leaves'].settings['artefact'] == 'quick' and rows['leaves'].mode == 'approximate'
    assert dataclasses.asdict(rows['leaves'])['speedup'] > 0
