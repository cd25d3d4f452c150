"""A gate that ends drafts: it says what it would say of the whole text, at the right token, and only ever shortens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, embed, sequence_context
from backbone.sampling import GREEDY
from harness import decode
from m2r2 import drafter as drafters
from m2r2 import exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.drafter import M2R2Drafter
from m2r2.gates import GateConfig
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')

CFG = tiny_config(vocab=97, hidden=32, layers=3, heads=2, kv_heads=1, max_seq_len=64)
M = M2R2Config.of(CFG, {'exits': (1,), 'rank': 4})
BLOCK, NEW = 3, 24
PROMPTS = np.random.default_rng(0).integers(0, 97, (6, 5)).tolist()
TARGET = PlainTarget(CFG)


def drafter_of(kind: str, doubt: float) -> M2R2Drafter:
    return M2R2Drafter(CFG, M, BLOCK, doubt, GateConfig(kind, 8))


@functools.cache
def params_of(kind: str) -> dict:
    """Accelerators that do something, and a gate whose answers lie apart."""
    mine = drafter_of(kind, 1).init_params(jax.random.key(1))
    mine['layers'] = jax.tree.map(lambda a: a + 0.05, mine['layers'])
    if 'gate' in mine:
        mine['gate'] = mine['gate'] | {'scale': jnp.float32(4)}
    return {'base': lively(CFG), 'm2r2': mine}


def started(drafter: M2R2Drafter, params: dict) -> decode.DecodeState:
    return decode.start(TARGET, drafter, params, decode.prepare(TARGET, PROMPTS, max_new_tokens=NEW))


def first_draft(drafter: M2R2Drafter, params: dict):
    state = started(drafter, params)
    run = jax.jit(lambda params, cache, memory: drafter.draft(params, cache, memory, jax.random.key(0), GREEDY)[0])
    return run(params, state.cache, state.drafter), np.asarray(state.cache.pending)


@functools.cache
def free_draft():
    """What is drafted when no gate is asked: the same whatever gate lies beside."""
    return first_draft(drafter_of('max_prob', 0), params_of('max_prob'))


def whole_text(kind: str, params: dict, text: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The gate's confidence after each token of text [B, S], in one pass. seen [S]: tokens that it may attend over."""
    @jax.jit
    def run(params):
        ctx = sequence_context(CFG, text.shape)
        end = streams.run_interval(CFG, M, params['base'], params['m2r2'], 0, embed(CFG, params['base'], text,
                                   ctx.positions), None, ctx, together=False, path=True)
        logits = exits.logits(CFG, params['base'], params['m2r2'], end.fast)
        mask = ctx.mask & (seen | np.eye(len(seen), dtype=bool))
        return gates.score(GateConfig(kind, 8), M, params['m2r2'].get('gate', {}), 0, end, logits, mask=mask)[0]
    return np.asarray(run(params))


@pytest.mark.parametrize('kind', ('entropy', 'arla_depth', 'arla_tokens',
                                  pytest.param('linear_h', marks=pytest.mark.slow)))
def test_a_draft_ends_where_the_gate_doubts_of_the_whole_text(kind):
    """What it reads at a draft step: the exit's words, the fast stream at all depths, earlier tokens, the slow one."""
    params, (free, first) = params_of(kind), free_draft()
    assert free.length.tolist() == [BLOCK] * len(PROMPTS)
    text = np.concatenate([np.array(PROMPTS), first[:, None], np.asarray(free.tokens)], axis=1)
    size = len(PROMPTS[0])
    seen = np.arange(text.shape[1]) >= size  # the prompt was not drafted: a gate over tokens knows nothing of it
    confidence = whole_text(kind, params, text, seen)[:, size:size + BLOCK]
    ordered = np.sort(confidence.ravel())
    threshold = ordered[len(ordered) // 3:][:2].mean()  # between two answers

    def lengths(confidence):
        return np.cumprod(confidence >= threshold, axis=1).sum(1).tolist()

    draft, _ = first_draft(drafter_of(kind, 100 * float(threshold)), params)
    assert draft.length.tolist() == lengths(confidence)
    assert len(set(draft.length.tolist())) > 1, 'some stop early'
    for row, length in enumerate(draft.length.tolist()):
        assert draft.tokens[row, :length].tolist() == free.tokens[row, :length].tolist()
    for wrong in (np.roll(confidence, 1, axis=0), np.roll(confidence, 1, axis=1)):
        assert draft.length.tolist() != lengths(wrong), 'of another row, of another token'


def test_what_a_gate_over_tokens_remembers_is_what_was_kept():
    """Round after round, drafts kept and rejected: a filled slot before `pos` holds the latent of the token that is
    there now. Which slots are holes: the prompt, and the last token of a round that kept all of its drafts."""
    params = params_of('arla_tokens')
    drafter = drafter_of('arla_tokens', 1e-3)  # asked, and never in doubt
    state, rounds = started(drafter, params), decode.prepare(TARGET, PROMPTS, max_new_tokens=NEW).rounds
    holes = np.zeros((len(PROMPTS), state.cache.tokens.shape[1] - 1), bool)
    holes[:, :len(PROMPTS[0])] = True
    for _ in range(6):
        before = np.asarray(state.cache.pos)
        state = decode.decode_one(TARGET, drafter, params, state, **rounds)
        for row, at in enumerate(before):
            if state.cache.pos[row] == at + BLOCK + 1:
                holes[row, at + BLOCK] = True
    text, pos = np.asarray(state.cache.tokens)[:, :-1], np.asarray(state.cache.pos)
    ctx = sequence_context(CFG, text.shape)
    end = jax.jit(lambda p: streams.run_interval(CFG, M, p['base'], p['m2r2'], 0, embed(CFG, p['base'], text,
                  ctx.positions), None, ctx, together=False).fast)(params)
    want = np.asarray(gates._unit(end) @ params['m2r2']['gate']['down']['kernel'])
    memory = jax.tree.map(np.asarray, state.drafter['memory']['exit_1'])
    past = np.arange(text.shape[1]) < pos[:, None]
    np.testing.assert_array_equal(memory['filled'] & past, ~holes & past)
    kept = memory['filled'] & past
    np.testing.assert_allclose(memory['latents'][kept], want[kept], atol=1e-4)
    rejected = memory['filled'] & ~past
    assert rejected.any() and np.abs(memory['latents'][rejected] - want[rejected]).max() > 1e-2, 'what was taken back'


def test_a_sure_gate_changes_nothing_and_a_doubtful_one_leaves_plain_decoding():
    params = params_of('mlp')
    fixed = lambda bias: {**params, 'm2r2': params['m2r2'] | {'gate': params['m2r2']['gate'] | {
        'scale': jnp.float32(0), 'bias': jnp.float32(bias)}}}
    run = lambda params: decode.generate(TARGET, drafter_of('mlp', 50), params, PROMPTS, max_new_tokens=NEW)
    sure, doubtful = run(fixed(1)), run(fixed(-1))
    assert sure.tokens == doubtful.tokens
    assert sure.drafted_hist[:BLOCK].sum() == 0 and doubtful.drafted_hist[1:].sum() == 0
    assert sure.mean_accepted_tokens > doubtful.mean_accepted_tokens == 1


def test_packed_accelerators_keep_their_gate():
    params = params_of('mlp')
    packed = drafter_of('mlp', 50).ready(params['m2r2'], pack(params['base']))
    jax.tree.map(np.testing.assert_array_equal, packed['gate'], params['m2r2']['gate'])


@pytest.mark.parametrize(('options', 'named'), (
    ({'gate': 'magic'}, 'gate.kind: unknown .magic'), ({'gate': {'kind': 'mlp', 'depth': 3}}, 'depth'),
    ({'gate': {'size': 0}}, 'gate.size'), ({'doubt': 101}, 'doubt'), ({'doubt': -1}, 'doubt'),
    ({'doubt': float('nan')}, 'doubt')))
def test_a_wrong_option_is_named(options, named):
    with pytest.raises(ConfigError, match=named):
        drafters.build(CFG, {'exits': (1,)}, **options)


def test_a_gate_that_is_not_there_is_named():
    params = params_of('mlp')
    without = {name: value for name, value in params['m2r2'].items() if name != 'gate'}
    with pytest.raises(ConfigError, match='gate mlp of size 8: these accelerators have no gate'):
        drafter_of('mlp', 30).ready(without, params['base'])
    for other in (drafter_of('arla_tokens', 30), dataclasses.replace(drafter_of('mlp', 30), gate=GateConfig('mlp', 4))):
        with pytest.raises(ConfigError, match='those of another gate'):
            other.ready(params['m2r2'], params['base'])
    drafter_of('mlp', 0).ready(without, params['base'])  # a gate that is never asked
    drafter_of('margin', 30).ready(without, params['base'])  # nor one that has no parameters
