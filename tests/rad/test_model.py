"""The hybrid over whole sequences, as it is trained: what it decodes as, documents, stretches of layers, taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone.errors import ConfigError
from backbone.model import embed, run_layers, sequence_context
from backbone.model import forward as base_forward
from rad import model, surgery
from rad.config import RadConfig
from rad.target import HybridTarget, pack
from tests.rad.hybrids import hybrid, rad_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CASES = {'some': {'layers': (0,)}, 'all, no norm': {'layers': (0, 1), 'ssm': {'gated_norm': False}},
         'parallel': {'layers': (1,), 'parallel': True}}


@pytest.mark.parametrize('case', CASES)
def test_prompt_and_steps_are_the_whole_sequence(case):
    """Uneven prompts, two steps with one token, a block that each row keeps another part of, a step: logits in float64
    are those of the training form."""
    with jax.enable_x64(True):
        cfg, rcfg, params = hybrid(seed=1, num_layers=2, **CASES[case])
        params = jax.tree.map(lambda a: a.astype(float), params)
        target, room = HybridTarget(cfg, rcfg, 'float64'), 4
        tokens = jax.random.randint(jax.random.key(0), (3, 24), 0, cfg.vocab_size, jnp.int32)
        want = jax.jit(lambda p: model.forward(cfg, rcfg, p, tokens))(params)
        lengths, rows = jnp.array([11, 1, 6]), jnp.arange(3)[:, None]
        run = jax.jit(lambda p, t, c, at=None: target.forward(p, t, c, logits_at=at))
        following = lambda cache, n: jnp.take_along_axis(tokens, (cache.pos + n + 1)[:, None], 1)[:, 0]

        cache = target.init_cache(3, 24, room - 1)
        prompt = jnp.where(jnp.arange(16) < lengths[:, None], tokens[:, :16], 7)
        output = run(params, prompt, cache, lengths - 1)
        np.testing.assert_allclose(output.logits[:, 0], want[rows[:, 0], lengths - 1], atol=1e-9)
        cache = caches.commit(output.cache, lengths - 1, following(cache, lengths - 1))
        for n in (0, jnp.array([1, -1, 3]), 0):
            size = 1 if isinstance(n, int) else room
            at = cache.pos[:, None] + jnp.arange(size)
            output = run(params, tokens[rows, at], cache)
            np.testing.assert_allclose(output.logits, want[rows, at], atol=1e-9)
            n = jnp.zeros(3, jnp.int32) + n
            cache = caches.commit(output.cache, n, following(cache, n))
        assert cache.pos.tolist() == [15, 3, 12]


def test_documents_are_separate():
    """Packed with segments and positions a document says what it says alone; without segments it does not."""
    cfg, rcfg, params = hybrid((0,), num_layers=2)
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 0, cfg.vocab_size)
    first, second = jnp.zeros(16, int), (jnp.arange(16) >= 6).astype(int)
    positions = jnp.where(second, jnp.arange(16) - 6, jnp.arange(16))
    run = jax.jit(lambda tokens, segments, positions: model.forward(cfg, rcfg, params, tokens, segments=segments,
                                                                    positions=positions))
    alone = run(jnp.pad(tokens[:, 6:], ((0, 0), (0, 6))), first[None], jnp.arange(16)[None])[:, :10]
    got = run(tokens, second[None], positions[None])[:, 6:]
    np.testing.assert_allclose(got, alone, atol=1e-5)
    np.testing.assert_allclose(run(tokens, first[None], jnp.arange(16)[None])[:, :6],
                               run(tokens, second[None], positions[None])[:, :6], atol=1e-5)
    assert float(jnp.abs(run(tokens, first[None], positions[None])[:, 6:] - alone).max()) > 0.05


def test_layers_below_the_first_replaced_one_are_the_bases():
    """They may be run once for teacher and student; remat changes no gradient."""
    cfg, rcfg, tree = hybrid((1,), num_layers=3)
    tokens = jnp.array([[4, 8, 15, 16, 23, 42]])
    ctx = sequence_context(cfg, tokens.shape)
    x = embed(cfg, tree['base'], tokens, ctx.positions)
    below, _, _ = run_layers(cfg, tree['base'], x, None, ctx, hi=rcfg.first)

    def energy(mixers, **options):
        return (model.forward(cfg, rcfg, tree | {'rad': {'mixers': mixers}}, tokens, **options) ** 2).sum()

    want = jax.jit(jax.value_and_grad(energy))(tree['rad']['mixers'])
    got = jax.jit(jax.value_and_grad(lambda m: energy(m, lo=1, hidden=below, remat=True)))(tree['rad']['mixers'])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_taps_have_the_numbers_of_the_whole_model():
    """Stacked and packed alike: the residual between two layers differs by what the mixer and the MLP say."""
    cfg, rcfg, params = hybrid(layers=(1, 2))
    tokens = jnp.array([[4, 8, 15, 16]])
    names = ('hidden:0', 'hidden:1', 'mixer:0', 'mixer:2', 'attention:1', 'hidden:4')
    _, taps = jax.jit(lambda p: model.hidden_and_taps(cfg, rcfg, p, tokens, names))(params)
    assert set(taps) == set(names) and taps['attention:1'].shape == (1, 4, 4, 8)
    target = HybridTarget(cfg, rcfg)
    output = jax.jit(lambda p: target.forward(p, tokens, target.init_cache(1, 8, 3), taps=(*names, 'hidden:last')))(
        pack(params))
    for name in names:
        np.testing.assert_allclose(output.taps[name], taps[name], atol=1e-4)
    assert output.taps['hidden:last'].shape == (1, 4, 32)
    silent = params | {'rad': surgery.init_rad(cfg, rcfg, params['base'], jax.random.key(0))}
    _, taps = jax.jit(lambda p: model.hidden_and_taps(cfg, rcfg, p, tokens, ('mixer:1', 'mixer:3')))(silent)
    assert not taps['mixer:1'].any() and taps['mixer:3'].any()
    for wrong in ('hidden:5', 'mixer:4', 'router:0', 'words'):
        with pytest.raises(ConfigError, match='tap'):
            model.hidden_and_taps(cfg, rcfg, params, tokens, (wrong,))


def test_the_parallel_control_and_an_empty_set_begin_as_the_base():
    cfg, _, params = hybrid((0,), num_layers=2)
    tokens = jnp.array([[4, 8, 15, 16, 23], [1, 1, 2, 3, 5]])
    want = jax.jit(lambda p: base_forward(cfg, p, tokens))(params['base'])
    for rcfg in (rad_config(cfg, (0, 1), parallel=True), rad_config(cfg, ())):
        tree = {'base': params['base'], 'rad': surgery.init_rad(cfg, rcfg, params['base'], jax.random.key(0))}
        got = jax.jit(lambda p, rcfg=rcfg: model.forward(cfg, rcfg, p, tokens))(tree)
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert RadConfig.of(cfg, {'layers': ()}).first is None
