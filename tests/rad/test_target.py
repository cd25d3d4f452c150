"""The hybrid as it decodes: what it remembers, in bytes and in numbers, what a wrong way back does, many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.cache import KVState, SsmState
from backbone.errors import ConfigError
from backbone.mesh import make_mesh, shardings
from harness import decode as loop
from harness.baselines import Autoregressive, PromptLookup
from harness.decode import generate
from rad.target import HybridTarget, build, pack
from tests.contract.drafters import Scripted
from tests.rad.hybrids import hybrid

pytestmark = pytest.mark.usefixtures('quick_compile')
NEW, REPLAY = 20, caches.replay


def all_of_the_state(state, pos):
    """A state that is not rolled back, behind a tail that is."""
    return REPLAY(state, pos).replace(state=REPLAY(state, jnp.where(pos > state.at, state.at + 4, pos)).state)


def a_token_short(state, pos):
    return REPLAY(state, pos).replace(state=REPLAY(state, jnp.where(pos > state.at, pos - 1, pos)).state)


def all_of_the_tail(state, pos):
    return REPLAY(state, pos).replace(tail=REPLAY(state, jnp.where(pos > state.at, state.at + 4, pos)).tail)


WRONG = {'all of the state': all_of_the_state, 'a token short': a_token_short, 'all of the tail': all_of_the_tail}


@pytest.fixture(scope='module')
def decoders():
    """By decay: f(replay) -> (rows whose tokens are not plain decoding's, largest relative error of a state or tail
    after a round), with drafts of which the last two of three are wrong."""
    prompts = [[1, 2, 3, 4, 5, 1, 2], [7], [9, 9, 30, 9], [50, 60, 70, 80, 11]]

    cfg, rcfg, _ = hybrid((0,), num_layers=2)
    target, drafter = HybridTarget(cfg, rcfg), Scripted(3, wrong_from=1)
    request = loop.prepare(target, prompts, max_new_tokens=NEW)
    fresh = jax.jit(lambda params, tokens, pos: target.forward(
        params, tokens, target.init_cache(4, request.capacity, 3), logits_at=pos - 1).cache.layers)

    def make(slow):
        params = hybrid((0,), slow, num_layers=2)[2]
        plain = generate(target, Autoregressive(), params, prompts, max_new_tokens=NEW).tokens
        script = np.zeros((4, request.capacity), np.int32)
        for row, ids in enumerate(p + t for p, t in zip(prompts, plain, strict=True)):
            script[row, :len(ids)] = ids
        tree = params | {'script': jnp.array(script)}

        def run():
            state, error = loop.start(target, drafter, tree, request), 0.0
            while not state.finished.all():
                state = loop.decode_one(target, drafter, tree, state, **request.rounds)
                kept = fresh(params, state.cache.tokens[:, :request.capacity], state.cache.pos)
                for got, want in zip(state.cache.layers, kept, strict=True):
                    if isinstance(got, SsmState):
                        error = max(error, *(np.abs(a - b).max() / np.abs(b).max() for a, b in (
                            map(np.asarray, pair) for pair in ((got.state, want.state), (got.tail, want.tail)))))
            ids, pos = np.asarray(state.cache.tokens), np.asarray(state.cache.pos)
            said = [ids[r, n:pos[r] + 1].tolist() for r, n in enumerate(request.lengths)]
            return sum(a != b for a, b in zip(said, plain, strict=True)), error

        return run

    return {'slow': make(True), 'usual': make(False)}


def outcomes(decoders, monkeypatch, replay):
    monkeypatch.setattr(caches, 'replay', replay)
    loop.decode_one.clear_cache()
    found = {decay: run() for decay, run in decoders.items()}
    loop.decode_one.clear_cache()
    return found


def test_a_right_way_back(decoders, monkeypatch):
    found = outcomes(decoders, monkeypatch, REPLAY)
    assert all(rows == 0 and error < 1e-4 for rows, error in found.values()), found


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_way_back_is_caught(decoders, monkeypatch, name):
    """By the states always, by the tokens where mixers decay slowly. Negative control of the latter: with the usual
    decay tokens do not tell that a state is wrong."""
    found = outcomes(decoders, monkeypatch, WRONG[name])
    assert all(error > 1e-2 for _, error in found.values()), found
    assert found['slow'][0] >= 3, found
    if name != 'all of the tail':
        assert found['usual'][0] == 0, found


@pytest.mark.parametrize('parallel', (False, True))
@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_bytes_are_the_formulas(parallel, dtype):
    cfg, rcfg, _ = hybrid(layers=(0, 2, 3), parallel=parallel, ssm={'state_size': 4})
    target = HybridTarget(cfg, rcfg, dtype)
    for tokens, block in ((16, 0), (96, 5)):
        cache = jax.eval_shape(lambda tokens=tokens, block=block: target.init_cache(3, tokens, block))
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.layers))
        assert held == 3 * target.kv_bytes_formula(tokens, block)
    sizes = [target.kv_bytes_formula(tokens) for tokens in (0, 1, 100)]
    kept = 4 if parallel else 1
    assert sizes[2] - sizes[0] == 100 * (sizes[1] - sizes[0]) == 100 * kept * 2 * 2 * 8 * jnp.dtype(dtype).itemsize


def test_layers_of_each_kind_and_what_is_refused():
    cfg, rcfg, params = hybrid(layers=(0, 2))
    target = build(cfg.to_dict(), rcfg.to_dict())
    assert target == HybridTarget(cfg, rcfg) and target.exact
    cache = target.init_cache(2, 16, 1)
    assert [type(layer) for layer in cache.layers] == [SsmState, KVState, SsmState, KVState]
    tokens = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(ConfigError, match='masks'):
        target.forward(params, tokens, cache, masks={})
    with pytest.raises(ConfigError, match='3 tokens is longer than the log of 2'):
        target.forward(params, tokens, cache)


def test_a_commit_of_keys_and_values_is_what_it_was():
    """Nothing of recurrent states is compiled into the commit of a cache that has none."""
    cfg, rcfg, _ = hybrid()
    commit = lambda cache: jax.make_jaxpr(lambda c: caches.commit(c, jnp.zeros(2, jnp.int32), c.pos))(cache)
    plain = commit(HybridTarget(cfg, hybrid(layers=())[1]).init_cache(2, 16, 3))
    assert 'exp' not in str(plain) and 'exp' in str(commit(HybridTarget(cfg, rcfg).init_cache(2, 16, 3)))


def test_eight_devices_equal_one():
    """Mixers and states spread over 'model', rows over 'data': logits and tokens are those of one device."""
    cfg, rcfg, params = hybrid((1,), num_layers=2, vocab=96, hidden=32, heads=8, kv_heads=4)
    target, prompts = HybridTarget(cfg, rcfg), [[1, 2, 3, 1, 2], [7], [5, 6], [8] * 9]
    mesh = make_mesh(data=2, model=4)
    spread = jax.device_put(params, shardings(cfg, params, mesh))
    mixers = spread['rad']['mixers']
    assert not any(mixers[name]['kernel'].sharding.is_fully_replicated for name in ('in_proj', 'out_proj'))
    cache = target.init_cache(4, 16, 3)
    placed = jax.device_put(cache, shardings(cfg, cache, mesh))
    assert placed.layers[1].state.sharding.spec == jax.sharding.PartitionSpec('data', 'model', None, None)
    assert placed.layers[1].log.x.sharding.spec == jax.sharding.PartitionSpec('data', None, 'model', None)
    step = jax.jit(lambda p, c: target.forward(p, jnp.arange(16).reshape(4, 4), c).logits)
    np.testing.assert_allclose(step(spread, placed), step(params, cache), atol=1e-4)
    run = lambda p: generate(target, PromptLookup(3), p, prompts, max_new_tokens=10).tokens
    assert run(spread) == run(params)


def test_packed_in_bfloat16_keeps_its_vectors_wide():
    cfg, rcfg, params = hybrid((0,), num_layers=2)
    packed = pack(params, jnp.bfloat16)
    mixer = packed['rad']['mixers'][0]
    kernel = 'kernel_t' if 'kernel_t' in packed['base'].get('lm_head', {}) else 'kernel'
    assert {mixer[name][kernel].dtype for name in ('in_proj', 'out_proj')} == {jnp.dtype('bfloat16')}
    assert {a.dtype for name, a in mixer.items() if name in ('A_log', 'D', 'dt_bias')} == {jnp.dtype('float32')}
    assert mixer['conv']['kernel'].dtype == jnp.float32 and mixer['conv']['kernel'].shape[0] == rcfg.ssm.conv_width
    target, tokens = HybridTarget(cfg, rcfg), jnp.array([[4, 8, 15, 16]])
    say = jax.jit(lambda p: target.forward(p, tokens, target.init_cache(1, 8, 3)).logits)
    said = [say(p) for p in (packed, params)]
    np.testing.assert_allclose(said[0], said[1], atol=0.1 * float(jnp.abs(said[1]).max()))
    again = pack({'base': packed['base'], 'rad': params['rad']}, jnp.bfloat16)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
