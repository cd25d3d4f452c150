"""The pass over whole sequences: against a model written in numpy, and who may read whom, by gradient.

Most run operation by operation (jax.disable_jit): one compilation an operation serves every shape of model.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import model as backbone_model
from backbone.config import AttentionConfig, MlpConfig
from backbone.layers import make_context
from stagformer import model
from stagformer.config import StagFormerConfig
from tests.conftest import tiny_config
from tests.stagformer.reference import plain, random_params, staggered, widened

VOCAB, SIZE = 23, 8
BASE = tiny_config(vocab=VOCAB, hidden=16, layers=4, heads=4, kv_heads=2, max_seq_len=16)
OPT = BASE.replace(norm='layer', family='opt', attention=AttentionConfig(4, 4, 4, True, True, position='learned'),
                   mlp=MlpConfig(24, 'relu', gated=False, bias=True), position_offset=2, tie_embeddings=True)
DEPTHS = {1: (4,), 2: (2, 2), 3: (2, 1, 1), 4: (1, 1, 1, 1)}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, SIZE))


def make(depths=(2, 2), base=BASE, **fields) -> StagFormerConfig:
    layers = depths[0] if fields.get('shared') else sum(depths)
    return StagFormerConfig(base.replace(num_layers=layers), depths, **fields)


def params_of(cfg: StagFormerConfig, dtype=np.float64, seed: int = 0) -> dict:
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), random_params(shapes, seed))


def forward(cfg, params, tokens=TOKENS, **options):
    with jax.disable_jit():
        return model.forward(cfg, params, jnp.asarray(tokens), **options)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


CASES = {f'p={p} w={w}': make(DEPTHS[p], window=w) for p, w in itertools.product(DEPTHS, (None, 1, 3))} | {
    'shared': make(shared=True),
    'shared, three passes, window': make((2, 2, 2), shared=True, window=2),
    'all below': make(DEPTHS[3], context_from='all_prev'),
    'all below, window, mixed, uneven': make((1, 2, 1), context_from='all_prev', window=2, mix=True),
    'mixed': make(DEPTHS[4], mix=True),
    'uneven': make((1, 3)),
    'no norm, no positions': make(context_norm=False, cross_rope=False),
    'as many key heads as heads': make(cross_kv_heads=4),
    'one key head': make(cross_kv_heads=1, window=3),
    'not staggered': make(DEPTHS[3], lag=0),
    'not staggered, window': make(lag=0, window=2),
    'a window in self-attention': make(base=BASE.replace(attention=AttentionConfig(4, 2, 4, window=3))),
    'layer norm, learned positions, biases': make(DEPTHS[3], OPT, window=3),
}


# Each of these differs from a case of the suite in one size only.
SAME_PATH = ('uneven', 'one key head', 'as many key heads as heads')


@pytest.mark.parametrize('case', [pytest.param(c, marks=pytest.mark.slow) if c in SAME_PATH else c for c in CASES])
def test_equals_the_model_in_numpy(float64, case):
    cfg = CASES[case]
    params = params_of(cfg)
    with jax.disable_jit():
        outputs = model.stack_outputs(cfg, params, jnp.asarray(TOKENS))
    logits = forward(cfg, params)
    for row, tokens in enumerate(TOKENS):
        want, said = staggered(cfg, params, tokens)
        np.testing.assert_allclose(np.stack(outputs)[:, row], said, atol=1e-9)
        np.testing.assert_allclose(logits[row], want, atol=1e-9)


@pytest.mark.parametrize('change', (
    {'lag': 0}, {'window': 3}, {'window': None}, {'cross_rope': False}, {'context_norm': False}, {'mix': True}))
def test_any_other_model_is_told_apart(float64, change):
    """Negative control: with one field changed the comparison above fails by much more than it allows."""
    cfg = make(window=2)
    params = params_of(cfg) | {}
    params['stagformer'] = params['stagformer'] | {'mix': jnp.array([0.5, 1.0])}
    want, _ = staggered(dataclasses.replace(cfg, **change), params, TOKENS[0])
    assert np.abs(forward(cfg, params)[0] - want).max() > 1e-2


@pytest.mark.slow
def test_ways_to_attend_agree(float64):
    cfg = make(window=3)
    params = params_of(cfg)
    want = forward(cfg, params)
    for options in ({'query_chunk': 4}, {'attention': 'xla'}):
        np.testing.assert_allclose(forward(cfg, params, **options), want, atol=1e-4)  # xla: float32 inside


@pytest.mark.parametrize('case', ('p=2 w=None', 'all below, window, mixed, uneven'))
def test_packed_documents_do_not_meet(float64, case):
    """Documents beside each other in a row are each what they are alone; so their first tokens read nothing."""
    cfg, cuts = CASES[case], (5, 2)
    params = params_of(cfg)
    segments = np.arange(SIZE) >= np.array(cuts)[:, None]
    positions = np.arange(SIZE) - segments * np.array(cuts)[:, None]
    got = forward(cfg, params, segments=jnp.asarray(segments + 1), positions=jnp.asarray(positions))
    for row, cut in enumerate(cuts):
        for part in (slice(0, cut), slice(cut, SIZE)):
            np.testing.assert_allclose(got[row, part], staggered(cfg, params, TOKENS[row, part])[0], atol=1e-9)


# --- who reads whom ---------------------------------------------------------------------------------------------------


def patched(cfg, params, delta, tokens, **options):
    """Logits where stack s says delta[s] [B, S, d] more than it would to those who read it."""
    with pytest.MonkeyPatch.context() as patch:
        honest = model.context_of
        patch.setattr(model, 'context_of', lambda cfg, p, s, h: honest(cfg, p, s, h + delta[s]))
        return model.forward(cfg, params, tokens, **options)


def moves(cfg: StagFormerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Whether logits at i move with what stack s says of position j to others, [p - 1, i, j], and with the token at j,
    [i, j]. One row of a batch for each; float64, so that moved and rounded are ten orders apart."""
    params, count = params_of(cfg), cfg.stacks - 1
    rows = 1 + SIZE * max(4, cfg.stacks)  # as many for all, so that nothing is compiled again
    tokens = np.tile(np.arange(SIZE), (rows, 1))
    delta = np.zeros((count, rows, SIZE, 16))
    for j in range(SIZE):
        tokens[1 + j, j] = SIZE + j
        for s in range(count):
            delta[s, 1 + SIZE * (s + 1) + j, j] = np.linspace(-1, 1, 16)
    with jax.disable_jit():
        logits = np.asarray(patched(cfg, params, jnp.asarray(delta), jnp.asarray(tokens)))
    moved = np.abs(logits[1:] - logits[0]).max(-1)
    assert ((moved < 1e-12) | (moved > 1e-6)).all()
    moved = (moved > 1e-9).reshape(-1, SIZE, SIZE).swapaxes(1, 2)
    return moved[1:1 + count], moved[0]


def expected(cfg: StagFormerConfig, size: int = SIZE) -> np.ndarray:
    """What `moves` should say of stacks of one layer, whose self-attention spreads nothing that they read: each hop
    from stack to stack goes back between `lag` and lag + window - 1 positions."""
    back = np.arange(size)[:, None] - np.arange(size)
    found = []
    for s in range(cfg.stacks - 1):
        hops = cfg.stacks - 1 - s
        fewest = 1 if cfg.context_from == 'all_prev' else hops
        furthest = hops * (cfg.lag + cfg.window - 1) if cfg.window else size
        found.append((back >= fewest * cfg.lag) & (back <= furthest))
    return np.stack(found)


READS = {'p=2': make((1, 1)), 'p=2 w=1': make((1, 1), window=1), 'p=2 w=2': make((1, 1), window=2),
         'p=3': make((1, 1, 1)), 'p=3 w=1': make((1, 1, 1), window=1), 'p=4 w=2': make((1, 1, 1, 1), window=2),
         'all below': make((1, 1, 1), context_from='all_prev'),
         'all below w=2': make((1, 1, 1), context_from='all_prev', window=2),
         'not staggered': make((1, 1), lag=0), 'not staggered w=2': make((1, 1, 1), lag=0, window=2)}


@pytest.mark.parametrize('case', READS)
def test_what_a_stack_says_is_read_later_and_never_sooner(float64, case):
    """Position j of the stack below reaches the logits of j + 1, ..., j + window; of n stacks below first those of
    j + n (in a chain). The control without stagger, lag 0, fails the staggered expectation."""
    cfg = READS[case]
    said, tokens = moves(cfg)
    np.testing.assert_array_equal(said, expected(cfg))
    np.testing.assert_array_equal(tokens, np.tri(SIZE, dtype=bool))
    if cfg.lag == 0:
        assert (said != expected(dataclasses.replace(cfg, lag=1))).any()


def filled(cfg, p, x, k, v, mask, ctx):
    """The cross-attention with a large negative score where nothing may be read."""
    q = model.heads_of(cfg, model.dense(p['q'], model.norm(cfg.base, p['norm'], x)), ctx.rope)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[1], 1) for a in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum('bshd,bhcd->bhsc', q, k) / 2, -1e9)
    return model.out(cfg.base, p, jnp.einsum('bhsc,bhcd->bshd', jax.nn.softmax(scores), v))


def test_an_empty_context_is_exactly_nothing(float64, monkeypatch):
    """The first logits depend on no cross-attention; a score of -1e9 would have given the first token the mean of all
    later ones, and the test of causality sees that."""
    cfg = CASES['p=2 w=None']
    params = params_of(cfg)
    other = params | {'stagformer': params_of(cfg, seed=1)['stagformer']}

    def first_differ():
        return np.abs(forward(cfg, params) - forward(cfg, other))[:, 0].max()

    assert first_differ() == 0
    monkeypatch.setattr(model, 'cross', filled)
    assert first_differ() > 1e-2
    _, tokens = moves(READS['p=2'])
    assert tokens[0].all()


SEGMENTS = jnp.asarray([[1, 1, 2, 3, 3, 3, 3, 3]] * 2)


@pytest.mark.parametrize('window', (1, pytest.param(2, marks=pytest.mark.slow)))
def test_gradients(window):
    """The last output of a document has no reader, so no gradient; all before have. With window = 1 queries and keys
    have nothing to choose and get exactly none; window = 2 is the control."""
    cfg = make((1, 1), window=window)

    def loss(delta, params):
        return (patched(cfg, params, delta, jnp.asarray(TOKENS), segments=SEGMENTS) ** 2).mean()

    said, params = jax.jit(jax.grad(loss, (0, 1)))(jnp.zeros((1, *TOKENS.shape, 16)), params_of(cfg, np.float32))
    assert (np.abs(said[0]).max(-1) > 0).tolist() == [[True, False, False, True, True, True, True, False]] * 2
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(params))
    cross = {n: float(jnp.abs(params['stagformer']['cross'][n]['kernel']).max()) for n in 'qkvo'}
    assert (cross['q'] == 0) == (cross['k'] == 0) == (window == 1)
    assert cross['v'] > 0 < cross['o']


def test_finite_in_bfloat16():
    cfg = make((1, 1))
    got = jax.jit(lambda params: model.forward(cfg, params, jnp.asarray(TOKENS), segments=SEGMENTS))
    assert np.isfinite(np.asarray(got(params_of(cfg, jnp.bfloat16)), np.float32)).all()


# --- what is left of it when a part is gone ---------------------------------------------------------------------------


def layers_of(cfg, params, lo, hi) -> tuple:
    """The plain model made of layers lo..hi-1."""
    return cfg.base.replace(num_layers=hi - lo), params['base'] | {
        'layers': jax.tree.map(lambda a: a[lo:hi], params['base']['layers'])}


def silent(params):
    """The same parameters with a cross-attention that adds nothing."""
    mine = params['stagformer']
    cross = mine['cross'] | {'o': jax.tree.map(jnp.zeros_like, mine['cross']['o'])}
    return params | {'stagformer': mine | {'cross': cross}}


def test_one_stack_is_the_plain_model(float64):
    cfg = make((4,))
    params = params_of(cfg)
    assert params['stagformer'] == {}
    np.testing.assert_allclose(forward(cfg, params)[0], plain(cfg.base, params['base'], TOKENS[0]), atol=1e-9)
    with jax.disable_jit():
        same = backbone_model.forward(cfg.base, params['base'], jnp.asarray(TOKENS))
    np.testing.assert_array_equal(forward(cfg, params), same)


def test_stacks_restart_from_the_embedding(float64):
    """Without what it reads the last stack is a plain model of its own layers, and not of all layers."""
    cfg = make((2, 2))
    params = silent(params_of(cfg))
    got = forward(cfg, params)[0]
    np.testing.assert_allclose(got, plain(*layers_of(cfg, params, 2, 4), TOKENS[0]), atol=1e-9)
    assert np.abs(got - plain(*layers_of(cfg, params, 0, 4), TOKENS[0])).max() > 1e-2
    with jax.disable_jit():
        lower, _ = model.stack_outputs(cfg, params, jnp.asarray(TOKENS))
        lower = backbone_model.finish(cfg.base, params['base'], lower)
        lower = backbone_model.unembed(cfg.base, params['base'], lower)[0]
    np.testing.assert_allclose(lower, plain(*layers_of(cfg, params, 0, 2), TOKENS[0]), atol=1e-9)


def test_shared_passes_differ_by_what_they_read_alone(float64):
    cfg = make((2, 2, 2), shared=True)
    params = params_of(cfg)
    with jax.disable_jit():
        first, *others = model.stack_outputs(cfg, silent(params), jnp.asarray(TOKENS))
        reading = model.stack_outputs(cfg, params, jnp.asarray(TOKENS))
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert np.abs(reading[1] - reading[0]).max() > 1e-2 < np.abs(reading[2] - reading[1]).max()


def test_a_window_of_all_is_no_window(float64):
    cfg = make()
    params = params_of(cfg)
    wide, narrow = (forward(dataclasses.replace(cfg, window=w), params) for w in (SIZE - 1, SIZE - 2))
    np.testing.assert_array_equal(wide, forward(cfg, params))
    np.testing.assert_array_equal(narrow[:, :-1], wide[:, :-1])
    assert np.abs(narrow - wide)[:, -1].max() > 1e-3


@pytest.mark.parametrize('window', (1, 2))
def test_of_one_position_queries_and_keys_say_nothing(float64, window):
    cfg = make(window=window)
    params, other = params_of(cfg), params_of(cfg, seed=1)
    cross = params['stagformer']['cross'] | {n: other['stagformer']['cross'][n] for n in 'qk'}
    changed = params | {'stagformer': params['stagformer'] | {'cross': cross}}
    assert (np.abs(forward(cfg, changed) - forward(cfg, params)).max() < 1e-12) == (window == 1)


def test_a_shifted_context_under_the_usual_mask(float64):
    """The strict mask is the usual causal one over a context shifted by one, if and only if keys keep the position they
    come from and the slot that the shift leaves empty is masked: a key of zeros takes its share of a softmax."""
    cfg = make()
    p = jax.tree.map(lambda a: a[0], params_of(cfg)['stagformer']['cross'])
    x, context = np.random.default_rng(0).standard_normal((2, 2, SIZE, 16))
    shifted = np.concatenate([np.zeros((2, 1, 16)), context[:, :-1]], 1)
    index = np.arange(SIZE)
    usual = index <= index[:, None]

    def seen(context, start, mask):
        here, there = (make_context(cfg.base, jnp.array([at, at]), SIZE, SIZE) for at in (0, start))
        kv = model.cross_keys(cfg, p, jnp.asarray(context), there.rope)
        mask = jnp.asarray(np.broadcast_to(mask, (2, SIZE, SIZE)))
        return model.cross(cfg, p, jnp.asarray(x), *(a.transpose(0, 2, 1, 3) for a in (kv.k, kv.v)), mask, here)

    with jax.disable_jit():
        want = seen(context, 0, index < index[:, None])
        assert not want[:, 0].any()
        np.testing.assert_allclose(seen(shifted, -1, usual & (index > 0)), want, atol=1e-12)
        assert np.abs(seen(shifted, 0, usual & (index > 0)) - want).max() > 1e-2
        assert np.abs(seen(shifted, -1, usual) - want).max() > 1e-2


def test_the_default_mix_is_the_last_stack(float64):
    cfg = make(DEPTHS[3], mix=True)
    params = params_of(cfg)
    plainly = forward(dataclasses.replace(cfg, mix=False), params)
    assert np.abs(forward(cfg, params) - plainly).max() > 1e-2
    params['stagformer']['mix'] = jnp.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(forward(cfg, params), plainly, atol=1e-12)


def test_fresh_parameters():
    """What init gives: every layer its projections, a mix of the last stack alone, no output with zero_init."""
    cfg = make((1, 2, 1), mix=True, zero_init=True, context_from='all_prev', cross_kv_heads=1)
    mine = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))['stagformer']
    assert (cfg.cross_layers, cfg.cross_sources) == (3, 4)  # two layers that read one stack, one that reads two
    assert {n: mine['cross'][n]['kernel'].shape for n in 'qkvo'} == {
        'q': (3, 16, 16), 'k': (4, 16, 4), 'v': (4, 16, 4), 'o': (3, 16, 16)}
    assert mine['context_norm']['scale'].shape == (2, 16) and mine['cross']['norm']['scale'].shape == (3, 16)

    def some(key):
        mine = model.init_params(cfg, key)['stagformer']
        return mine['mix'], mine['cross']['k']['kernel'], mine['cross']['o']['kernel']

    mix, k, o = jax.jit(some)(jax.random.key(0))
    assert mix.tolist() == [0, 0, 1] and not o.any() and np.unique(k).size == k.size
    plainer = dataclasses.replace(cfg, mix=False, context_norm=False)
    assert set(jax.eval_shape(lambda: model.init_params(plainer, jax.random.key(0)))['stagformer']) == {'cross'}


def test_widened_reads_the_same_tree():
    """The reference knows no part of the tree that the model does not read."""
    cfg = CASES['all below, window, mixed, uneven']
    params = params_of(cfg, np.float32)
    assert jax.tree.structure(widened(params)) == jax.tree.structure(params)
