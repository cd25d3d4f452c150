"""The contract for a staggered target: whatever drafts, it says what it says one token at a time, and that is what the
model in numpy says. Plain rounds run all stacks at once and drafted ones a pass a stack, so every identity here also
holds the two together.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.cache import WindowState, window_positions
from backbone.sampling import Sampling, law
from harness import decode as loop
from harness.baselines import Autoregressive, PromptLookup
from harness.decode import generate
from stagformer import layout
from stagformer import model as staggered_model
from stagformer.config import StagFormerConfig
from stagformer.target import StagFormerTarget
from tests.conftest import tiny_config
from tests.contract.conftest import NEW
from tests.contract.drafters import Ragged, Scripted
from tests.contract.test_sampled import PROMPT, SETTINGS, STEPS, VOCAB, chi_square
from tests.stagformer.reference import staggered
from tests.stagformer.test_model import params_of

SEPARATE = StagFormerConfig.even(tiny_config(layers=2), 2)
SHARED = StagFormerConfig.even(tiny_config(layers=1), 2, shared=True, window=3)
MODELS = {'separate': SEPARATE, 'shared, window': SHARED}
CASES = [f'{name} {form}' for name in MODELS for form in ('tuple', 'storage', 'arrays')]


def on(*cases):
    """A test of these in the suite, and of all others as slow ones."""
    return pytest.mark.parametrize('decoder', [
        *cases, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in cases)], indirect=True,
        scope='module')


class Decoder:
    """One model in one layout: its target, parameters beside those of the drafters, and what plain decoding says."""

    def __init__(self, name, form, params, prompts):
        self.cfg, self.prompts, self.stored = MODELS[name], prompts, params_of(MODELS[name], np.float32)
        packed = self.stored if form == 'storage' else layout.pack(self.cfg, self.stored, form=form)
        self.target, self.params = StagFormerTarget(self.cfg, form=form), params | packed
        self.plain = self(Autoregressive())
        rows = [p + t for p, t in zip(prompts, self.plain, strict=True)]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, ids in enumerate(rows):
            table[row, :len(ids)] = ids
        self.params['script'] = jnp.array(table)

    def __call__(self, drafter, **options):
        return generate(self.target, drafter, self.params, self.prompts, max_new_tokens=NEW, **options).tokens


@pytest.fixture(scope='module')
def decoder(request, params, prompts):
    return Decoder(*request.param.rsplit(' ', 1), {'tensorhead': params['tensorhead']}, prompts)


@on('separate tuple', 'shared, window tuple')
def test_plain_decoding_is_the_argmax_of_the_model_in_numpy(decoder):
    for prompt, new in zip(decoder.prompts, decoder.plain, strict=True):
        logits, _ = staggered(decoder.cfg, decoder.stored, prompt + new)
        assert logits.argmax(-1)[len(prompt) - 1:-1].tolist() == new
    assert len({tuple(new) for new in decoder.plain}) == 4


@on('separate tuple', 'shared, window tuple')
def test_prompt_lookup_is_plain_decoding(decoder, drafters):
    assert decoder(drafters['prompt_lookup']) == decoder.plain


@on('separate tuple')
def test_a_tensor_head_is_plain_decoding(decoder, drafters):
    assert decoder(drafters['tensorhead']) == decoder.plain


@on('separate tuple')
def test_lengths_differ_by_row_and_round(decoder):
    assert decoder(Ragged(3)) == decoder.plain


@on('shared, window tuple')
def test_right_then_wrong(decoder):
    got = generate(decoder.target, Scripted(3, wrong_from=1), decoder.params, decoder.prompts, max_new_tokens=NEW)
    assert got.tokens == decoder.plain and got.mean_accepted_tokens > 1.9


@on('shared, window tuple')
def test_streaming_stops_and_what_the_cache_holds(decoder):
    """Round by round with a stop token: the tokens, and after each round every slot in sight, leaf by leaf, are those
    of a fresh pass over what was kept."""
    stop = decoder.plain[2][5]
    want = [row[:row.index(stop) + 1] if stop in row else row for row in decoder.plain]
    request = loop.prepare(decoder.target, decoder.prompts, max_new_tokens=NEW, stop_tokens=[stop])
    drafter = Scripted(3, wrong_from=2)
    state = loop.start(decoder.target, drafter, decoder.params, request)
    last = jax.jit(lambda tokens, pos: decoder.target.forward(
        decoder.params, tokens, decoder.target.init_cache(4, request.capacity, 3), logits_at=pos - 1).cache.layers)
    is_memory = lambda m: hasattr(m, 'k')
    while not state.finished.all():
        state = loop.decode_one(decoder.target, drafter, decoder.params, state, **request.rounds)
        cache = state.cache
        fresh = last(cache.tokens[:, :request.capacity], cache.pos)
        for got, kept in zip(*(jax.tree.leaves(layers, is_leaf=is_memory) for layers in (cache.layers, fresh)),
                             strict=True):
            if isinstance(got, WindowState):
                held = window_positions(got, cache.pos)
                live = (held >= 0) & (held >= cache.pos[:, None] - decoder.cfg.window)
            else:
                live = jnp.arange(got.k.shape[-2]) < cache.pos[:, None]
            live = np.broadcast_to(live[:, None, :, None], got.k.shape)
            np.testing.assert_allclose(got.k[live], kept.k[live], atol=1e-4)
            np.testing.assert_allclose(got.v[live], kept.v[live], atol=1e-4)
    ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
    assert [ids[r, n:pos[r] + 1].tolist() for r, n in enumerate(request.lengths)] == want
    seen = [[] for _ in want]
    decoder(drafter, stop_tokens=[stop], on_tokens=lambda row, ids: seen[row].extend(ids))
    assert seen == want


@on('shared, window tuple')
def test_one_row_to_the_end_of_the_cache(decoder):
    """Prompt and new tokens fill the context to its last slot, blocks stick out over its end; one compilation."""
    target, last, want = decoder.target, tiny_config().max_seq_len, None
    for drafter in (Autoregressive(), PromptLookup(4)):
        before = loop.decode._cache_size(), loop.run_prompt._cache_size()
        rows = [generate(target, drafter, decoder.params, [[3] * n], max_new_tokens=last - n).tokens[0]
                for n in (40, 60, 50, 33)]
        grown = loop.decode._cache_size() - before[0], loop.run_prompt._cache_size() - before[1]
        assert grown in ((1, 1), (1, 0)) and [len(row) for row in rows] == [last - n for n in (40, 60, 50, 33)]
        want = want or rows
        assert rows == want


# --- sampled ----------------------------------------------------------------------------------------------------------


def continuations(cfg, params, sampling):
    """Probability of each of VOCAB ** STEPS continuations, by passes over all of them."""
    chains = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)))
    ids = jnp.concatenate([jnp.tile(jnp.array(PROMPT), (len(chains), 1)), chains], axis=1)
    laws = jax.jit(lambda p: law(staggered_model.forward(cfg, p, ids), sampling))(params)[:, len(PROMPT) - 1:-1]
    return np.asarray(jnp.take_along_axis(laws, chains[..., None], -1)[..., 0].prod(-1), np.float64)


@pytest.mark.parametrize('drafter, setting', [
    (PromptLookup(3), 'warped'), pytest.param(PromptLookup(3), 'plain', marks=pytest.mark.slow),
    pytest.param(Autoregressive(), 'warped', marks=pytest.mark.slow)])
def test_output_law(drafter, setting):
    """What it samples has the law of its whole pass; the control is the law of the same parameters without stagger."""
    base = tiny_config(vocab=VOCAB, hidden=8, layers=1, heads=1, kv_heads=1, max_seq_len=16)
    models = [StagFormerConfig.even(base, 2, shared=True, window=2, lag=lag) for lag in (1, 0)]
    params, sampling = params_of(models[0], np.float32), SETTINGS[setting]
    params['base']['lm_head']['kernel'] *= 0.4  # unsure of what comes next
    target = StagFormerTarget(models[0], form='tuple')
    rows = generate(target, drafter, layout.pack(models[0], params, form='tuple'), [PROMPT] * 8000,
                    max_new_tokens=STEPS, sampling=sampling).tokens
    counts = np.bincount(np.array(rows) @ VOCAB ** np.arange(STEPS)[::-1], minlength=VOCAB ** STEPS)

    def follows(cfg):
        statistic, freedom = chi_square(counts, continuations(cfg, params, sampling))
        assert freedom > 20
        return statistic < freedom + 5 * np.sqrt(2 * freedom)

    assert [follows(cfg) for cfg in models] == [True, False]


@pytest.mark.slow
def test_a_key_a_row_makes_rows_independent():
    params = params_of(SHARED, np.float32)
    target, packed = StagFormerTarget(SHARED, form='tuple'), layout.pack(SHARED, params, form='tuple')
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(4))
    run = lambda rows: generate(target, PromptLookup(3), packed, [[1, 3, 1]] * len(rows), max_new_tokens=8,
                                sampling=Sampling(1.0), seed=keys[jnp.array(rows)]).tokens
    assert run([0, 1, 2, 3]) == run([3, 2, 1, 0])[::-1] != run([0, 0, 0, 0])
