"""Expert loading under a name: generation by it, its rows in a comparison, and what it cannot do."""

import dataclasses

import jax
import numpy as np
import pytest

from backbone import formats, tokenizer
from backbone.config import MoeConfig
from backbone.errors import ConfigError, FormatError, RequestError
from backbone.formats.tensors import Loaded, params_hash
from configs import compare as compare_config
from harness import artefacts, compare, decode, models, zoo
from harness.baselines import Autoregressive, PromptLookup
from m2r2 import prefetch
from m2r2.prefetch_task import PrefetchTask
from scripts import expert_times
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=257, layers=3, moe=MoeConfig(6, 2))
SHAPE = prefetch.PrefetchConfig(interval=2, reach=2, rank=4)
PROMPTS = [[5, 9, 40], [7]]
STEPWISE = Autoregressive()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('made')
    base = jax.tree.map(np.asarray, lively(CFG))
    formats.save(Loaded(CFG, base, tokenizer.of_bytes(), 'mixture', params_hash(base)), root / 'base', 'headway')
    tree = {'prefetch': jax.tree.map(np.asarray, prefetch.init_params(SHAPE, CFG, jax.random.key(1)))}
    card = {'base': str(root / 'base'), 'base_hash': params_hash(base), 'config': {}, 'data': 'none', 'steps': 0,
            'seed': 0, 'command': 'none', 'metrics': {}, 'target': PrefetchTask(CFG, SHAPE).decodes()}
    zoo.save('ahead', tree, card, root / 'zoo')
    return root


@pytest.fixture
def shelf(made, monkeypatch):
    monkeypatch.setattr(zoo, 'ROOT', made / 'zoo')
    return made


def test_a_name_decodes_what_the_model_decodes(shelf):
    loaded = models.load('ahead')
    target, params = models.target(loaded)
    plain = decode.generate(target.reference, STEPWISE, params, PROMPTS, max_new_tokens=5)
    few = dataclasses.replace(target, share=0.2)
    seen = {0: [], 1: []}
    out = decode.generate(few, STEPWISE, params, PROMPTS, max_new_tokens=5,
                          on_tokens=lambda row, ids: seen[row].extend(ids))
    assert out.tokens == plain.tokens == [seen[0], seen[1]] and few.slots == 4
    counts = few.counted['decoding']
    assert counts['bytes'] > 0 and counts['hits'] + counts['late'] + counts['demand'] > 0
    assert out.rounds.tolist() == [4, 4] and out.mean_accepted_tokens == 1
    assert decode.warm_up(few, STEPWISE, params, PROMPTS, max_new_tokens=5) > 0


def test_what_it_cannot_do_is_said(shelf):
    loaded = models.load('ahead')
    target, params = models.target(loaded)
    with pytest.raises(RequestError, match='PromptLookup drafts for the jitted loop'):
        decode.generate(target, PromptLookup(2), params, PROMPTS, max_new_tokens=5)
    with pytest.raises(ConfigError, match='no pass can be traced'):
        target.init_cache(1, 8, 0)
    for wrong, said in (({'predictor': 'tarot'}, "predictor: unknown 'tarot'"), ({'share': 0}, 'share must be above 0'),
                        ({'slots': 3}, 'takes no argument slots')):
        with pytest.raises(ConfigError, match=said):
            models.make_target(loaded, arguments=wrong)
    with pytest.raises(FormatError, match='trained on'):
        artefacts.find_target('ahead', 'f' * 64, 'float32', {})


def test_what_the_simulator_needs_is_measured(shelf):
    measure = lambda *flags: expert_times.measure(expert_times.parse(['--repeats=2', *flags]))
    found = measure(f'--model={shelf / "base"}')
    assert set(found) == {'attention', 'experts', 'copy'} and all(len(t) == 2 and min(t) > 0 for t in found.values())
    with pytest.raises(RequestError, match='either --model or --preset'):
        measure()


def test_rows_of_the_comparison(shelf):
    config = compare_config.get_config('tiny')
    config.model, config.dtypes, config.repeats = str(shelf / 'base'), ('float32',), 2
    config.identity_batch_sizes, config.curve, config.max_new_tokens, config.prompts.count = (), (1,), 6, 1
    row = lambda **settings: compare_config.method(artefact='ahead', target_kwargs=settings)
    config.methods = {'plain': config.methods.plain, 'on_demand': row(predictor='none', keep=False, share=0.2),
                      'lru': row(predictor='none', share=0.5), 'ahead': row(share=0.5)}
    rows = {row.method: row for row in compare.run(config, progress=False).rows}
    assert all(row.identical_rate == 1 for row in rows.values())
    assert rows['plain'].pays == 'baseline' and rows['ahead'].pays != 'baseline'
    moved = {name: rows[name].settings['decoding']['bytes'] for name in ('on_demand', 'lru')}
    assert moved['on_demand'] > moved['lru'] > 0 and rows['ahead'].settings['slots'] == 9
