"""The comparison: its result file, its verdicts, and what it makes of methods that break their promise."""

import dataclasses
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from backbone import layout, model, tokenizer, vocabulary
from backbone.config import ModelConfig
from backbone.errors import ConfigError, FormatError
from backbone.formats.tensors import Loaded
from backbone.model import PlainTarget
from backbone.presets import PRESETS
from configs import compare as compare_config
from harness import (
    artefacts,
    compare,
    components,
    decode,
    evaluate,
    models,
    report,
    scoring,
    subjects,
    verdict,
    zoo,
)
from harness import results as results_module
from harness.baselines import Autoregressive
from harness.components import build
from harness.prompts import Prompt, questions
from harness.results import Mismatch, Results, Row, Spread
from harness.rows import NearTies, agreement, by_position
from m2r2 import expert_target
from tests.harness import gained, test_models

pytestmark = pytest.mark.usefixtures('quick_compile')
ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('compare*.py'))


# --- the run ---------------------------------------------------------------------------------------------------


def test_rows_are_every_method_at_every_dtype_then_identity_only(tiny_results):
    methods = ['plain', 'early_exit', 'prompt_lookup']
    assert [(r.method, r.dtype, r.batch, r.tokens_per_s is None) for r in tiny_results.rows] == [
        *[(m, 'float32', 1, False) for m in methods], *[(m, 'bfloat16', 1, False) for m in methods],
        *[(m, 'float32', 2, True) for m in methods]]


def test_float32_is_identical_to_plain_decoding(tiny_results):
    assert all(r.identical_rate == 1 for r in tiny_results.rows if r.dtype == 'float32')
    assert all(r.quality == 1 for r in tiny_results.rows)


def test_the_baseline_is_its_own_measure(tiny_results):
    for row in tiny_results.rows:
        if row.pays == 'baseline':
            assert row.method == 'plain' and row.mean_accepted_tokens == 1
            assert dataclasses.astuple(row.speedup_spread) == pytest.approx((1, 1, 1, 1, 1))
            assert row.break_even == pytest.approx(1)
            assert row.acceptance_by_position == []


def test_speed_counts_tokens_after_the_first_of_each_prompt(tiny_results):
    for row in (r for r in tiny_results.rows if r.tokens_per_s):
        assert len(row.tokens_per_s_repeats) == 2
        assert row.tokens_per_s == pytest.approx(statistics.median(row.tokens_per_s_repeats))
        # 2 prompts of 8 tokens: 14 of the 16 come from decoding, and the rounds made them.
        assert row.tokens == 16
        assert row.mean_accepted_tokens * row.rounds == pytest.approx(14)
        decode_s = statistics.median(14 / v for v in row.tokens_per_s_repeats)
        assert row.round_ms == pytest.approx(1e3 * decode_s / row.rounds)
        assert row.tokens_per_s_with_prefill < row.tokens_per_s * 16 / 14
        assert row.usd_per_million == pytest.approx(0.1 / 3600 / row.tokens_per_s * 1e6)


def test_bytes_a_token_follow_the_model(tiny_results):
    plain = {r.dtype: r for r in tiny_results.rows if r.method == 'plain' and r.batch == 1}
    weights = tiny_results.floor['float32'].weight_bytes
    # Above: activations, and the whole capacity of the cache. Half of it in bfloat16.
    assert weights <= plain['float32'].bytes_per_token < 3 * weights
    assert plain['bfloat16'].bytes_per_token < 0.6 * plain['float32'].bytes_per_token
    both = next(r for r in tiny_results.rows if r.method == 'plain' and r.batch == 2)
    assert both.bytes_per_token < plain['float32'].bytes_per_token  # two rows share one reading of the weights


def test_the_curve_starts_at_one(tiny_results):
    assert {(p.dtype, p.k): p.ratio for p in tiny_results.curve if p.k == 1} == {
        ('float32', 1): 1, ('bfloat16', 1): 1}
    assert {p.k for p in tiny_results.curve} == {1, 2}


def test_a_result_says_where_it_comes_from(tiny_results):
    assert tiny_results.schema == 'headway.compare/1'
    asked = compare_config.get_config('tiny').methods.prompt_lookup.kwargs.to_dict()
    assert tiny_results.config['methods']['prompt_lookup']['kwargs'] == asked != {}
    assert tiny_results.versions['jax'] and tiny_results.device['platform']
    assert set(tiny_results.git) == {'revision', 'dirty'}
    assert [len(p['plain_output']) for p in tiny_results.prompts] == [8, 8]


# --- the file --------------------------------------------------------------------------------------------------


def test_the_file_reads_back_as_it_was(tiny_results):
    data = json.loads(json.dumps(tiny_results.to_dict(), allow_nan=False))
    assert Results.from_dict(data).to_dict() == data


def _at(data, path):
    for key in path[:-1]:
        data = data[key]
    return data, path[-1]


@pytest.mark.parametrize(('path', 'value', 'said'), [
    (('rows', 0, 'speedup'), 'fast', r'rows\[0\].speedup must be a number'),
    (('rows', 1, 'batch'), 1.5, r'rows\[1\].batch must be int'),
    (('rows', 0, 'pays'), 'perhaps', 'perhaps'),
    (('rows', 0, 'mode'), 'exact', 'exact'),
    (('schema',), 'headway.compare/0', 'headway.compare/0'),
    (('floor', 'float32', 'bytes_per_s', 'q1'), True, 'floor.float32.bytes_per_s.q1'),
    (('rows',), {}, 'rows must be a list'),
])
def test_a_wrong_value_is_named(tiny_results, path, value, said):
    data = tiny_results.to_dict()
    holder, key = _at(data, path)
    holder[key] = value
    with pytest.raises(FormatError, match=said):
        Results.from_dict(data)


def test_missing_and_unknown_fields_are_named(tiny_results):
    data = tiny_results.to_dict()
    del data['rows'][2]['tokens_per_s']
    with pytest.raises(FormatError, match=r"rows\[2\]: missing field 'tokens_per_s'"):
        Results.from_dict(data)
    data = tiny_results.to_dict() | {'extra': 1}
    with pytest.raises(FormatError, match="unknown field 'extra'"):
        Results.from_dict(data)


@pytest.mark.parametrize('kind', [Results, Row, Mismatch])
def test_every_field_is_documented(kind):
    text = (ROOT / 'docs' / 'compare.md').read_text()
    assert [f.name for f in dataclasses.fields(kind) if f'`{f.name}`' not in text] == []


# --- promises broken -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shifted:
    """A target that breaks its promise wherever more than one token is run: its argmax moves by one."""

    cfg: object
    stacked: bool = False
    cache_dtype: str = 'float32'
    exact: bool = True
    reference: object = None

    def _plain(self):
        return PlainTarget(self.cfg, self.cache_dtype, self.stacked)

    vocab_size = property(lambda self: self.cfg.vocab_size)
    max_seq_len = property(lambda self: self.cfg.max_seq_len)

    def init_cache(self, *args):
        return self._plain().init_cache(*args)

    def forward(self, params, tokens, cache, **kwargs):
        output = self._plain().forward(params, tokens, cache, **kwargs)
        return output.replace(logits=jnp.roll(output.logits, 1, -1)) if kwargs.get('logits_at') is None else output


def test_a_lossless_method_that_is_not_never_pays(tiny_config, monkeypatch):
    module = types.ModuleType('broken_promises')
    module.Shifted = Shifted
    monkeypatch.setitem(sys.modules, 'broken_promises', module)
    config = tiny_config(dtypes=('float32',), identity_batch_sizes=(), time_parts=False, curve=(1,))
    with config.unlocked():
        del config.methods['early_exit']
    config.methods.prompt_lookup.target = 'broken_promises.Shifted'
    rows = {r.method: r for r in compare.run(config, progress=False).rows}
    bad = rows['prompt_lookup']
    assert bad.identical_rate == 0 and bad.pays == 'no' and 'NOT LOSSLESS' in bad.verdict
    assert [m.position for m in bad.mismatches] == [1, 1]  # prefill chose the first token well
    assert not any(m.near_tie for m in bad.mismatches)
    assert bad.draft_ms is None and bad.break_even is None  # time_parts was off

    # The same thing, honestly called: its quality is measured and the identical rate is only a fact about it.
    config.methods.prompt_lookup.mode = 'approximate'
    honest = {r.method: r for r in compare.run(config, progress=False).rows}['prompt_lookup']
    assert 'NOT LOSSLESS' not in honest.verdict
    assert honest.quality < 0.5
    assert rows['plain'].quality == 1


def test_a_flip_within_rounding_is_a_near_tie_and_another_is_not():
    cfg = PRESETS['smollm2-135m'].replace(num_layers=1, hidden_size=32, vocab_size=64)
    cfg = cfg.replace(attention=dataclasses.replace(cfg.attention, num_heads=2, num_kv_heads=1, head_dim=8),
                      mlp=dataclasses.replace(cfg.mlp, intermediate_size=32))
    base = model.init_params(cfg, jax.random.key(0))
    prompt = [3, 5, 7]
    order = np.argsort(np.asarray(model.forward(cfg, base, jnp.array([prompt]))[0, -1]))
    best, worst = int(order[-1]), int(order[0])
    # Twin embeddings: two tokens of one logit, up to rounding.
    twin = int(order[-2])
    tied = base | {'embed': {'tokens': base['embed']['tokens'].at[twin].set(base['embed']['tokens'][best])}}
    prompts = [types.SimpleNamespace(ids=tuple(prompt))]
    near = NearTies(cfg, tied).look('bfloat16', prompts, 0, [twin], [best], 0)
    assert near.near_tie and abs(near.logit_gap) < 1e-6 and near.rounding > 0
    far = NearTies(cfg, base).look('bfloat16', prompts, 0, [worst], [best], 0)
    assert not far.near_tie and far.logit_gap > 2 * far.rounding
    assert not NearTies(cfg, base).look('bfloat16', prompts, 0, [], [best], 0).near_tie  # an output that ended early


# --- other models ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ShiftedGained(gained.GainedTarget):
    """Breaks its promise where three tokens are run."""

    packed: bool = True
    shifts: int = 3  # blocks of so many tokens

    def forward(self, params, tokens, cache, **kwargs):
        output = super().forward(params, tokens, cache, **kwargs)
        return output.replace(logits=jnp.roll(output.logits, 1, -1)) if tokens.shape[1] == self.shifts else output


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Directories of a plain run and of one whose model has gains beside its base; another base, same words."""
    folder, shape = tmp_path_factory.mktemp('models'), test_models.SHAPE | {'num_layers': 1}
    test_models.run_directory(folder / 'plain', (3,), model=shape)
    test_models.run_directory(folder / 'gained', (4,), factory='tests.harness.gained.build', model=shape)
    (folder / 'text').write_text('abc' * 60)
    return folder


@pytest.fixture(scope='module')
def of_two_models(runs, tiny_config):
    """The results, and what plain decoding of the other model says."""
    config = tiny_config(dtypes=('float32',), identity_batch_sizes=(), time_parts=False, curve=(1,), repeats=1)
    other, lookup = str(runs / 'gained'), 'harness.baselines.PromptLookup'
    methods = {'plain': compare_config.method('harness.baselines.Autoregressive'),
               'other': compare_config.method(model=other),
               'other_lookup': compare_config.method(lookup, model=other, block=2, max_ngram=1),
               'broken': compare_config.method(lookup, model=other, block=2, max_ngram=1,
                                               target=f'{__name__}.ShiftedGained')}
    with config.unlocked():
        config.methods, config.model = ConfigDict(methods), str(runs / 'plain')
        config.quality = ConfigDict({'task': f'ppl:{runs / "text"}', 'limit': 2})
    prompts = [Prompt(text, tuple(text.encode())) for text in ('abcab', 'bcabc')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, 'load_prompts', lambda *_: prompts)
        results = compare.run(config, progress=False)
    target, params = models.target(models.load(other))
    made = decode.generate(target, Autoregressive(), params, [p.ids for p in prompts], max_new_tokens=8)
    return results, made.tokens


def test_another_model_is_held_against_itself(of_two_models):
    results, plain = of_two_models
    rows = {row.method: row for row in results.rows}
    assert [p['plain_output'] for p in results.prompts] != plain, 'the two models say different things'
    assert rows['plain'].pays == 'baseline' and rows['plain'].model == ''
    for name in ('other', 'other_lookup'):
        assert rows[name].identical_rate == 1 and rows[name].model == results.config['methods'][name]['model'] != ''
        assert rows[name].pays in ('yes', 'no', 'even') and 'of the compared model' in rows[name].verdict
    assert rows['other_lookup'].mean_accepted_tokens > 1 and 'of its own, ' in rows['other_lookup'].verdict
    assert 'of its own, ' not in rows['other'].verdict
    broken = rows['broken']
    assert broken.identical_rate < 1 and broken.pays == 'no' and 'NOT LOSSLESS' in broken.verdict
    first = broken.mismatches[0]
    assert first.plain_token == plain[first.prompt][first.position] != first.token and not first.near_tie


def test_the_quality_of_both_models_stands_beside_their_speed(of_two_models, runs):
    rows = {row.method: row for row in of_two_models[0].rows}
    task = f'ppl:{runs / "text"}'
    for name, folder in (('plain', 'plain'), ('other', 'gained')):
        scorer = scoring.Scorer.of(models.load(runs / folder), progress=False)
        want = evaluate.measure(scorer, [task], 2)[task]
        assert (rows[name].perplexity, rows[name].bits_per_byte) == (want['perplexity'], want['bits_per_byte'])
    assert rows['plain'].bits_per_byte != rows['other'].bits_per_byte == rows['other_lookup'].bits_per_byte
    # A cache holds what its formula says: keys and values of 1 layer, 1 head of 8, in float32.
    assert {row.kv_bytes_per_token for row in rows.values()} == {row.kv_bytes_formula for row in rows.values()} == {64}
    assert all(row.predicted_ms > 0 for row in rows.values())
    text = report.table(of_two_models[0])
    assert all(word in text for word in ('bits/byte', 'perplexity', 'cache', 'formula', 'predicted'))
    assert 'bits a byte on the held-out text' in text
    assert '<th scope="col">bits/byte' in report.html(of_two_models[0], {})
    assert Results.from_dict(of_two_models[0].to_dict()).rows == of_two_models[0].rows


def test_agreement_is_counted_step_by_step(of_two_models, runs):
    """A target that is wrong in blocks alone agrees; one that is wrong in steps has its prompt's token right."""
    plain = dict(enumerate(of_two_models[1]))
    prompts = [Prompt(text, tuple(text.encode())) for text in ('abcab', 'bcabc')]
    loaded = models.load(runs / 'gained')
    for size, share in ((3, 1), (1, 1 / 8)):
        target = ShiftedGained(loaded.config, shifts=size)
        row = types.SimpleNamespace(target=target, params=models.pack(loaded), outputs=plain)
        assert agreement(row, prompts, plain) == share


def test_columns_of_models_are_not_there_without_any(tiny_results):
    assert report.columns(tiny_results.rows) == report.COLUMNS


def test_a_file_from_before_reads(tiny_results):
    data = json.loads(json.dumps(tiny_results.to_dict()))
    for row in data['rows']:
        for field in results_module.LATER:
            del row[field]
    assert [row.model for row in Results.from_dict(data).rows] == [''] * len(data['rows'])
    del data['model']
    with pytest.raises(FormatError, match="missing field 'model'"):
        Results.from_dict(data)


def test_prompts_of_a_file_are_continued_as_they_are(tmp_path):
    """Models without a chat template take these."""
    source = tmp_path / 'prompts.txt'
    source.write_text('one\nfour words are here\ntwo\n')
    found = questions(str(source), 2, tokenizer.of_bytes(), max_tokens=3)
    assert [(p.name, bytes(p.ids)) for p in found] == [('prompts.txt/1', b'one'), ('prompts.txt/3', b'two')]
    with pytest.raises(ConfigError, match='unknown .*absent.txt'):
        questions(str(tmp_path / 'absent.txt'), 1, tokenizer.of_bytes())
    with pytest.raises(ConfigError, match='has 3 questions'):
        questions(str(source), 4, tokenizer.of_bytes())


def test_models_that_cannot_be_compared_are_named(runs, tiny_config):
    other = models.load(runs / 'gained')
    words = tokenizer.from_merges([*vocabulary.byte_tokens(), 'ab', tokenizer.END_OF_TEXT], [])
    with pytest.raises(ConfigError, match='gained@4 and mine do not have the same tokenizer'):
        subjects.check_same_words(dataclasses.replace(other, name='mine', tokenizer=words), other)
    with pytest.raises(ConfigError, match='gained@4 beside random: random has no tokenizer'):
        subjects.check_same_words(dataclasses.replace(other, name='random', tokenizer=None), other)
    config = tiny_config(dtypes=('float32',), identity_batch_sizes=())
    with config.unlocked():
        config.model = str(runs / 'plain')
        config.methods = ConfigDict({'plain': compare_config.method('harness.baselines.Autoregressive'),
                                     'drafted': compare_config.method('harness.baselines.PromptLookup',
                                                                      model=str(runs / 'gained'), block=2)})
    with pytest.raises(ConfigError, match='methods.drafted: no row decodes .*gained plainly'):
        compare.make_benches(config, subjects.load(config), 2)
    config.quality.task = 'piqa'
    with pytest.raises(ConfigError, match='quality.task'):
        compare.check(config)


# --- verdicts --------------------------------------------------------------------------------------------------


def spread(low, middle, high):
    return Spread(middle, low, high, low, high)


@pytest.mark.parametrize(('speedup', 'word'), [
    (spread(1.1, 1.2, 1.3), 'yes'), (spread(0.7, 0.8, 0.9), 'no'), (spread(0.9, 1.05, 1.1), 'even'), (None, 'untimed')])
def test_pays_needs_the_middle_half_of_the_repeats(speedup, word):
    assert verdict.pays(speedup, identical=True, lossless=True, exact_dtype=True) == word


def test_an_approximate_or_rounded_difference_may_pay():
    fast = spread(1.1, 1.2, 1.3)
    assert verdict.pays(fast, identical=False, lossless=True, exact_dtype=False) == 'yes'
    assert verdict.pays(fast, identical=False, lossless=False, exact_dtype=True) == 'yes'
    assert verdict.pays(fast, identical=False, lossless=True, exact_dtype=True) == 'no'


def test_break_even_is_where_a_round_costs_what_it_makes():
    block, draft, verify = 4, 0.1, 0.35
    accepted = verdict.break_even(block, draft, verify)
    round_cost = block * draft + 1 + verify  # in plain steps; plain decoding makes one token a step
    assert accepted / round_cost == pytest.approx(1)


ABOUT = {'method': 'm', 'dtype': 'bfloat16', 'batch': 1, 'lossless': True, 'identical': True, 'exact_dtype': False}


@pytest.mark.parametrize(('accepted', 'draft', 'verify', 'host', 'said'), [
    (1.2, 0.2, 0.1, 0.0, 'drafting costs most'),
    (1.2, 0.01, 0.5, 0.0, 'verifying 5 tokens costs most'),
    (1.0, 0.001, 0.01, 0.0, 'hardly anything is accepted'),
    (1.6, 0.01, 0.1, 0.7, r'rest of the round \(0.70 plain steps\) eats the gain'),
    (1.6, 0.01, 0.1, 0.0, 'timed apart from the rounds, do not add up'),
])
def test_a_verdict_names_what_ate_the_gain(accepted, draft, verify, host, said):
    import re
    line = verdict.explain(pays='no', **ABOUT, speedup=spread(0.7, 0.8, 0.9), mean_accepted=accepted, block=4,
                           draft_cost=draft, verify_cost=verify, host_cost=host)
    assert re.search(said, line) and 'does not pay, 0.80x' in line


def test_a_gain_that_another_dtype_beats_says_so():
    line = verdict.explain(pays='yes', **ABOUT, speedup=spread(1.1, 1.2, 1.3), speedup_any_dtype=0.9,
                           fastest_plain_dtype='int8', mean_accepted=1.5, block=2, draft_cost=0.1, verify_cost=0.1)
    assert 'plain int8 decoding is faster still (0.90x' in line


def test_first_difference():
    assert verdict.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert verdict.first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert verdict.first_difference([1, 2], [1, 2, 3]) == 2
    assert verdict.first_difference([], [4]) == 0


def test_acceptance_by_position():
    # 10 rounds: 4 proposed nothing, 6 proposed 2; of those 3 kept none, 1 kept one, 2 kept both.
    shares = by_position(np.array([7, 1, 2]), np.array([4, 0, 6]))
    assert shares == pytest.approx([3 / 6, 2 / 6])


def test_spread_is_numpys():
    values = [5.0, 1.0, 9.0, 2.0, 2.5]
    made = Spread.of(values)
    assert dataclasses.astuple(made) == pytest.approx(
        [np.median(values), *np.quantile(values, [0.25, 0.75]), min(values), max(values)])


# --- configs and bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('variant', ['', 'tiny'])
def test_every_config_builds(name, variant, monkeypatch):
    def from_card(artefact, cfg, base_hash, arguments):  # the drafter alone: no base is loaded here
        if artefact in zoo.names():
            spec = json.loads((zoo.ROOT / artefact / zoo.CARD).read_text())['drafter']
        else:  # a run of configs/compare_rad.py
            spec = {'factory': 'rad.drafter.build', 'kwargs': {'rad': {'layers': (1,)}}}
        made = components.build(spec['factory'], spec['kwargs'] | dict(arguments), {'cfg': cfg}, artefact)
        return made, lambda *_: {}

    def from_run(artefact, base_hash, cache_dtype, arguments):  # configs/compare_moe.py names runs, all else the zoo
        if artefact in zoo.names():
            spec = zoo.read_card(artefact).get('target')
            given = {'cache_dtype': cache_dtype, 'packed': True}
            return spec and (components.build(spec['factory'], spec['kwargs'] | dict(arguments), given, artefact),
                             lambda *_: {})
        return expert_target.build(PRESETS['olmoe-1b-7b'].to_dict(), {}, **arguments), lambda *_: {}

    monkeypatch.setattr(artefacts, 'find', from_card)
    monkeypatch.setattr(artefacts, 'find_target', from_run)
    module = importlib.import_module(f'configs.{name}')
    config = module.get_config(variant)
    compare.check(config)
    cfg = PRESETS['smollm2-135m'] if not variant else ModelConfig.from_dict(config.random_model.to_dict())
    base = layout.pack(model.init_params(cfg, jax.random.key(0))) if variant else None  # small ones may be looked at
    main = subjects.Subject(Loaded(cfg, {}, None, 'main', ''), {dtype: {'base': base} for dtype in config.dtypes})
    others = {spec.model: main for spec in config.methods.values()}  # as they are decoded: none is loaded here
    benches = compare.make_benches(config, others | {'': main}, config.prompts.count)
    assert {b.dtype for b in benches} == set(config.dtypes)
    assert f'--config=configs/{name}.py' in module.__doc__ and 'minute' in module.__doc__


def test_the_default_comparison_is_the_one_the_readme_shows():
    config = importlib.import_module('configs.compare').get_config()
    assert (config.model, config.prompts.count, config.max_new_tokens) == ('smollm2-135m', 4, 48)
    assert config.repeats >= 5 and config.curve == (1, 2, 4, 8, 16)
    assert config.batch_sizes == (1,) and config.identity_batch_sizes == (4,)


@pytest.mark.parametrize(('change', 'said'), [
    ({'repeats': 0}, 'repeats must be at least 1'),
    ({'dtypes': ('int4',)}, 'int4'),
    ({'curve': (2, 4)}, 'curve must contain 1'),
    ({'batch_sizes': (9,)}, 'batch size 9'),
])
def test_a_config_that_cannot_run_is_refused_by_name(tiny_config, change, said):
    config = tiny_config(**change)
    with pytest.raises(ConfigError, match=said):
        compare.run(config, progress=False)


def test_methods_are_refused_by_name(tiny_config):
    config = tiny_config()
    config.methods.early_exit.kwargs.layer = 7
    with pytest.raises(ConfigError, match='layer 7'):
        compare.run(config, progress=False)
    config = tiny_config()
    config.methods.early_exit.mode = 'exactish'
    with pytest.raises(ConfigError, match='methods.early_exit.mode'):
        compare.run(config, progress=False)
    config = tiny_config()
    del config.methods['plain']
    with pytest.raises(ConfigError, match='no plain row'):
        compare.run(config, progress=False)


@pytest.mark.parametrize(('path', 'kwargs', 'said'), [
    ('harness.baselines.Nope', {}, "methods.x: cannot import 'harness.baselines.Nope'"),
    ('no_such_module.Thing', {}, 'no_such_module'),
    ('Autoregressive', {}, "cannot import 'Autoregressive'"),
    ('harness.baselines.PromptLookup', {'blok': 3}, 'takes no argument blok'),
    ('harness.baselines.EarlyExit', {'block': 3}, 'needs cfg, layer'),
])
def test_a_factory_is_refused_by_name(path, kwargs, said):
    with pytest.raises(ConfigError, match=said):
        build(path, kwargs, {}, 'methods.x')


@pytest.mark.parametrize(('flags', 'said'), [
    (['--config.nope=1'], 'nope'),
    (['--config.methods.prompt_lookup.kwargs.blok=1'], 'blok'),
    (['--config=configs/absent.py'], 'absent.py'),
    (['--workdir=setup.py/out'], 'workdir setup.py/out'),
    (['stray'], 'stray'),
])
def test_the_entrypoint_refuses_in_one_line_with_code_2(tmp_path, flags, said):
    done = subprocess.run([sys.executable, '-m', 'harness.launch.compare', '--config=configs/compare.py:tiny',
                           f'--workdir={tmp_path / "out"}', *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('headway: error:') and said in lines[0]
    assert not (tmp_path / 'out').exists()
