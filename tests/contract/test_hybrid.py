"""The contract for a hybrid, whose replaced layers remember a state that has no slots to leave out: whatever drafts, it
says what it says one token at a time, and after every round it remembers just what was kept.

Its mixers decay slowly: with the usual decay a state that was not rolled back would not show in the tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.cache import KVState, SsmState
from harness import decode as loop
from harness.baselines import Autoregressive, PromptLookup
from harness.decode import generate
from rad import model
from rad.target import HybridTarget, pack
from tests.contract.conftest import NEW
from tests.contract.drafters import Ragged, Scripted
from tests.rad.hybrids import hybrid

pytestmark = pytest.mark.usefixtures('quick_compile')


class Decoder:
    """The hybrid, stored or packed, with parameters beside those of the drafters, and what plain decoding says."""

    def __init__(self, packed, params, prompts):
        self.cfg, self.rcfg, self.stored = hybrid((0,), num_layers=2)
        self.target, self.prompts = HybridTarget(self.cfg, self.rcfg), prompts
        self.params = params | (pack(self.stored) if packed else self.stored)
        self.plain = self(Autoregressive()).tokens
        rows = [p + t for p, t in zip(prompts, self.plain, strict=True)]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, ids in enumerate(rows):
            table[row, :len(ids)] = ids
        self.params['script'] = jnp.array(table)

    def __call__(self, drafter, **options):
        return generate(self.target, drafter, self.params, self.prompts, max_new_tokens=NEW, **options)


@pytest.fixture(scope='module')
def decoder(params, prompts):
    return Decoder(True, {'tensorhead': params['tensorhead']}, prompts)


def test_plain_decoding_is_the_argmax_of_whole_sequences(decoder):
    ids = np.asarray(decoder.params['script'])
    logits = jax.jit(lambda p: model.forward(decoder.cfg, decoder.rcfg, p, ids))(decoder.stored)
    for row, (prompt, new) in enumerate(zip(decoder.prompts, decoder.plain, strict=True)):
        end = len(prompt) + len(new)
        assert logits[row].argmax(-1)[len(prompt) - 1:end - 1].tolist() == new
    assert len({tuple(new) for new in decoder.plain}) == 4


def test_stored_parameters_decode_alike(decoder, params, prompts):
    assert Decoder(False, {}, prompts).plain == decoder.plain


@pytest.mark.parametrize('name', ('prompt_lookup', 'tensorhead', pytest.param('lookahead', marks=pytest.mark.slow)))
def test_drafting_is_plain_decoding(decoder, drafters, name):
    assert decoder(drafters[name]).tokens == decoder.plain


def test_lengths_differ_by_row_and_round(decoder):
    assert decoder(Ragged(3)).tokens == decoder.plain


def test_after_every_round_it_remembers_what_was_kept(decoder):
    """Round by round with a stop token, drafts partly wrong, and NaN wherever a cache may hold anything: the tokens,
    and after each round keys, values, states and tails, are those of a fresh pass over what was kept."""
    stop = decoder.plain[2][5]
    want = [row[:row.index(stop) + 1] if stop in row else row for row in decoder.plain]
    request = loop.prepare(decoder.target, decoder.prompts, max_new_tokens=NEW, stop_tokens=[stop])
    drafter = Scripted(3, wrong_from=2)
    state = loop.start(decoder.target, drafter, decoder.params, request)
    fresh = jax.jit(lambda tokens, pos: decoder.target.forward(
        decoder.params, tokens, decoder.target.init_cache(4, request.capacity, 3), logits_at=pos - 1).cache.layers)

    def poisoned(layer, pos):
        if isinstance(layer, KVState):
            dead = (jnp.arange(request.capacity) >= pos[:, None])[:, None, :, None]
            return jax.tree.map(lambda a: jnp.where(dead, jnp.nan, a), layer)
        return layer.replace(log=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), layer.log))

    while not state.finished.all():
        cache = state.cache
        state = state.replace(cache=cache.replace(layers=tuple(poisoned(layer, cache.pos) for layer in cache.layers)))
        state = loop.decode_one(decoder.target, drafter, decoder.params, state, **request.rounds)
        cache = state.cache
        live = (np.arange(request.capacity) < cache.pos[:, None])[:, None, :, None]
        for got, kept in zip(cache.layers, fresh(cache.tokens[:, :request.capacity], cache.pos), strict=True):
            if isinstance(got, SsmState):
                assert got.at.tolist() == cache.pos.tolist()
                pairs = (got.state, kept.state), (got.tail, kept.tail)
            else:
                pairs = [(np.where(live, a, 0), np.where(live, b, 0)) for a, b in ((got.k, kept.k), (got.v, kept.v))]
            for a, b in pairs:
                np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(b).max())))
    ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
    assert [ids[r, n:pos[r] + 1].tolist() for r, n in enumerate(request.lengths)] == want
    seen = [[] for _ in want]
    decoder(drafter, stop_tokens=[stop], on_tokens=lambda row, new: seen[row].extend(new))
    assert seen == want


def test_one_row_to_the_end_of_the_cache(decoder):
    """Prompt and new tokens fill the context to its last slot, blocks stick out over its end."""
    last = decoder.cfg.max_seq_len
    plain, drafted = ([generate(decoder.target, drafter, decoder.params, [[3] * n], max_new_tokens=last - n).tokens[0]
                       for n in (40, 60)] for drafter in (Autoregressive(), PromptLookup(4)))
    assert plain == drafted and [len(row) for row in plain] == [last - 40, last - 60]
