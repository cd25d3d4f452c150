"""What a score is: the derivative by a mask, whatever computes it; whose losses and tokens it counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from backbone.errors import ConfigError
from backbone.model import embed, finish, hidden_and_taps, init_params, run_layers, sequence_context, unembed
from sparsity import criteria, spans

pytestmark = pytest.mark.usefixtures('quick_compile')
L, B, T, H, KH, F = 2, 2, 9, 4, 2, 12
MLPS = {'swiglu': MlpConfig(F), 'relu': MlpConfig(F, 'relu', gated=False, bias=True)}


def model(kind: str) -> ModelConfig:
    return ModelConfig('llama', 19, 16, L, 16, AttentionConfig(H, KH, 4), MLPS[kind])


def weights(cfg: ModelConfig, dtype=np.float64) -> dict:
    """Random, lively, and of no bias that is zero; no compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda a: (rng.normal(size=a.shape) * 1.2 * max(a.shape[-2:-1] + (4,))**-0.5
                                   + (len(a.shape) < 3)).astype(dtype), shapes)


def rows() -> dict:
    """Row 0 is one document, row 1 another with two pads; the first three losses do not count."""
    rng = np.random.default_rng(1)
    segments = np.ones((B, T), np.int32)
    segments[1, -2:] = 0
    counts = (segments > 0) & (np.arange(T) >= 3) & (np.arange(T) < T - 1)
    counts[1, -3] = False
    return {'tokens': rng.integers(0, 19, (B, T)).astype(np.int32), 'segments': segments,
            'targets': rng.integers(0, 19, (B, T)).astype(np.int32), 'weights': counts.astype(float),
            'positions': np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}


def losses(cfg: ModelConfig, base: dict, batch: dict, masks: dict | None = None) -> jax.Array:
    """The mean loss of each row [B], written without what is tested. masks: by layer, for the plain layer."""
    ctx = sequence_context(cfg, (B, T), batch['segments'], batch['positions'])
    x, _, _ = run_layers(cfg, base, embed(cfg, base, batch['tokens'], ctx.positions), None, ctx, extra=masks)
    logp = jax.nn.log_softmax(unembed(cfg, base, finish(cfg, base, x)))
    nll = -jnp.take_along_axis(logp, batch['targets'][..., None], -1)[..., 0]
    return (nll * batch['weights']).sum(-1) / batch['weights'].sum(-1)


def ones() -> dict:
    return {'heads': np.ones((L, B, T, H)), 'neurons': np.ones((L, B, T, F))}


@functools.cache
def by_hand(kind: str) -> tuple[dict, dict]:
    """Derivatives by the masks [L, B, T, ...] and by the weights, of the sum over rows, in double."""
    cfg, batch = model(kind), rows()
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(lambda masks, base: losses(cfg, base, batch, masks).sum(), argnums=(0, 1)))(
            ones(), weights(cfg))
    return jax.tree.map(np.asarray, grads)


@functools.cache
def all_scores(kind: str) -> dict[str, criteria.Observed]:
    """Of whole rows, in double, by criterion and 'signed'. One compilation."""
    cfg, batch = model(kind), rows()
    names = criteria.CRITERIA + (criteria.CONTROLS if kind == 'swiglu' else ())

    def run(base: dict) -> dict:
        which = spans.whole(batch)
        return criteria.score_all(cfg, base, batch, which, names) | {
            'signed': criteria.score(cfg, base, batch, which, signed=True)}
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(run)(weights(cfg)))


def scored(kind: str, criterion: str = 'plainact', signed: bool = False) -> criteria.Observed:
    return all_scores(kind)['signed' if signed else criterion]


@pytest.mark.parametrize('kind', MLPS)
def test_a_score_is_the_derivative_by_the_units_mask(kind):
    """With and without the absolute value; which changes the ranking, for tokens cancel each other."""
    by_mask, plain, signed = by_hand(kind)[0], scored(kind), scored(kind, signed=True)
    for part in ('heads', 'neurons'):
        a, s = (np.asarray(getattr(seen, part))[:, 0].swapaxes(0, 1) for seen in (plain, signed))  # [L, B, n]
        np.testing.assert_allclose(a, np.abs(by_mask[part]).sum(2), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(s, by_mask[part].sum(2), rtol=1e-10, atol=1e-13)
        assert (np.abs(s) <= a + 1e-13).all() and (np.abs(s) < 0.8 * a).any()
        assert (a.argsort(-1) != np.abs(s).argsort(-1)).any()
    assert plain.heads.shape == (B, 1, L, H) and plain.neurons.shape == (B, 1, L, F)


@pytest.mark.parametrize('kind', MLPS)
def test_signed_scores_need_only_the_gradients_of_weights(kind):
    """sum_t h dh = sum_i W dW of the up projection (and b db) = sum_o W dW of the down projection, unit by unit; the
    gate's rows are no such thing, for its activation is not homogeneous."""
    signed = np.asarray(scored(kind, signed=True).neurons).sum((0, 1))  # [L, F]
    mlp, grad = weights(model(kind))['layers']['mlp'], by_hand(kind)[1]['layers']['mlp']
    up = (mlp['up']['kernel'] * grad['up']['kernel']).sum(1)
    if kind == 'relu':
        assert np.abs(signed - up).max() > 1e-4  # without the bias
        up = up + mlp['up']['bias'] * grad['up']['bias']
    down = (mlp['down']['kernel'] * grad['down']['kernel']).sum(2)
    np.testing.assert_allclose(up, signed, atol=1e-12)
    np.testing.assert_allclose(down, signed, atol=1e-12)
    if kind == 'swiglu':
        gate = (mlp['gate']['kernel'] * grad['gate']['kernel']).sum(1)
        assert np.abs(gate - signed).max() > 1e-3


def test_removing_a_little_of_a_unit_moves_the_loss_by_its_signed_score():
    cfg, batch, kind, step = model('swiglu'), rows(), 'swiglu', 1e-6
    signed = scored(kind, signed=True)
    with jax.enable_x64(True):
        base = weights(cfg)
        moved = jax.jit(lambda masks: losses(cfg, base, batch, masks))
        whole = moved(ones())
        for part, l, n in (('heads', 0, 1), ('heads', 1, 3), ('neurons', 0, 5), ('neurons', 1, 7)):
            masks = ones()
            masks[part][l, :, :, n] -= step
            slope = (whole - moved(masks)) / step
            np.testing.assert_allclose(slope, getattr(signed, part)[:, 0, l, n], atol=1e-6)


@pytest.mark.parametrize('kind', MLPS)
def test_the_other_criteria_are_what_they_say(kind):
    """Against derivatives by masks and weights of the whole model, and against its taps."""
    cfg, batch = model(kind), rows()
    by_mask, by_weight = by_hand(kind)
    real = batch['segments'] > 0
    count = real.sum(-1)
    units = lambda seen: np.asarray(seen.neurons)[:, 0].swapaxes(0, 1)  # [L, B, F]
    np.testing.assert_allclose(units(scored(kind, 'fisher')), (by_mask['neurons']**2).sum(2) / count[:, None],
                               rtol=1e-9, atol=1e-15)
    with jax.enable_x64(True):
        base = weights(cfg)
        taps = tuple(f'attention:{l}' for l in range(L))
        tapped = jax.jit(lambda base: hidden_and_taps(cfg, base, batch['tokens'], taps, segments=batch['segments'],
                                                      positions=batch['positions'])[1])(base)
        context = np.stack([tapped[tap] for tap in taps])  # [L, B, T, H, hd]
        each = jax.jit(jax.jacrev(lambda up: losses(cfg, {**base, 'layers': {**base['layers'], 'mlp': {
            **base['layers']['mlp'], 'up': {**base['layers']['mlp']['up'], 'kernel': up}}}}, batch)))
        kernel = base['layers']['mlp']['up']['kernel']
        of_row = np.asarray(each(kernel)).swapaxes(0, 1)  # [L, B, d, F]
    lengths = np.sqrt((context**2 * real[:, :, None, None]).sum((2, 4)))
    np.testing.assert_allclose(np.asarray(scored(kind, 'l2norm').heads)[:, 0].swapaxes(0, 1), lengths, rtol=1e-10)
    np.testing.assert_allclose(units(scored(kind, 'gradnorm')), np.sqrt((of_row**2).sum(2)), rtol=1e-9)
    np.testing.assert_allclose(units(scored(kind, 'plainact_w')), np.abs(kernel[:, None] * of_row).sum(2), rtol=1e-9)
    # The fisher of a head squares channel by channel: not the square of its mask's derivative.
    assert not np.allclose(np.asarray(scored(kind, 'fisher').heads)[:, 0].swapaxes(0, 1),
                           (by_mask['heads']**2).sum(2) / count[:, None], rtol=0.1)
    # By weights and by activations units rank otherwise.
    assert (units(scored(kind, 'plainact_w')).argsort(-1) != units(scored(kind)).argsort(-1)).any()
    np.testing.assert_allclose(scored(kind, 'plainact_w').heads, scored(kind).heads, rtol=1e-9)
    assert by_weight['layers']['attn']['q']['kernel'].any()


def test_a_dead_unit_scores_nothing_but_under_the_controls():
    """Before the activation it is the longest of all: why l2norm is taken after it."""
    cfg, batch = model('relu'), rows()
    base = weights(cfg, np.float32)
    base['layers']['mlp']['up']['bias'][:, 4] = -50
    run = jax.jit(lambda base: criteria.score_all(cfg, base, batch, spans.whole(batch), ('plainact', 'l2norm', 'nwot')))
    seen = {name: np.asarray(found.neurons) for name, found in run(base).items()}
    assert (seen['plainact'][..., 4] == 0).all() and (seen['l2norm'][..., 4] == 0).all()
    assert (seen['nwot'].max(-1) == seen['nwot'][..., 4]).all()  # the control would keep it first


def test_grasp_is_the_second_derivative_along_the_gradient():
    cfg, batch = model('swiglu'), rows()
    with jax.enable_x64(True):
        base = weights(cfg)
        masks = {'heads': np.ones((L, B, 1, H)), 'neurons': np.ones((L, B, 1, F))}
        slope = jax.jit(jax.grad(lambda masks: losses(cfg, base, batch, masks).sum()))
        first = slope(masks)
        bent = slope(jax.tree.map(lambda m, g: m + 1e-6 * g, masks, first))
        found = scored('swiglu', 'grasp')
    for part in ('heads', 'neurons'):
        expected = (np.asarray(first[part]) - np.asarray(bent[part])) / 1e-6
        np.testing.assert_allclose(np.asarray(getattr(found, part)).transpose(2, 0, 1, 3), expected, atol=1e-6)


@pytest.fixture(scope='module')
def score32():
    """criteria.score in single precision, compiled once: (batch, spans) -> Observed."""
    cfg = model('swiglu')
    base = jax.tree.map(jnp.asarray, weights(cfg, np.float32))
    return jax.jit(lambda batch, which: criteria.score(cfg, base, batch, which))


def test_pads_and_neighbours_do_not_count(score32):
    """What a pad holds, what other rows hold and targets without weight change no score; a real token does."""
    batch = rows()
    before = score32(batch, spans.whole(batch))
    other = {name: a.copy() for name, a in batch.items()}
    other['tokens'][1, -2:] = 3
    other['targets'][:, :3] = 0
    same = score32(other, spans.whole(other))
    jax.tree.map(np.testing.assert_array_equal, before, same)
    other['tokens'][0, 2] += 1
    moved = score32(other, spans.whole(other))
    np.testing.assert_array_equal(moved.neurons[1], before.neurons[1])
    assert not np.allclose(moved.neurons[0], before.neurons[0], rtol=1e-3)
    assert np.array_equal(spans.whole(batch).at[:, 0], [T - 1, T - 3])  # the last real token, not the last one


def test_windows_share_one_pass_and_add_up(score32):
    """Windows of a row cut its score in pieces; the loss of a window alone gives its tokens another score."""
    batch = {name: a[:, :8] for name, a in rows().items()}
    whole, by_four = score32(batch, spans.whole(batch)), score32(batch, spans.windows(batch, 4))
    for part in ('heads', 'neurons'):
        pieces = getattr(by_four, part)
        assert pieces.shape[1] == 2 and (pieces[0] > 0).all()
        np.testing.assert_allclose(pieces.sum(1), getattr(whole, part)[:, 0], rtol=1e-5)
    alone = score32(batch, spans.one(spans.windows(batch, 4), 0))
    np.testing.assert_array_equal(alone.context, by_four.context[:, :1])
    assert not np.allclose(alone.neurons[0, 0], by_four.neurons[0, 0], rtol=0.1)
    first = spans.windows(batch, 4, 1)
    assert np.asarray(first.counted).sum((0, 2)).tolist() == [2, 2]
    # A document that ends inside a window: the tokens of the next one are not its.
    cut = batch | {'segments': np.where(np.arange(8) < 5, 1, 2) * np.ones((B, 1), np.int32)}
    assert np.asarray(spans.windows(cut, 4).counted)[0].sum(-1).tolist() == [4, 1]


def test_what_is_read_is_causal_and_the_label_is_not(score32):
    """Tokens after the asking one change its label, not what the predictor reads there."""
    batch = {name: a[:, :8] for name, a in rows().items()}
    other = batch | {'tokens': np.concatenate([batch['tokens'][:, :5], batch['tokens'][:, 5:] // 2], 1)}
    one, two = (score32(b, spans.windows(b, 4)) for b in (batch, other))
    np.testing.assert_array_equal(one.context, two.context)  # asked at 0 and 4
    np.testing.assert_array_equal(one.residual, two.residual)
    assert not np.allclose(one.neurons[:, 1], two.neurons[:, 1], rtol=1e-3)


def test_scores_of_tokens_never_lie_there_for_all_layers_at_once():
    cfg, batch = model('swiglu'), rows()
    base, whole = weights(cfg, np.float32), f'[{L},{B},{T},{F}]'
    plain = jax.make_jaxpr(lambda base: criteria.score(cfg, base, batch, spans.whole(batch)))(base)
    masks = {part: a.astype(np.float32) for part, a in ones().items()}
    at_once = jax.make_jaxpr(jax.grad(lambda masks: losses(cfg, base, batch, masks).sum()))(masks)
    assert whole not in str(plain) and whole in str(at_once)


def test_groups_and_blocks_are_sums():
    cfg, seen = model('swiglu'), scored('swiglu')
    made = criteria.units(cfg, seen, 'kv_group', 3)
    np.testing.assert_allclose(made['heads'][..., 1], seen.heads[..., 2] + seen.heads[..., 3], rtol=1e-6)
    np.testing.assert_allclose(made['neurons'][..., 0], seen.neurons[..., :3].sum(-1), rtol=1e-6)
    assert criteria.units(cfg, seen, 'head', 1)['heads'].shape[-1] == H


def test_the_papers_label_made_causal():
    batch = rows()
    made = spans.prompt(batch, 5)
    assert np.array_equal(made.at, [[5], [5]]) and not np.asarray(made.loss)[:, :5].any()
    assert np.array_equal(made.counted[:, 0], batch['segments'] > 0)
    assert np.asarray(spans.prompt(batch, 7).known)[:, 0].tolist() == [1, 0]  # nothing follows in row 1


@pytest.mark.parametrize(('change', 'words'), (
    ({'criterion': 'magnitude'}, "unknown 'magnitude'"), ({'criterion': 'fisher', 'signed': True}, 'signed is for')))
def test_what_cannot_be_scored_is_named(change, words):
    cfg, batch = model('swiglu'), rows()
    with pytest.raises(ConfigError, match=words):
        criteria.score(cfg, weights(cfg), batch, spans.whole(batch), **change)
    with pytest.raises(ConfigError, match='window must be'):
        spans.windows(batch, T + 1)
