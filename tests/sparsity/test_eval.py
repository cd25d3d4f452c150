"""The measure: one token at a time with the text given, and the script that compares everything by it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import tokenizer
from backbone.errors import RequestError
from backbone.model import PlainTarget, forward
from harness import stepwise
from harness.scoring import Row, Scorer
from scripts import sparsity_eval, sparsity_speed, sparsity_ways
from sparsity import selectors
from sparsity.config import SparsityConfig
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=257, hidden=16, layers=2, heads=2, kv_heads=1, max_seq_len=64)
TOKENS = np.random.default_rng(0).integers(0, 257, (3, 20)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Deaf(PlainTarget):
    """Exact on blocks; single tokens hear nothing of what came before."""

    def forward(self, params, tokens, cache, **options):
        if tokens.shape[1] == 1:
            options['masks'] = {'heads': jnp.zeros((self.cfg.num_layers, self.cfg.attention.num_heads))}
        return super().forward(params, tokens, cache, **options)


@pytest.fixture(scope='module')
def base():
    return lively(CFG)


def test_steps_are_the_whole_sequence_for_a_target_that_loses_nothing(base):
    """From uneven places, the first token of all included; and a target that approximates single steps is seen to."""
    starts = np.array([1, 6, 13], np.int32)
    run = lambda target: stepwise.forced(target, {'base': base}, TOKENS, starts, 12, 7)
    cache, logprobs, choices = run(PlainTarget(CFG))
    logits = forward(CFG, base, TOKENS)
    expected = np.asarray(jax.nn.log_softmax(logits))
    for row, start in enumerate(starts):
        gold = TOKENS[row, start:start + 7]
        at = np.arange(start - 1, start + 6)
        np.testing.assert_allclose(logprobs[row], expected[row, at, gold], atol=1e-4)
        np.testing.assert_array_equal(choices[row], expected[row, at].argmax(-1))
    np.testing.assert_array_equal(cache.pos, starts + 6)
    assert np.abs(run(Deaf(CFG))[1] - logprobs).max() > 1e-2, 'what the whole-sequence measure would not see'


def test_nothing_that_is_scored_is_read_before(base):
    """The prompt's pass is as wide as the widest prompt: what lies behind a shorter one is not shown to it."""
    seen = []

    class Watched(PlainTarget):
        def forward(self, params, tokens, cache, **options):
            if tokens.shape[1] > 1:
                jax.debug.callback(lambda t: seen.append(np.asarray(t)), tokens)
            return super().forward(params, tokens, cache, **options)

    starts = np.array([3, 9, 13], np.int32)
    jax.block_until_ready(stepwise.forced(Watched(CFG), {'base': base}, TOKENS, starts, 12, 4)[1])
    jax.effects_barrier()
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(seen[0][row], np.where(np.arange(12) < start - 1, TOKENS[row, :12], 0))


@pytest.mark.slow
def test_a_step_scorer_is_a_scorer_of_what_decodes(base):
    scorer = Scorer(CFG, {'base': base}, tokenizer.of_bytes(), 2, progress=False)
    rows = [Row(tuple(TOKENS[0]), 5), Row(tuple(TOKENS[1, :9]), 8), Row(tuple(TOKENS[2, :4]), 1)]
    want = scorer.score(rows)
    for found, exact in zip(stepwise.of(scorer, PlainTarget(CFG), {'base': base}).score(rows), want, strict=True):
        np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=1e-4)
        assert found.greedy == exact.greedy
    assert abs(stepwise.of(scorer, Deaf(CFG), {'base': base}).score(rows)[0].total - want[0].total) > 1e-2


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def work():
    return sparsity_eval.tiny(sparsity_eval.parse(['--tiny', '--out=none']))[0]


def test_every_method_stands_where_it_can_and_dense_once():
    points = sparsity_eval.points_of(['ours', 'static', 'cats', 'teal'], ['heads', 'neurons', 'both'], [1.0, 0.5], [],
                                     ['share', 'bytes'])
    keys = [point.key for point in points]
    assert keys[0] == 'dense/both/share1' and len(set(keys)) == len(keys)
    assert {key for key in keys if key.startswith(('cats', 'teal'))} == {
        f'{name}/{by}0.5' for name in ('cats/neurons', 'teal/both') for by in ('share', 'bytes')}
    assert 'static/both/bytes0.5' not in keys and 'ours/heads/bytes0.5' in keys
    assert not any(key.endswith('1') for key in keys[1:])


def test_equal_bytes_pay_for_the_predictor(work):
    """What is kept at equal bytes is less than at equal share, by what the predictor reads; what costs nothing keeps
    its share; and a predictor that is asked less often costs less."""
    budget = sparsity_ways.bytes_of(work, 'random', 'neurons', 0.5)
    at = lambda work, method: sparsity_ways.share_at(work, method, 'neurons', budget)
    share = at(work, 'ours')
    assert share < 0.5 and sparsity_ways.bytes_of(work, 'ours', 'neurons', share) <= budget
    assert sparsity_ways.bytes_of(work, 'ours', 'neurons', share + 1 / 12) > budget, 'one block more is too much'
    assert at(work, 'random') == 0.5
    seldom = dataclasses.replace(work, settings=work.settings | {'refresh': 8})
    price = lambda work: sparsity_ways.bytes_of(work, 'ours', 'neurons', 0.5) - budget
    assert 0 < price(seldom) == pytest.approx(price(work) / 8)
    mine = work.trained['ours']
    size = lambda s: selectors.Predictor(work.cfg, s, mine.p).size({'sparsity': mine.params})
    parts = {part: size(SparsityConfig(**{part: 0.5})) for part in ('heads', 'neurons')}
    assert sum(parts.values()) == sum(4 * a.size for a in jax.tree.leaves(mine.params)) and min(parts.values()) > 0


def test_what_is_recorded_for_several_tokens_is_their_sum():
    a = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(sparsity_ways.window_sums(a, 1), a)
    np.testing.assert_array_equal(sparsity_ways.window_sums(a, 3)[0], [3, 6, 9, 12, 9, 5])


@pytest.mark.slow
def test_the_tiny_form_runs_goes_on_and_refuses_other_settings(tmp_path):
    args = lambda *more: sparsity_eval.parse([
        '--tiny', f'--out={tmp_path}', '--shares', '0.5', '--methods', 'oracle', 'random', 'cats', 'teal', '--parts',
        'neurons', 'both', '--by', 'share', *more])
    rows = sparsity_eval.main(args())
    found = {row['key']: row for row in rows}
    assert {row['method'] for row in rows} == {'dense', 'ours', 'dejavu_style', 'oracle', 'random', 'cats', 'teal'}
    for row in rows[1:]:
        assert row['bytes'] < row['dense_bytes'] and row['perplexity'] > 1 and row['ratio_stderr'] >= 0
    # Half the gates of a model with ReLU are zero: leaving out those below the median changes next to nothing.
    nll = lambda key: np.array(found[key]['nll_by_window'])
    apart = lambda name: np.abs(nll(f'{name}/neurons/share0.5') - nll('dense/both/share1')).mean()
    assert 4 * apart('cats') < apart('random')
    lines = (tmp_path / 'rows.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'rows.jsonl').write_text(''.join(lines[:-1]) + lines[-1][:20])
    assert sparsity_eval.main(args()) == rows
    assert (tmp_path / 'sparsity.png').stat().st_size > 1000 and '± ' in (tmp_path / 'table.md').read_text()
    zeros = json.loads((tmp_path / 'statistics.json').read_text())['zeros_by_layer']
    assert len(zeros) == 3 and min(zeros) > 0.2
    with pytest.raises(RequestError, match='other settings'):
        sparsity_eval.main(args('--refresh=2'))


@pytest.mark.slow
def test_the_times_come_with_their_bytes(tmp_path):
    report = sparsity_speed.main(sparsity_speed.parse(['--tiny', f'--out={tmp_path}', '--dtype=float32']))
    rows = {row['name']: row for row in report['shapes']['tiny']['rows']}
    assert rows['dense']['ratio']['median'] == 1 and 'dense, rows' in rows
    read = lambda m: rows[f'xla 0.5, {m}']['asked']
    assert read('m 1')['selector'] > 0 == read('free')['selector']
    assert read('m 1')['selector'] == pytest.approx(8 * read('m 8')['selector'])
    assert read('m 1')['weights'] == read('free')['weights'] < rows['xla neurons 0.5, m 8']['asked']['weights']
