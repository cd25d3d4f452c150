"""The recurrence in all its forms, and one mixer through prompts, blocks and single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone import cache as caches
from backbone import mamba2
from backbone.config import SsmConfig
from backbone.errors import ConfigError
from backbone.mamba2 import mix, ssd, ssd_step
from rad.surgery import init_mixer

pytestmark = pytest.mark.usefixtures('quick_compile')
ROWS, SIZE, H, G, P, N = 2, 77, 6, 2, 4, 5


def inputs(dtype=np.float64, size=SIZE, decay=None):
    """x, dt, A, B, C, D, state of rows that remember for tens of tokens; decay: the log decay of every step instead."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    dt = np.exp(draw(ROWS, size, H) - 2).astype(dtype)
    A = -rng.uniform(0.1, 1, H).astype(dtype)
    if decay is not None:
        dt, A = np.ones_like(dt), np.full_like(A, decay)
    return (draw(ROWS, size, H, P), dt, A, draw(ROWS, size, G, N), draw(ROWS, size, H, N), draw(H),
            draw(ROWS, H, P, N))


def by_hand(x, dt, A, B, C, D, state, group=lambda h: h // (H // G)):
    """The recurrence of the definition, one number after the other."""
    y, state = np.zeros_like(x), state.copy()
    for b, t, h in np.ndindex(*dt.shape):
        state[b, h] = np.exp(dt[b, t, h] * A[h]) * state[b, h] + dt[b, t, h] * np.outer(x[b, t, h], B[b, t, group(h)])
        y[b, t, h] = state[b, h] @ C[b, t, h] + D[h] * x[b, t, h]
    return y, state


def value_and_gradients(arguments, **options):
    """(y, state), and the gradients by every argument of a number that both are in."""
    def energy(*arguments):
        y, state = ssd(*arguments, **options)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + (state ** 2).sum(), (y, state)

    gradients, found = jax.jit(jax.grad(energy, argnums=tuple(range(7)), has_aux=True))(*arguments)
    return *found, *gradients


def close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())), rtol=0)


def test_all_forms_are_the_recurrence_of_the_definition():
    begins = np.zeros((ROWS, SIZE), bool)
    begins[0, [5, 16, 17, 50]] = begins[1, [0, 32]] = True  # in a chunk, at its edge, twice running, at the start
    with jax.enable_x64(True):
        arguments = inputs()
        want = value_and_gradients(arguments, form='sequential')
        close(want[:2], by_hand(*arguments), 1e-12)
        close(value_and_gradients(arguments, chunk=16), want, 1e-11)
        want = value_and_gradients(arguments, form='sequential', resets=begins)
        for options in ({'form': 'associative'}, {'chunk': 1}, {'chunk': 32}, {'chunk': SIZE}):
            close(value_and_gradients(arguments, resets=begins, **options), want, 1e-11)
        x, dt, A, B, C, D, state = arguments
        y, after = by_hand(x[:, :1], dt[:, :1], A, B[:, :1], C[:, :1], D, state)
        close(ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state), (y[:, 0], after), 1e-12)
        # A tile of the groups, the usual mistake, is another model.
        assert np.abs(by_hand(*arguments, group=lambda h: h % G)[0] - by_hand(*arguments)[0]).max() > 0.1
    with pytest.raises(ConfigError, match="ssd form: unknown 'fast'"):
        ssd(*inputs(), form='fast')


def test_forms_agree_in_float32():
    arguments = inputs(np.float32)
    want = value_and_gradients(arguments, form='sequential')
    close(value_and_gradients(arguments, chunk=32), want, 1e-5)


def test_a_strong_decay_leaves_no_nan():
    """Exponents above the diagonal of a chunk are huge: masked before exp they are nothing, after it they are NaN."""
    found = value_and_gradients(inputs(np.float32, 256, decay=-4.0), chunk=256)
    assert all(np.isfinite(a).all() for a in found)

    def wrong(la):
        total = jnp.cumsum(la)
        return (jnp.exp(total[:, None] - total) * jnp.tril(jnp.ones((256, 256)))).sum()

    assert not np.isfinite(jax.grad(wrong)(jnp.full(256, -4.0))).all()


def test_padding_does_not_move_the_state():
    """Rows of 77 and 40 tokens: where dt is 0 the state stays, in whatever chunk a row ends."""
    with jax.enable_x64(True):
        x, dt, A, B, C, D, state = inputs()
        held = np.arange(SIZE) < np.array([[SIZE], [40]])
        run = jax.jit(lambda dt: ssd(x, dt, A, B, C, D, state, chunk=16))
        y, end = run(np.where(held[..., None], dt, 0))
        want = by_hand(*(a[1:, :40] for a in (x, dt)), A, B[1:, :40], C[1:, :40], D, state[1:])
        close((y[1:, :40], end[1:]), want, 1e-12)
        assert np.abs(run(dt)[1][1] - end[1]).max() > 0.1  # without it the padding is in the state


# --- the mixer --------------------------------------------------------------------------------------------------------

WIDTH, ROOM = 12, 4


def mixer_of(gated_norm=True, dtype=np.float64):
    """(cfg, mixer) with slow decays, N other than P."""
    cfg = SsmConfig(H, G, P, N, chunk=8, gated_norm=gated_norm)
    made = init_mixer(cfg, WIDTH, jax.random.key(1))
    rng = np.random.default_rng(2)
    made |= {'A_log': np.log(rng.uniform(0.05, 1, H)), 'dt_bias': rng.uniform(-2, 1, H), 'D': rng.standard_normal(H)}
    return cfg, jax.tree.map(lambda a: np.asarray(2 * a if a.ndim > 1 else a, dtype), made)


def tokens_of(size, seed=0):
    return np.random.default_rng(seed).standard_normal((3, size, WIDTH))


@pytest.fixture(scope='module', params=(True, False), ids=('gated_norm', 'no_norm'))
def model(request):
    """(cfg, {'whole', 'prompt', 'block'}: compiled functions of the mixer, a cache of states before a token)."""
    with jax.enable_x64(True):
        cfg, mixer = mixer_of(request.param)
        run = {'whole': jax.jit(lambda u, segments=None, valid=None: mix(cfg, mixer, u, segments=segments,
                                                                         valid=valid)[0]),
               'prompt': jax.jit(lambda u, state, last: mix(cfg, mixer, u, state, last=last)),
               'block': jax.jit(lambda u, state, pos: mix(cfg, mixer, u, state, pos=pos)),
               'replay': jax.jit(caches.replay)}
        yield cfg, run


def states_at(cfg, run, u, lengths):
    """The state of a clean pass over the first lengths[b] tokens of each row, by single tokens."""
    state = caches.init_ssm(cfg, len(u), 0, np.float64)
    for t in range(max(lengths)):
        _, new = run['block'](u[:, t:t + 1], state, state.at)
        state = run['replay'](new, np.minimum(t + 1, lengths))
    return state


def same_state(got, want, tolerance=1e-12):
    np.testing.assert_array_equal(got.at, want.at)
    close((got.state, got.tail), (want.state, want.tail), tolerance)


def poisoned(state):
    return state.replace(log=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.log))


def test_prompt_blocks_and_single_tokens_are_the_whole_sequence(model):
    """Uneven prompts, then a block of which each row keeps another part (one row nothing), then single tokens: outputs
    and both states are those of whole sequences. The log holds NaN wherever it may hold anything."""
    cfg, run = model
    with jax.enable_x64(True):
        u = tokens_of(24)
        want = run['whole'](u)
        lengths, n = np.array([13, 1, 7]), np.array([2, -1, 3])
        state = poisoned(caches.init_ssm(cfg, 3, ROOM - 1, np.float64))
        padded = np.where(np.arange(16)[:, None] < lengths[:, None, None], u[:, :16], 50.0)
        out, state = run['prompt'](padded, state, lengths - 1)
        state = run['replay'](state, lengths)
        for b, size in enumerate(lengths):
            close(out[b, :size], want[b, :size], 1e-12)
        same_state(state, states_at(cfg, run, u, lengths))

        rows, at = np.arange(3)[:, None], lengths[:, None] + np.arange(ROOM)
        out, new = run['block'](u[rows, at], poisoned(state), state.at)
        close(out, want[rows, at], 1e-12)
        same_state(new, state)  # a pass moves nothing
        behind = np.arange(ROOM) > n[:, None]
        rotten = jax.tree.map(lambda a: jnp.where(behind.reshape(3, ROOM, *[1] * (a.ndim - 2)), jnp.nan, a), new.log)
        state = run['replay'](new.replace(log=rotten), lengths + n + 1)
        same_state(state, states_at(cfg, run, u, lengths + n + 1))
        for _ in range(3):
            out, new = run['block'](u[rows, state.at[:, None]], poisoned(state), state.at)
            close(out, want[rows, state.at[:, None]], 1e-12)
            state = run['replay'](new, state.at + 1)


def test_tokens_behind_tokens_that_are_not_committed(model):
    """As a drafter steps: token by token ahead of the state, which moves once, at the end."""
    cfg, run = model
    with jax.enable_x64(True):
        u, n = tokens_of(9), np.array([3, 0, 1])
        want = run['whole'](u)
        start = states_at(cfg, run, u, np.array([5, 4, 2])).replace(
            log=poisoned(caches.init_ssm(cfg, 3, ROOM - 1, np.float64)).log)
        state, rows = start, np.arange(3)[:, None]
        for i in range(ROOM):
            at = start.at[:, None] + i
            out, state = run['block'](u[rows, at], state, start.at + i)
            close(out, want[rows, at], 1e-12)
        same_state(state, start)
        same_state(run['replay'](state, start.at + n + 1), states_at(cfg, run, u, start.at + n + 1))


def test_every_way_back_gives_one_state(model):
    """Running the kept tokens again, a snapshot a token, and the log replayed token by token: what the replay of all
    tokens at once gives; one token more or less is another state."""
    cfg, run = model
    with jax.enable_x64(True):
        u, n = tokens_of(9), np.array([2, 0, 3])
        start = states_at(cfg, run, u, np.array([5, 4, 3])).replace(
            log=caches.init_ssm(cfg, 3, ROOM - 1, np.float64).log)
        block = u[np.arange(3)[:, None], start.at[:, None] + np.arange(ROOM)]
        _, new = run['block'](block, start, start.at)
        got = run['replay'](new, start.at + n + 1)

        _, again = run['prompt'](np.pad(block, ((0, 0), (0, 1), (0, 0))), start, n)
        same_state(got, again)
        log, snapshot = new.log, [start.state]
        for j in range(ROOM):
            x, B = (mamba2.by_head(a[:, j], H) for a in (log.x, log.B))
            snapshot.append(np.exp(log.la[:, j])[..., None, None] * snapshot[-1]
                            + (log.dt[:, j, :, None] * x)[..., None] * B[:, :, None])
        at = np.stack(snapshot)
        close(got.state, at[n + 1, np.arange(3)], 1e-12)
        A, D = np.full(H, -1.0), np.zeros(H)  # the log has dt A already
        held = (np.arange(ROOM) <= n[:, None])[..., None]
        _, end = ssd(mamba2.by_head(log.x, H) * (log.dt / -log.la)[..., None], np.where(held, -log.la, 0), A, log.B,
                     np.zeros((3, ROOM, H, N)), D, start.state, form='sequential')
        close(got.state, end, 1e-12)
        for wrong in (n, np.minimum(n + 2, ROOM)):
            assert np.abs(at[wrong, np.arange(3)] - got.state).max() > 0.05


def test_documents_are_separate_and_rows_are_ragged(model):
    """Packed documents equal the documents alone, in state and convolution; what is behind a row's end is nowhere."""
    cfg, run = model
    with jax.enable_x64(True):
        u = tokens_of(20)
        segments = np.array([[0] * 7 + [1] * 13, [4] + [5] * 2 + [4] * 17, [1] * 20])
        got = run['whole'](u, segments)
        for b, cuts in enumerate(((0, 7, 20), (0, 1, 3, 20), (0, 20))):
            for first, end in zip(cuts, cuts[1:], strict=False):
                close(got[b, first:end], run['whole'](np.pad(u[b:b + 1, first:end], (
                    (0, 0), (0, 20 - end + first), (0, 0))))[0, :end - first], 1e-12)
        assert np.abs(run['whole'](u) - got)[:2].max() > 0.05
        held = np.arange(20) < np.array([[20], [9], [1]])
        ragged = run['whole'](np.where(held[..., None], u, 9.0), None, held)
        for b, size in enumerate((20, 9, 1)):
            close(ragged[b, :size], run['whole'](u)[b, :size], 1e-12)


def test_a_long_block_without_its_end_is_refused(model):
    cfg, _ = model
    state = caches.init_ssm(cfg, 3, ROOM - 1, np.float32)
    _, mixer = mixer_of(cfg.gated_norm, np.float32)
    with pytest.raises(ConfigError, match='5 tokens is longer than the log of 4'):
        mix(cfg, mixer, tokens_of(5), state)
    with pytest.raises(ConfigError, match='valid and segments are for whole sequences'):
        mix(cfg, mixer, tokens_of(2), state, segments=np.zeros((3, 2), int))


def test_a_row_that_keeps_nothing_of_its_prompt_is_empty_again(model):
    """A prompt longer than the log moves the state at once; commit takes the row back to position 0."""
    cfg, run = model
    with jax.enable_x64(True):
        empty = caches.init_ssm(cfg, 3, 0, np.float64)
        _, state = run['prompt'](tokens_of(16), empty, np.array([0, 4, 0]))
        state = run['replay'](state, np.array([0, 5, 1]))
        assert not state.state[0].any() and not state.tail[0].any() and state.at.tolist() == [0, 5, 1]
        assert state.state[1].any() and state.state[2].any()


@pytest.mark.parametrize('changes, message', [
    ({'num_groups': 4}, 'num_heads 6 is not a multiple of num_groups 4'), ({'conv_width': 1}, 'at least 2, got 1'),
    ({'state_size': 0}, 'ssm.state_size must be positive, got 0'), ({'norm_eps': 0.0}, 'ssm.norm_eps')])
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SsmConfig(**{'num_heads': H, 'num_groups': G, 'head_dim': P, 'state_size': N, **changes})
