"""The sparse target against the plain one: what is dropped, what stays, what is read, and what nobody may notice."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone import native
from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import ConfigError
from backbone.layers import make_context
from backbone.model import PlainTarget, forward, init_params, run_layers
from harness import guard
from harness.baselines import Autoregressive
from harness.decode import generate
from sparsity import gather, layout, predictor, select, step
from sparsity.config import SparsityConfig
from sparsity.selectors import Griffin, Oracle, Predictor, Random, Static
from sparsity.sparse_layer import Picked
from sparsity.target import SparseTarget
from sparsity.thresholds import Cats, Teal, calibrate
from tests.conftest import lively, tiny_config
from tests.sparsity.forced import forced, kept_units

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, hidden=32, layers=3, heads=4, kv_heads=2, max_seq_len=48)
OPT = ModelConfig('opt', 41, 32, 2, 48, AttentionConfig(4, 4, 8, qkv_bias=True, out_bias=True, position='learned'),
                  MlpConfig(48, 'relu', gated=False, bias=True), norm='layer', tie_embeddings=True, position_offset=2)
HALF = SparsityConfig(0.5, 0.5, block=4)
TOKENS = jax.random.randint(jax.random.key(4), (3, 12), 0, 41)
FIRST = 5


def target_of(s=HALF, selector=None, cfg=CFG, **fields):
    return SparseTarget(cfg, s, selector or Random(cfg, s, 1), logged=True, **fields)


@pytest.fixture(scope='module')
def params():
    base = lively(CFG)
    draw = np.random.default_rng(0).random
    mean = {part: jnp.array(draw((CFG.num_layers, n)), jnp.float32) for part, n in HALF.sizes(CFG).items()}
    return {'base': base, 'sparsity': {'mean': mean}}


@pytest.fixture(scope='module')
def packed(params):
    return params | {'base': layout.pack(params['base'])}


@functools.cache
def random_params(make):
    """What make(key) would give, of random numbers throughout: biases and norms are zeros and ones when made."""
    shapes = jax.eval_shape(make, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.array(0.3 * rng.standard_normal(a.shape), a.dtype), shapes)


BASES = {cfg: functools.partial(init_params, cfg) for cfg in (CFG, OPT)}
PREDICTOR = predictor.PredictorConfig(width_heads=8, width_neurons=8, block=4)
PREDICTS = functools.partial(predictor.init_params, CFG, PREDICTOR)


# --- one layer after another, with choices made by hand ---------------------------------------------------------


def through(cfg, base, units, s=HALF, compute='masked', implementation='xla', whole=False):
    """The sparse layers on random residuals with caches of random keys and values: residual, cache before, cache."""
    stacked = not isinstance(base['layers'], tuple)
    t = SparseTarget(cfg, s, Random(cfg, s), compute, implementation, stacked=stacked)
    batch = units['heads'].shape[0]
    x = jax.random.normal(jax.random.key(7), (batch, 1, cfg.hidden_size))
    kv = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape),
                      caches.init_kv(cfg, batch, 6, 'float32', stacked=True))
    if not stacked:
        kv = tuple(jax.tree.map(lambda a, l=l: a[l], kv) for l in range(cfg.num_layers))

    @jax.jit
    def run(base, units, x, kv):
        ctx = make_context(cfg, jnp.full((batch,), 3), 1, 6, native=not stacked)
        if whole:
            sparse = s.sparse_layers(cfg)
            return run_layers(cfg, base, x, kv, ctx, sparse.start, sparse.stop)[:2]
        picked = ()
        if compute == 'gathered':
            one = lambda a: Picked(*select.to_ids(a.any(0), a.shape[-1]),
                                   a[:, select.to_ids(a.any(0), a.shape[-1])[0]].astype(jnp.float32))
            picked = tuple({part: one(a[:, l]) for part, a in units.items()} for l in range(cfg.num_layers))
        choice = step.Choice(units, jnp.zeros((batch,), jnp.int32), picked)
        return step.thinned(t, {'base': base}, x, kv, ctx, choice)

    return x, kv, *run(base, units, x, kv)


def units_of(cfg, share, rows=2, s=HALF):
    draw = np.random.default_rng(5).random
    return {part: jnp.array(draw((rows, cfg.num_layers, n)) < share) for part, n in s.sizes(cfg).items()}


def test_masks_of_ones_change_no_bit(params, packed):
    ones = units_of(CFG, 1)
    for base in (params['base'], packed['base']):
        _, _, x, kv = through(CFG, base, ones)
        _, _, want, want_kv = through(CFG, base, ones, whole=True)
        np.testing.assert_array_equal(x, want)
        jax.tree.map(np.testing.assert_array_equal, kv, want_kv)
    _, _, other, _ = through(CFG, packed['base'], units_of(CFG, 0.9))
    assert float(jnp.abs(other - want).max()) > 1e-3
    _, _, got, got_kv = through(CFG, packed['base'], ones, compute='gathered')  # all ids
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got_kv, want_kv)


@pytest.mark.parametrize('cfg', (CFG, OPT), ids=('swiglu', 'relu'))
@pytest.mark.parametrize('compute', ('masked', 'gathered'))
def test_masks_of_zeros_leave_the_residual_and_the_biases(cfg, compute):
    base = random_params(BASES[cfg])
    nothing = units_of(cfg, 0)
    given = layout.pack(base) if compute == 'gathered' else base
    x, before, got, kv = through(cfg, given, nothing, compute=compute)
    biases = 0
    if cfg.mlp.bias:
        biases = base['layers']['attn']['o']['bias'][1:].sum(0) + base['layers']['mlp']['down']['bias'][1:].sum(0)
    np.testing.assert_allclose(got, x + biases, atol=1e-5)
    if compute == 'masked':
        _, _, want, want_kv = through(cfg, base, nothing, whole=True)
        assert float(jnp.abs(got - want).max()) > 0.1  # the mask is not of a copy
        k, want_k = kv.k[1, :, :, 3], want_kv.k[1, :, :, 3]
        np.testing.assert_allclose(k, want_k, atol=1e-5)  # keys of every head are made all the same
        assert float(jnp.abs(k - before.k[1, :, :, 3]).max()) > 0.1


@pytest.mark.parametrize('cfg', (CFG, OPT), ids=('swiglu', 'relu'))
@pytest.mark.parametrize('fields', (dict(block=4), dict(block=1, head_unit='head', rows='union')),
                         ids=('each', 'union'))
def test_gathered_is_masked(cfg, fields):
    """Random choices, another for each row; ids beyond those that count are padding."""
    s = dataclasses.replace(HALF, **fields)
    base = random_params(BASES[cfg])
    chosen = units_of(cfg, 0.4, rows=3, s=s)
    loaded = select.union(chosen) if s.rows == 'union' else chosen
    _, _, want, want_kv = through(cfg, base, chosen, s=s)
    _, _, own, _ = through(cfg, base, select.union(chosen), s=s)
    assert (float(jnp.abs(own - want).max()) > 1e-2) == (s.rows == 'each')  # what a row is not to go through counts
    for implementation in ('xla', *['native'] * native.available()):
        _, _, got, kv = through(cfg, layout.pack(base), loaded, s, 'gathered', implementation)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(jnp.stack([layer.v for layer in kv])[1:], want_kv.v[1:], atol=2e-5)


# --- whole calls ------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def by_chance(params):
    """A new choice every second token, another for each row: logits, cache."""
    recorded = {part: jax.random.uniform(jax.random.key(n), (3, 16, CFG.num_layers, n))
                for part, n in HALF.sizes(CFG).items()}
    target = target_of(dataclasses.replace(HALF, refresh=2), Oracle(CFG, HALF))
    return target, recorded, forced(target, params | {'recorded': recorded}, TOKENS, FIRST)


def test_steps_are_one_pass_under_the_logged_masks(params, by_chance):
    """All at once, and with the keys and values of all heads: so no head that comes back misses any, and no choice
    depends on what follows."""
    target, _, (logits, cache) = by_chance
    units, slots = kept_units(target, cache, FIRST, 12)
    assert slots == [[5, 7, 9, 11]] * 3
    assert len({str(units['heads'][0, t].tolist()) for t in range(5, 12)}) > 1
    masks = select.expand(CFG, HALF, {part: a.swapaxes(1, 2).reshape(3, CFG.num_layers, 12, -1)
                                      for part, a in units.items()})
    masks = {part: a.transpose(1, 0, 2, 3) for part, a in masks.items()}
    want = forward(CFG, params['base'], TOKENS, extra=masks)[:, FIRST - 1:]
    np.testing.assert_allclose(logits, want, atol=2e-5)
    dense = forward(CFG, params['base'], TOKENS)[:, FIRST - 1:]
    assert float(jnp.abs(logits - dense).max(-1)[:, 1:].min()) > 1e-3
    np.testing.assert_allclose(logits[:, 0], dense[:, 0], atol=2e-5)  # the prompt is whole


@pytest.mark.parametrize('implementation', (pytest.param('native', marks=pytest.mark.skipif(
    not native.available(), reason='no native code')), pytest.param('xla', marks=pytest.mark.slow)))
def test_a_gathered_call_is_the_masked_one(packed, by_chance, implementation):
    target, recorded, (want, cache) = by_chance
    gathered = dataclasses.replace(target, compute='gathered', stacked=False, implementation=implementation)
    got, other = forced(gathered, packed | {'recorded': recorded}, TOKENS, FIRST)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert str(gathered.audit(other)) == str(target.audit(cache))
    assert str(gathered.statistics(other)) == str(target.statistics(cache))


def test_unrolled_is_scanned(packed, by_chance):
    target, recorded, (want, _) = by_chance
    got, _ = forced(dataclasses.replace(target, stacked=False), packed | {'recorded': recorded}, TOKENS, FIRST)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_nothing_dropped_is_the_whole_model(params):
    got, _ = forced(target_of(SparsityConfig()), params, TOKENS, FIRST)
    np.testing.assert_allclose(got, forward(CFG, params['base'], TOKENS)[:, FIRST - 1:], atol=2e-5)


@pytest.mark.parametrize('rows', ('each', 'union'))
def test_what_a_batch_means(params, rows):
    """Equal rows are one row. Under 'each' the neighbours do not matter, under 'union' they do."""
    s = dataclasses.replace(HALF, rows=rows, refresh=3)
    target = target_of(s, Predictor(CFG, s, PREDICTOR))
    params = params | {'sparsity': random_params(PREDICTS)}
    run = lambda tokens: forced(target, params, tokens, FIRST)[0]
    alone = run(TOKENS[:1])
    np.testing.assert_allclose(run(jnp.tile(TOKENS[:1], (3, 1))), jnp.tile(alone, (3, 1, 1)), atol=2e-5)
    beside = float(jnp.abs(run(TOKENS)[:1] - alone).max())
    assert beside < 2e-5 if rows == 'each' else beside > 1e-3


def test_a_choice_reads_no_later_token(params):
    s = dataclasses.replace(HALF, refresh=3)
    target = target_of(s, Predictor(CFG, s, PREDICTOR))
    params = params | {'sparsity': random_params(PREDICTS)}
    changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 41)
    (before, a), (after, b) = (forced(target, params, tokens, FIRST) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])  # said after tokens 4..7
    kept = [kept_units(target, cache, FIRST, 12) for cache in (a, b)]
    assert kept[0][1] == [[5, 8, 11]] * 3
    same = [(kept[0][0]['neurons'][:, t] == kept[1][0]['neurons'][:, t]).all() for t in (7, 8)]
    assert same == [True, False]


def test_a_token_taken_back_leaves_no_trace(params):
    """Another token is run at the slot, taken back, and the right one gets what it gets without it."""
    target = target_of(dataclasses.replace(HALF, refresh=3), Griffin(CFG, HALF))
    _, cache = forced(target, params, TOKENS, FIRST)
    step = jax.jit(lambda tokens, cache: target.forward(params, tokens, cache))
    want = step(TOKENS[:, :1], cache)
    ahead = caches.commit(step(TOKENS[:, 1:2], cache).cache, jnp.zeros(3, jnp.int32), TOKENS[:, 2])
    beyond = step(TOKENS[:, 2:3], ahead).cache
    got = step(TOKENS[:, :1], beyond.replace(pos=cache.pos))
    np.testing.assert_array_equal(got.logits, want.logits)


def test_griffin_counts_the_prompt_alone(params):
    """|h| over its norm, by hand; padding behind the prompt says nothing."""
    target = target_of(HALF, Griffin(CFG, HALF))
    run = jax.jit(lambda tokens: target.forward(params, tokens, target.init_cache(3, 16, 0),
                                                logits_at=jnp.array([3, 6, 8]), taps=('attention:1',)))
    output = run(TOKENS[:, :9])
    got = output.cache.layers.prompt
    padded = jnp.where(jnp.arange(9) > jnp.array([3, 6, 8])[:, None], 0, TOKENS[:, :9])
    jax.tree.map(np.testing.assert_array_equal, run(padded).cache.layers.prompt, got)
    heads = np.linalg.norm(output.taps['attention:1'], axis=-1)
    share = heads / np.linalg.norm(heads, axis=-1, keepdims=True)
    for row, n in enumerate((4, 7, 9)):
        want = np.sqrt((share[row, :n] ** 2).sum(0)).reshape(2, 2).sum(-1)
        np.testing.assert_allclose(got['heads'][row, 1], want, rtol=1e-5)
    plain = PlainTarget(CFG).forward(params, TOKENS[:, :9], PlainTarget(CFG).init_cache(3, 16, 0)).cache.layers
    np.testing.assert_allclose(output.cache.layers.kv.k, plain.k, atol=1e-5)


def test_bytes_are_those_of_the_shapes(params):
    """Half of everything in two layers of three, the choice every second token."""
    target = target_of(dataclasses.replace(HALF, refresh=2), Static(CFG, HALF))
    _, cache = forced(target, params, TOKENS, FIRST)
    got = target.statistics(cache)
    q, kv, ffn = 32 * 32, 2 * 16 * 32, 3 * 32 * 48
    assert got['weights'] == pytest.approx(4 * (3 * kv + (2 * q + ffn) * (1 + 2 * 0.5)))
    slots = 3 * np.arange(6, 13).mean()
    assert got['kv'] == pytest.approx(4 * 2 * 16 * slots * (1 + 2 * 0.5)) and got['head'] == 4 * 41 * 32
    assert got['dense'] == pytest.approx(4 * (3 * (2 * q + kv + ffn) + 3 * 2 * 16 * slots + 41 * 32))
    assert (got['steps'], got['choices'], got['selector']) == (7, 4, 0)
    by_chance = target_of(HALF, Random(CFG, HALF))
    assert got['share'] < 0.75 and by_chance.s.counts_of(CFG, 'neurons') == (12, 6, 6)
    whole = target_of(SparsityConfig())
    assert whole.statistics(forced(whole, params, TOKENS, FIRST)[1])['share'] == pytest.approx(1)


@pytest.mark.parametrize('method', (Cats(), Teal()), ids=('cats', 'teal'))
def test_thresholds(params, method):
    """A magnitude nobody exceeds leaves nothing, one that all exceed everything; the account follows."""
    target = SparseTarget(CFG, HALF, method)
    tau = calibrate(CFG, params['base'], TOKENS, method, 0.6)
    run = lambda tau: forced(target, params | {'sparsity': tau}, TOKENS[:1], FIRST)
    logits, cache = run(tau)
    share = target.statistics(cache)['by_matrix']
    assert share['kv'] == 1 if isinstance(method, Cats) else share['kv'] < 0.9
    of_sparse = {name: (3 * a - 1) / 2 for name, a in share.items()}  # layer 0 is whole
    assert 0.4 < of_sparse['down'] < 0.8 and (of_sparse['gate'] == 1) == isinstance(method, Cats)
    dense = forward(CFG, params['base'], TOKENS[:1])[:, FIRST - 1:]
    assert float(jnp.abs(logits - dense)[:, 1:].max()) > 1e-3
    all_of_it = jax.tree.map(lambda a: jnp.full_like(a, -1), tau)
    np.testing.assert_allclose(run(all_of_it)[0], dense, atol=2e-5)
    nothing = target.statistics(run(jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), tau))[1])['by_matrix']
    assert nothing['down'] == pytest.approx(1 / 3)


def test_gathered_products_and_their_names():
    w, x = jax.random.normal(jax.random.key(0), (24, 40)), jax.random.normal(jax.random.key(1), (3, 40))
    ids, active = jnp.array([5, 0, 3, 3]), 3
    h = jnp.zeros((3, 16)).at[:, :12].set(1.0).at[:, 12:].set(jnp.nan)  # what does not count may hold anything
    want = x @ w.reshape(6, 4, 40)[ids[:3]].reshape(12, 40).T
    for implementation in ('xla', *['native'] * native.available()):
        got = gather.rows_in(x, w, ids, active, 4, implementation)
        np.testing.assert_allclose(got[:, :12], want, atol=1e-4)
        assert (got[:, 12:] == 0).all()
        added = gather.rows_out(h, w, ids, active, 4, implementation)
        np.testing.assert_allclose(added[0], w.reshape(6, 4, 40)[ids[:3]].sum((0, 1)), atol=1e-4)
    with pytest.raises(ConfigError, match="implementation: unknown 'mosaic'"):
        gather.rows_in(x, w, ids, active, 4, 'mosaic')
    with pytest.raises(ConfigError, match='implementation native'):
        gather.rows_in(jnp.zeros((40, 40)), w, ids, active, 4, 'native')


def test_a_guard_finds_out_a_bad_choice_and_goes_on_whole(params):
    """In the target's own cache: what the thinned layers left there is read again."""
    watched = guard.Guarded(target_of(SparsityConfig(0.5, 0.1, block=4)), share=0.6, floor=0.95, seed=1)
    prompts, new, states = [[1, 2, 3, 4, 5], [7], [9, 9, 30]], 24, []
    tokens = generate(watched, Autoregressive(), params, prompts, max_new_tokens=new, on_state=states.append).tokens
    logs = json.loads(json.dumps(guard.log(watched, states[0].cache)))
    for prompt, ids, row in zip(prompts, tokens, logs, strict=True):
        first = row['fallback'] - row['prompt'] + 1
        whole = jnp.zeros((1, 32), jnp.int32).at[0, :len(prompt) + new].set(jnp.array(prompt + ids))
        says = forward(CFG, params['base'], whole)[0].argmax(-1)[len(prompt) - 1:len(prompt) + new - 1].tolist()
        assert 4 <= first < new - 2 and says[first:] == ids[first:] and says[:first] != ids[:first]
        assert row['skipped'][0]['neurons'] and row['skipped'][0]['heads'][0] == []  # the first layer is whole


@pytest.mark.parametrize('fields, said', (
    (dict(compute='sparse'), "compute: unknown 'sparse'"), (dict(compute='gathered'), 'stacked False'),
    (dict(implementation='cuda'), "implementation: unknown 'cuda'"),
    (dict(selector=Cats(), compute='gathered', stacked=False), 'Cats decides while a layer runs')))
def test_what_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        target_of(**fields)


def test_what_a_call_is_refused(params):
    target = target_of()
    cache = target.init_cache(1, 16, 0)
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ConfigError, match="asked for 'hidden:1'"):
        target.forward(params, one, cache, taps=('hidden:1',))
    with pytest.raises(ConfigError, match='no resume and no masks'):
        target.forward(params, one, cache, masks={})
    gathered = target_of(compute='gathered', stacked=False)
    with pytest.raises(ConfigError, match='parameters of sparsity.layout.pack'):
        gathered.forward(params, one, gathered.init_cache(1, 16, 0))
