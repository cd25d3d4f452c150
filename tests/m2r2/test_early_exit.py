"""Early exit: what each token says and leaves behind, against a numpy form that knows no batch and no branch.

Everything that varies is data (thresholds, forced exits), so that each target is compiled once.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, init_params
from harness.baselines import Autoregressive, PromptLookup
from harness.decode import generate
from m2r2 import exit_step, exits, gates, streams
from m2r2.config import M2R2Config
from m2r2.early_exit import EarlyExitTarget, falling_schedule, mean_layers
from m2r2.gates import GateConfig
from tests.conftest import tiny_config
from tests.m2r2.stepwise import Row
from tests.stagformer.reference import random_params

CFG = tiny_config(vocab=41, hidden=16, layers=3, heads=2, kv_heads=1)
M = M2R2Config.of(CFG, {'exits': (1, 2), 'rank': 4})
GATE = GateConfig('max_prob')
PROMPTS, STEPS, SLOTS, BUCKET = (5, 1, 3), 14, 24, 8
NEVER, ALWAYS = (2.0, 2.0), (0.0, 0.0)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def parameters(kind='max_prob'):
    made = lambda key: {'base': init_params(CFG, key), 'm2r2': streams.init_params(M, CFG, key)}
    params = jax.tree.map(jnp.array, random_params(jax.eval_shape(made, jax.random.key(0))))
    noise = lambda a: jnp.array(np.random.default_rng(5).standard_normal(a.shape), jnp.float32)
    gate = functools.partial(gates.init_params, GateConfig(kind, 4), M)
    return params | {'m2r2_gates': jax.tree.map(noise, jax.eval_shape(gate, jax.random.key(0)))}


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(0, CFG.vocab_size, (3, SLOTS)).astype(np.int32)


def random_exits(seed=1):
    return np.random.default_rng(seed).choice([*M.exits, CFG.num_layers], (3, SLOTS), p=(0.4, 0.3, 0.3))


@functools.cache
def programs(target):
    """(the prompts, one token and what follows it, flush), compiled."""
    def step(params, cache, following):
        output = target.forward(params, cache.pending[:, None], cache)
        return output.logits[:, 0], caches.commit(output.cache, jnp.zeros_like(cache.pos), following)

    return (jax.jit(lambda params, ids, cache, at: target.forward(params, ids, cache, logits_at=at)), jax.jit(step),
            jax.jit(lambda params, cache: target.flush(params, cache)))


def call(target, params, steps=STEPS, between=lambda cache: cache):
    """The prompts, then `steps` given tokens a row -> logits [steps, B, V], the cache."""
    lengths, ids = jnp.array(PROMPTS), jnp.array(tokens())
    prompt, step, _ = programs(target)
    cache = prompt(params, ids[:, :BUCKET], target.init_cache(3, SLOTS, 0), lengths - 1).cache
    cache, said = caches.commit(cache, lengths - 1, ids[jnp.arange(3), lengths]), []
    for i in range(steps):
        logits, cache = step(params, between(cache), ids[jnp.arange(3), lengths + i + 1])
        said.append(logits)
    return np.array(said), cache


def expected(kind, leave=None, thresholds=NEVER, steps=STEPS, params=None):
    """The same from numpy: logits [steps, B, V], exits [B, steps], rows."""
    said, left, rows = [], [], []
    for row, length in enumerate(PROMPTS):
        model = Row(CFG, M, params or parameters(), kind)
        for token in tokens()[row, :length]:
            model.step(token, CFG.num_layers)
        model.through = length
        steps_ = [model.step(tokens()[row, t], 0 if leave is None else leave[row, t], thresholds)
                  for t in range(length, length + steps)]
        said.append([s for s, _ in steps_])
        left.append([e for _, e in steps_])
        rows.append(model)
    return np.array(said).swapaxes(0, 1), left, rows


def with_data(params, thresholds=NEVER, leave=None):
    return params | {'thresholds': jnp.array(thresholds),
                     'replay': {'exit': jnp.zeros((3, SLOTS), jnp.int32) if leave is None else jnp.array(leave)}}


def logged(target, cache):
    return [np.asarray(target.audit(cache)['exit'])[row, n:n + STEPS].tolist() for row, n in enumerate(PROMPTS)]


def packed(params):
    """As it decodes: unstacked, fused layers."""
    base = pack(params['base'])
    return params | {'base': base, 'm2r2': exits.pack(M, params['m2r2'], base)}


def assert_cache(cache, rows, atol=2e-5):
    """Keys and values of all layers and committed slots, against numpy's."""
    kv = cache.layers.kv
    for row, model in enumerate(rows):
        for l, seen in enumerate(model.seen):
            k, v = (kv.k[l], kv.v[l]) if not isinstance(kv, tuple) else (kv[l].k, kv[l].v)
            for t in range(int(cache.pos[row])):
                np.testing.assert_allclose(k[row, :, t], seen[t][0], atol=atol)
                np.testing.assert_allclose(v[row, :, t], seen[t][1], atol=atol)


@pytest.fixture(scope='module')
def deferring():
    return EarlyExitTarget(CFG, M, GATE, NEVER, 'defer', pending=2, stacked=False)


def test_thresholds_above_one_are_the_base(deferring):
    got, cache = call(deferring, packed(with_data(parameters())))
    want = expected('defer', leave=np.full((3, SLOTS), CFG.num_layers))
    np.testing.assert_allclose(got, want[0], atol=1e-4)
    assert logged(deferring, cache) == [[3] * STEPS] * 3 and mean_layers(deferring, cache) == 3


def test_thresholds_of_zero_say_what_the_first_exit_says(deferring):
    """Where none are pending too many: then a token has to go through."""
    got, cache = call(deferring, packed(with_data(parameters(), ALWAYS)))
    want, left, _ = expected('defer', thresholds=ALWAYS)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert logged(deferring, cache) == left == [[1, 1, 3] * 4 + [1, 1]] * 3
    assert float(np.abs(got - expected('defer', leave=np.full((3, SLOTS), 3))[0]).max()) > 0.1


def test_gates_decide_row_by_row_and_the_log_replays(deferring):
    params = parameters()
    got, cache = call(deferring, packed(with_data(params, (0.3, 0.3))))
    want, left, _ = expected('defer', thresholds=(0.3, 0.3))
    assert logged(deferring, cache) == left and {1, 2, 3} <= set(sum(left, []))
    np.testing.assert_allclose(got, want, atol=1e-4)
    log = json.loads(json.dumps(np.asarray(deferring.audit(cache)['exit']).tolist()))
    again, replayed = call(deferring, packed(with_data(params, NEVER, log)))
    np.testing.assert_array_equal(again, got)
    assert logged(deferring, replayed) == left
    stats = deferring.statistics(cache)
    assert stats['tokens'] == 3 * STEPS and stats['mean_exit_layer'] == pytest.approx(np.mean(left))
    deepest = np.max(left, axis=0).mean()  # a step runs what its deepest row needs
    assert stats['layers_run'] == pytest.approx(deepest) and stats['equivalent_layers'] > stats['mean_exit_layer']


@pytest.mark.parametrize('stacked, gate', ((False, GATE), slow(True, GATE), slow(True, 'arla_tokens'),
                                           slow(False, 'arla_tokens')))
def test_deferred_keys_and_values_are_the_models_own(deferring, stacked, gate):
    """Random exits: what is said while some are owed, and the cache once none are. Gates that remember: their latents
    then are those of tokens that never left."""
    leave, params, remembers = random_exits(), parameters(), gate != GATE
    target = deferring if not stacked else EarlyExitTarget(CFG, M, GATE, NEVER, pending=2)
    if remembers:
        target = dataclasses.replace(target, gate=GateConfig(gate, 4), stacked=stacked)
        params = parameters(gate)
    params = params | {'replay': {'exit': jnp.array(leave)}}
    if not stacked:
        params = packed(with_data(params, NEVER, leave))
    got, cache = call(target, params)
    want, left, rows = expected('defer', leave=leave)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert logged(target, cache) == left
    flushed = programs(target)[2](params, cache)
    assert_cache(flushed, rows)
    with pytest.raises(AssertionError):  # some were owed
        assert_cache(cache, rows)
    if remembers:
        never = params | {'replay': {'exit': jnp.full((3, SLOTS), CFG.num_layers)}}
        through = call(target, never)[1].layers.memory
        for name, mine in flushed.layers.memory.items():
            for row, n in enumerate(PROMPTS):
                assert mine['filled'][row, :n + STEPS].all()
                np.testing.assert_allclose(mine['latents'][row, :n + STEPS], through[name]['latents'][row, :n + STEPS],
                                           atol=2e-5)


def test_slots_that_nobody_may_read_may_hold_anything(deferring):
    leave = random_exits()
    def poison(cache):
        ahead = jnp.arange(SLOTS) >= cache.pos[:, None]
        bad = jax.tree.map(lambda a: jnp.where(ahead[:, None, :, None], jnp.nan, a), cache.layers.kv)
        return cache.replace(layers=cache.layers.replace(kv=bad))

    params = packed(with_data(parameters(), NEVER, leave))
    got, cache = call(deferring, params, between=poison)
    np.testing.assert_array_equal(got, call(deferring, params)[0])


def test_a_step_that_is_run_again_changes_nothing(deferring):
    """As for a finished row, or a rejected token: what is owed is counted by position."""
    leave = np.stack([np.resize(np.roll((1, 2, 3), n), SLOTS) for n in PROMPTS])  # before too many are owed
    params = packed(with_data(parameters(), NEVER, leave))
    step = programs(deferring)[1]
    twice = lambda cache: step(params, cache, jnp.zeros(3, jnp.int32))[1].replace(pos=cache.pos)
    got, cache = call(deferring, params, between=twice)
    np.testing.assert_allclose(got, call(deferring, params)[0], atol=1e-4)
    np.testing.assert_allclose(got, expected('defer', leave=leave)[0], atol=1e-4)
    assert {1, 2, 3} == set(sum(logged(deferring, cache), []))


@pytest.mark.parametrize('kind', ('lerp', slow('copy_h'), slow('copy_p'), 'drop'))
def test_each_rule_for_what_a_token_skipped(kind):
    """Also: a row gets what it gets alone. The other rules, and the exact one, say something else."""
    leave = random_exits()
    target = EarlyExitTarget(CFG, M, GATE, NEVER, kind)
    params = parameters() | {'replay': {'exit': jnp.array(leave)}}
    got, cache = call(target, params)
    np.testing.assert_allclose(got, expected(kind, leave=leave)[0], atol=1e-4)
    assert logged(target, cache) == [leave[row, n:n + STEPS].tolist() for row, n in enumerate(PROMPTS)]
    for other in {'lerp', 'copy_h', 'copy_p', 'drop'} - {kind}:
        assert float(np.abs(got - expected(other, leave=leave)[0]).max()) > 1e-2


@pytest.mark.parametrize('kind, kv_fill, stacked', (('max_prob', 'lerp', True), ('arla_tokens', 'defer', False),
                                                    ('arla_depth', 'drop', False)))
def test_half_precision_goes_through(kind, kv_fill, stacked):
    """Traced only: a branch and what goes round it have one type, in bfloat16 too."""
    def pack_half(params):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        base = half['base'] if stacked else pack(params['base'], jnp.bfloat16)
        mine = half['m2r2'] if stacked else exits.pack(M, params['m2r2'], base, jnp.bfloat16)
        return params | {'base': base, 'm2r2': mine}

    target = EarlyExitTarget(CFG, M, GateConfig(kind, 4), (0.5, 0.5), kv_fill, cache_dtype='bfloat16', stacked=stacked)
    cache = jax.eval_shape(lambda: target.init_cache(2, 16, 0))
    params = jax.eval_shape(pack_half, parameters(kind))
    for size in (1, 3):
        output = jax.eval_shape(target.forward, params, jax.ShapeDtypeStruct((2, size), jnp.int32), cache)
        assert output.logits.shape == (2, size, CFG.vocab_size) and output.logits.dtype == jnp.float32
        kind_of = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
        assert kind_of(output.cache) == kind_of(cache)


@pytest.mark.parametrize('fields, said', (
    (dict(thresholds=(0.5,)), 'a gate and 2 thresholds, one an exit, got 1'),
    (dict(thresholds=(0.5, -1.0)), r'thresholds must be at least 0 \(above 1 never leaves\), got \(0.5, -1.0\)'),
    (dict(gate=None), 'needs a gate'),
    (dict(kv_fill='zero'), "kv_fill: unknown 'zero', one of defer, lerp, copy_h, copy_p, drop"),
    (dict(pending=0), 'pending must be at least 1, got 0'),
    (dict(m=dataclasses.replace(M, draft_vocab=5)), 'draft_vocab and m2r2.carry must be 0, got 5 and 0'),
    (dict(m=dataclasses.replace(M, exits=(1,), carry=4)), 'must be 0, got 0 and 4'),
    (dict(cfg=tiny_config()), 'made for a base of another shape'),
    (dict(schedule=(3, 1), kv_fill='drop'), 'schedule replaces the gates: thresholds must be empty'),
    (dict(schedule=(3, 1), thresholds=()), r'got \(3, 1\), and needs kv_fill drop, got defer'),
    (dict(schedule=(1, 2), thresholds=(), kv_fill='drop'), r'schedule must never grow, got \(1, 2\)'),
    (dict(schedule=(4, 1), thresholds=(), kv_fill='drop'), r'schedule: 4 is neither an exit nor the last layer'),
))
def test_what_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        EarlyExitTarget(**dict(cfg=CFG, m=M, gate=GATE, thresholds=NEVER) | fields)


def test_what_a_call_refuses(deferring):
    cache = deferring.init_cache(1, 8, 0)
    for options, said in (({'masks': {}}, 'no resume and no masks'), ({'taps': ('hidden:1',)}, "asked for 'hidden:1'")):
        with pytest.raises(ConfigError, match=said):
            deferring.forward(parameters(), jnp.zeros((1, 1), jnp.int32), cache, **options)
    assert not deferring.exact and deferring.reference == PlainTarget(CFG, stacked=False)


def test_a_falling_schedule():
    """What a token reads is always there: no rule for what was skipped makes a difference. Where exits may grow, one
    does."""
    steps = falling_schedule(M, 8, 3, 1)
    assert steps == (3, 3, 3, 3, 2, 2, 2, 1)
    with pytest.raises(ConfigError, match='last 3, first 2'):
        falling_schedule(M, 4, 2, 3)
    leave = np.full((3, SLOTS), CFG.num_layers)
    for row, n in enumerate(PROMPTS):
        leave[row, n:] = (steps + (1,) * SLOTS)[:SLOTS - n]
    want, left, _ = expected('drop', leave=leave)
    np.testing.assert_array_equal(want, expected('copy_p', leave=leave)[0])
    assert not np.array_equal(expected('drop', leave=random_exits())[0], expected('copy_p', leave=random_exits())[0])
    target = EarlyExitTarget(CFG, M, None, (), 'drop', schedule=steps)
    cache = target.init_cache(3, SLOTS, 0)
    prompts = cache.layers.replace(prompt=jnp.array(PROMPTS))
    for i in range(STEPS):
        goal = exit_step.goals(target, {}, prompts, jnp.array(PROMPTS) + i)
        assert goal.tolist() == [row[i] for row in left]


@pytest.mark.slow
def test_a_schedule_in_a_call():
    steps = falling_schedule(M, 8, 3, 1)
    target = EarlyExitTarget(CFG, M, None, (), 'drop', schedule=steps)
    got, cache = call(target, parameters())
    assert logged(target, cache) == [[*steps, *(1,) * (STEPS - 8)]] * 3
    line = [3] * (SLOTS - STEPS) + [*steps] + [1] * (STEPS - 8)
    leave = np.array([np.roll(line, n - SLOTS + STEPS) for n in PROMPTS])
    np.testing.assert_allclose(got, expected('drop', leave=leave)[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind, kv_fill', (('arla_tokens', 'drop'), ('arla_depth', 'defer'), ('linear_h', 'lerp')))
def test_every_gate_in_the_loop_and_blocks_among_single_tokens(kind, kv_fill):
    """Thresholds that no confidence reaches, and a drafter's blocks, which run at full depth: the base's tokens."""
    params = parameters(kind)
    prompts = [ids[:n].tolist() for ids, n in zip(tokens(), PROMPTS, strict=True)]
    want = generate(PlainTarget(CFG), Autoregressive(), params, prompts, max_new_tokens=STEPS).tokens
    shut = EarlyExitTarget(CFG, M, GateConfig(kind, 4), NEVER, kv_fill)
    open_ = dataclasses.replace(shut, thresholds=(0.6, 0.6))
    assert generate(shut, Autoregressive(), params, prompts, max_new_tokens=STEPS).tokens == want
    assert generate(open_, PromptLookup(3), params, prompts, max_new_tokens=STEPS).tokens == want
    states = []
    got = generate(open_, Autoregressive(), params, prompts, max_new_tokens=STEPS, on_state=states.append).tokens
    stats = open_.statistics(states[0].cache)
    assert got != want and stats['tokens'] == 3 * (STEPS - 1) and 1 < stats['mean_exit_layer'] < 3
