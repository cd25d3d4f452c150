"""The guard: a bad approximation is found out and the exact model goes on from what was committed; a good one is left
alone; the log gives the call again."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.cache import write_tokens
from backbone.contract import Output
from backbone.errors import ConfigError
from backbone.model import PlainTarget, cache_context, embed, finish, init_params, run_layers, unembed
from harness import guard
from harness.baselines import Autoregressive
from harness.decode import generate
from harness.guard import Guarded
from m2r2.config import M2R2Config
from m2r2.early_exit import EarlyExitTarget
from m2r2.gates import GateConfig
from tests.conftest import tiny_config
from tests.stagformer.reference import plain, random_params

CFG = tiny_config(vocab=41, hidden=16, layers=3, heads=2, kv_heads=1)
M = M2R2Config.of(CFG, {'exits': (1,), 'stream': 'none'})  # as CALM leaves, the cheapest to compile
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 9, 30]]
NEW = 24


@dataclasses.dataclass(frozen=True)
class Skipping:
    """A model without the layers of params['skip'] [L]: how good it is, is data. Knows nothing of a guard."""

    cfg: Any = CFG
    exact: bool = False

    @property
    def reference(self):
        return PlainTarget(self.cfg)

    vocab_size = property(lambda self: self.cfg.vocab_size)
    max_seq_len = property(lambda self: self.cfg.max_seq_len)

    def init_cache(self, batch, max_len, block):
        return self.reference.init_cache(batch, max_len, block)

    def forward(self, params, tokens, cache, *, resume=None, taps=(), masks=None, logits_at=None):
        if logits_at is not None:
            return self.reference.forward(params, tokens, cache, taps=taps, logits_at=logits_at)
        ctx = cache_context(CFG, cache, tokens.shape[1])
        x = embed(CFG, params['base'], tokens, ctx.positions)
        x, layers, found = run_layers(CFG, params['base'], x, cache.layers, ctx, skip=params['skip'], taps=taps)
        logits = unembed(CFG, params['base'], finish(CFG, params['base'], x))
        return Output(tokens, logits, write_tokens(cache.replace(layers=layers), tokens), found)


@pytest.fixture(scope='module')
def params():
    shapes = jax.eval_shape(lambda key: {'base': init_params(CFG, key)}, jax.random.key(0))
    return jax.tree.map(jnp.array, random_params(shapes))


def guarded_call(target, params, prompts=PROMPTS):
    """-> tokens, the log (through JSON)."""
    states = []
    tokens = generate(target, Autoregressive(), params, prompts, max_new_tokens=NEW, on_state=states.append).tokens
    logs = json.loads(json.dumps(guard.log(target, states[0].cache)))
    assert [row['tokens'] for row in logs] == tokens and [row['prompt'] for row in logs] == list(map(len, prompts))
    return tokens, logs


def assert_exact(params, tokens, begin=(0, 0, 0)):
    """Each row's tokens from its `begin` on are what the base says after all that was committed before them."""
    for prompt, ids, first in zip(PROMPTS, tokens, begin, strict=True):
        says = plain(CFG, params['base'], prompt + ids).argmax(-1)
        assert 0 <= first < NEW - 2 and says[len(prompt) + first - 1:-1].tolist() == ids[first:]


def falls(logs):
    """How many new tokens were there when the reference took over."""
    return [row['fallback'] - row['prompt'] + 1 for row in logs]


@pytest.fixture(scope='module')
def watched():
    return Guarded(Skipping(), share=0.5, floor=0.9, seed=3)


def test_a_bad_approximation_falls_back(watched, params):
    tokens, logs = guarded_call(watched, params | {'skip': jnp.array([False, True, False])})
    for row in logs:
        assert row['fallback'] and len(row['checks']) >= 4 and row['agreement'] < 0.9
        assert max(slot for slot, _ in row['checks']) < row['fallback']  # the reference is not checked
    assert_exact(params, tokens, falls(logs))
    with pytest.raises(AssertionError):
        assert_exact(params, tokens)


def test_a_good_one_never_does(watched, params):
    tokens, logs = guarded_call(watched, params | {'skip': jnp.zeros(3, bool)})
    assert_exact(params, tokens)
    checks = [len(row['checks']) for row in logs]
    assert all(row['fallback'] is None and row['agreement'] == 1 for row in logs)
    assert NEW * 0.2 < min(checks) and max(checks) < NEW * 0.8
    assert len({tuple(slot - row['prompt'] for slot, _ in row['checks']) for row in logs}) == 3  # each row its own draw


def test_no_share_no_checks(params):
    """Then there is nothing but the target: no branch in the program, no verdict in the log."""
    def program(share):
        target = Guarded(Skipping(), share=share)
        cache = target.init_cache(1, 16, 0)
        step = lambda params, cache: target.forward(params, jnp.ones((1, 1), jnp.int32), cache)
        return str(jax.make_jaxpr(step)(params | {'skip': jnp.zeros(3, bool)}, cache))

    assert 'while[' not in program(0.0) and 'while[' in program(0.01)


@pytest.mark.parametrize('kv_fill', ('copy_h', pytest.param('defer', marks=pytest.mark.slow),
                                     pytest.param('drop', marks=pytest.mark.slow)))
def test_early_exit_falls_back_in_its_own_cache_and_replays(params, kv_fill):
    """A low threshold; a shut gate; and the first call again, its gate shut, from the log."""
    watched = Guarded(EarlyExitTarget(CFG, M, GateConfig('max_prob'), (0.0,), kv_fill), share=0.6, floor=0.95, seed=1)
    by_itself = {'exit': jnp.zeros((3, 5 + NEW - 1), jnp.int32), 'fallback': jnp.full((3,), guard.BY_CHECKS)}
    call = lambda threshold, replay: guarded_call(watched, params | {'thresholds': jnp.array([threshold]),
                                                                     'replay': by_itself | replay})
    low = 0.15 if kv_fill == 'copy_h' else 0.0  # the others are harder to find out
    tokens, logs = call(low, {})
    assert_exact(params, tokens, falls(logs))
    for row in logs:
        before = row['fallback'] - row['prompt']
        assert 1 in row['exit'][:before] and set(row['exit'][before:]) == {CFG.num_layers}
        assert all(s >= low for s, e in zip(row['score'], row['exit'], strict=True) if e == 1)
    again, replayed = call(2.0, guard.replay(logs))
    assert again == tokens and [row['exit'] for row in replayed] == [row['exit'] for row in logs]
    other, unmoved = call(2.0, {})
    assert other != tokens and all(row['fallback'] is None and row['agreement'] == 1 for row in unmoved)
    assert_exact(params, other)


def test_evidence_is_what_it_says():
    """Against numerical integration; and looked at after every check, a row that keeps the floor is rarely accused."""
    p = (np.arange(200000) + 0.5) / 200000 * 0.9
    evidence = jax.jit(guard.log_evidence)  # one shape, one program
    agreed, differed = np.array([0, 7, 40, 300]), np.array([3, 2, 12, 20])
    law = lambda p: agreed * np.log(p) + differed * np.log1p(-p)
    want = np.log(np.exp(law(p[:, None]) - law(0.9)).mean(0))
    np.testing.assert_allclose(evidence(agreed, differed, 0.9), want, atol=2e-3)
    proof = evidence(np.array([50, 50, 0, 0]), np.array([1, 0, 0, 0]), 1.0)
    assert proof[0] == np.inf and proof[1] < 0 and abs(proof[2]) < 1e-6
    rng, accused = np.random.default_rng(0), {}
    for agreement in (0.9, 0.7):
        agreed = (rng.random((400, 150)) < agreement).cumsum(1)
        accused[agreement] = float((evidence(agreed, np.arange(1, 151) - agreed, 0.9) >= np.log(20)).any(1).mean())
    assert accused[0.9] < 0.05 and accused[0.7] > 0.9


@pytest.mark.parametrize('fields, said', (
    (dict(share=1.5), r'guard.share must be in 0..1, got 1.5'),
    (dict(share=-0.1), r'guard.share must be in 0..1, got -0.1'),
    (dict(floor=0.0), 'guard.floor must be above 0 and at most 1, got 0.0'),
    (dict(floor=1.1), 'guard.floor must be above 0 and at most 1, got 1.1'),
    (dict(confidence=1.0), 'guard.confidence must be above 0 and below 1, got 1.0'),
    (dict(min_checks=0), 'guard.min_checks must be at least 1, got 0'),
    (dict(target=PlainTarget(CFG)), 'guard.target: PlainTarget is exact or names no reference'),
))
def test_what_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        Guarded(**{'target': Skipping()} | fields)
