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

from backbone import model
from backbone.errors import ConfigError, FormatError
from backbone.model import PlainTarget
from backbone.presets import PRESETS
from configs import compare as compare_config
from harness import artefacts, compare, components, verdict, zoo
from harness.components import build
from harness.results import Mismatch, Results, Row, Spread
from harness.rows import NearTies, by_position

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
        spec = json.loads((zoo.ROOT / artefact / zoo.CARD).read_text())['drafter']
        made = components.build(spec['factory'], spec['kwargs'] | dict(arguments), {'cfg': cfg}, artefact)
        return made, lambda *_: {}

    monkeypatch.setattr(artefacts, 'find', from_card)
    module = importlib.import_module(f'configs.{name}')
    config = module.get_config(variant)
    compare.check(config)
    cfg = PRESETS['smollm2-135m'] if not variant else compare.ModelConfig.from_dict(config.random_model.to_dict())
    benches = compare.make_benches(config, cfg, dict.fromkeys(config.dtypes), config.prompts.count)
    assert {b.dtype for b in benches} == {'float32', 'bfloat16'}
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
