"""The fast stream beside the slow one: what it equals when it adds nothing, what it may read, and what it must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.errors import ConfigError
from backbone.layers import attend, mlp, norm, out, qkv
from backbone.layout import pack
from backbone.model import PlainTarget, cache_context, embed, run_layers, sequence_context
from m2r2 import exits, streams
from m2r2.config import M2R2Config, even_exits

TOKENS = jnp.array([[4, 8, 15, 16, 23, 42, 4], [1, 1, 2, 3, 5, 8, 13]])
SHAPE = {'exits': (1, 3), 'rank': 4, 'qo_rank': 2}


def lively_params(m, cfg, seed=1):
    """Random accelerators whose last matrices are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a if a.dtype == jnp.int32 else 0.1 * rng.normal(size=a.shape).astype(np.float32),
                        streams.init_params(m, cfg, jax.random.key(0)))


def whole(cfg, m, base, mine, tokens, together=True):
    """Both intervals on whole sequences -> (slow, fast, path) of each."""
    ctx = sequence_context(cfg, tokens.shape)
    slow, found = embed(cfg, base, tokens, ctx.positions), []
    for j in range(len(m.exits)):
        end = streams.run_interval(cfg, m, base, mine, j, slow, None, ctx, together=together, path=True)
        slow = end.slow
        found.append(end)
    return found


@pytest.fixture(scope='module')
def m(cfg):
    return M2R2Config.of(cfg, SHAPE)


@pytest.fixture(scope='module')
def mine(m, cfg):
    return lively_params(m, cfg)


@pytest.fixture(scope='module')
def plain(cfg, params):
    """The base's residual stream after each layer, [L + 1, B, S, d]."""
    ctx = sequence_context(cfg, TOKENS.shape)
    taps = tuple(f'hidden:{l}' for l in range(cfg.num_layers + 1))
    x = embed(cfg, params['base'], TOKENS, ctx.positions)
    _, _, seen = run_layers(cfg, params['base'], x, None, ctx, taps=taps)
    return jnp.stack([seen[tap] for tap in taps])


@pytest.mark.parametrize('together', (False, True), ids=('in turn', 'together'))
def test_the_slow_stream_is_the_base(cfg, params, m, mine, plain, together):
    for end, layer in zip(whole(cfg, m, params['base'], mine, TOKENS, together), m.exits, strict=True):
        np.testing.assert_allclose(end.slow, plain[layer], atol=1e-5)
        assert float(jnp.abs(end.fast - end.slow).max()) > 0.1


def test_logits_and_cache_are_the_bases_bit_for_bit(cfg, params, m, mine):
    """Under the same compiled layer functions: what the fast stream's presence may change is nothing."""
    base, target = params['base'], PlainTarget(cfg)

    @functools.partial(jax.jit, static_argnums=0)
    def run(beside, mine):
        cache = target.init_cache(2, 16, 0)
        ctx = cache_context(cfg, cache, TOKENS.shape[1])
        x, state = embed(cfg, base, TOKENS, ctx.positions), cache.layers
        for j in range(2):
            end = streams.run_interval(cfg, m, base, mine, j, x, state, ctx, together=False)
            x, state = end.slow, end.state
        return x, state, end.fast if beside else None

    one, other = run(True, mine), run(True, jax.tree.map(jnp.zeros_like, mine))
    for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(other[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(run(False, mine)[:2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert float(jnp.abs(one[2] - other[2]).max()) > 0.1, 'the comparison would see a difference'


def test_without_changes_the_fast_stream_is_the_slow_one(cfg, params, m, plain):
    """Wrong norms, positions, or a layer of the cache that is not this layer's would all show."""
    zero = jax.tree.map(jnp.zeros_like, streams.init_params(m, cfg, jax.random.key(0)))
    for end, lo, hi in zip(whole(cfg, m, params['base'], zero, TOKENS), m.starts, m.exits, strict=True):
        np.testing.assert_allclose(end.path, jnp.moveaxis(plain[lo:hi + 1], 0, 2), atol=1e-5)


def test_without_the_mlp_it_is_the_base_with_its_mlp_removed(cfg, params, m, plain):
    """Written out from the layer's parts: queries of p, keys and values of h."""
    bare = dataclasses.replace(m, ffn=False)
    zero = jax.tree.map(jnp.zeros_like, streams.init_params(bare, cfg, jax.random.key(0)))
    ctx = sequence_context(cfg, TOKENS.shape)
    for end, lo, hi in zip(whole(cfg, bare, params['base'], zero, TOKENS), m.starts, m.exits, strict=True):
        p = plain[lo]
        for l in range(lo, hi):
            layer = jax.tree.map(lambda a, l=l: a[l], params['base']['layers'])
            q = qkv(cfg, layer['attn'], norm(cfg, layer['attn_norm'], p), ctx)[0]
            _, k, v = qkv(cfg, layer['attn'], norm(cfg, layer['attn_norm'], plain[l]), ctx)
            p = p + out(cfg, layer['attn'], attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), ctx))
        np.testing.assert_allclose(end.fast, p, atol=1e-5)
        with_mlp = p + mlp(cfg, layer['mlp'], norm(cfg, layer['mlp_norm'], p))
        assert float(jnp.abs(end.fast - with_mlp).max()) > 1e-2


@pytest.mark.parametrize('packed', (False, True), ids=('stacked', 'packed'))
def test_token_by_token_equals_whole_sequences(cfg, params, m, mine, packed):
    base = pack(params['base']) if packed else params['base']
    accelerators = exits.pack(m, mine, base) if packed else mine
    want = whole(cfg, m, params['base'], mine, TOKENS)
    target = PlainTarget(cfg, stacked=not packed)

    @jax.jit
    def step(cache, token):
        ctx = cache_context(cfg, cache, 1)
        slow, state, found = embed(cfg, base, token[:, None], ctx.positions), cache.layers, []
        for j in range(2):
            end = streams.run_interval(cfg, m, base, accelerators, j, slow, state, ctx)
            slow, state = end.slow, end.state
            found.append(end.fast[:, 0])
        return cache.replace(layers=state, pos=cache.pos + 1), found

    cache = target.init_cache(2, 8, 0)
    for t in range(TOKENS.shape[1]):
        cache, got = step(cache, TOKENS[:, t])
        for one, end in zip(got, want, strict=True):
            scale = jnp.abs(end.fast).max()
            np.testing.assert_allclose(one / scale, end.fast[:, t] / scale, atol=5e-6)


def test_it_reads_no_later_token(cfg, params, m, mine):
    """By gradient: of the fast stream at one position to the embeddings of all."""
    base, at = params['base'], 3
    ctx = sequence_context(cfg, (1, 7))

    @jax.jit
    @jax.grad
    def gradient(x):
        return streams.run_interval(cfg, m, base, mine, 0, x, None, ctx).fast[0, at].sum()

    seen = jnp.abs(gradient(embed(cfg, base, TOKENS[:1], ctx.positions)))[0].max(-1)
    assert (seen[:at + 1] > 1e-4).all() and (seen[at + 1:] == 0).all()


def test_only_the_interval_it_belongs_to_moves_an_exit(cfg, params, m, mine):
    """Every interval starts from the slow stream again."""
    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, argnums=0)
    def gradient(mine, j):
        return (whole(cfg, m, params['base'], mine, TOKENS, together=False)[j].fast ** 2).sum()

    for j, (inside, outside) in enumerate(((slice(0, 1), slice(1, 3)), (slice(1, 3), slice(0, 1)))):
        moved = gradient(mine, j)['layers']
        for leaf in jax.tree.leaves(moved):
            assert (jnp.abs(leaf[inside]).max((1, 2)) > 0).all() and (leaf[outside] == 0).all()


def test_rates():
    """Even exits: J + 1 slow layers a fast one in the first interval, down to 2 in the last."""
    assert even_exits(28, 3) == (7, 14, 21)
    m = M2R2Config(8, 28, 16, (7, 14, 21))
    assert [m.rate(j) for j in range(3)] == [4, 3, 2]
    assert [m.level(j, 7) for j in range(3)] == [28, 28, 28]
    assert [m.level(0, i) for i in range(3)] == [0, 4, 8]
    assert M2R2Config(8, 30, 16, (3,)).level(0, 3) == 30 and M2R2Config(8, 30, 16, (7, 11)).level(1, 4) == 30


@pytest.mark.parametrize('kind', ('exit', 'none'))
def test_the_controls(cfg, params, plain, kind):
    """stream exit: a change of h alone, of as many parameters; none: h itself."""
    m = M2R2Config.of(cfg, {'exits': (2,), 'rank': 4, 'stream': kind})
    mine = lively_params(m, cfg)
    end = whole(cfg, m, params['base'], mine, TOKENS)[0]
    np.testing.assert_allclose(end.slow, plain[2], atol=1e-5)
    fast = streams.init_params(dataclasses.replace(m, stream='fast'), cfg, jax.random.key(0))
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    assert count(mine) == (count(fast) if kind == 'exit' else 0)
    assert (float(jnp.abs(end.fast - end.slow).max()) > 0.1) == (kind == 'exit')


@pytest.mark.parametrize('fields, said', [
    ({'exits': (3, 3)}, 'exits'), ({'exits': (4,)}, 'exits'), ({'exits': ()}, 'exits'), ({'rank': 0}, 'rank'),
    ({'stream': 'faster'}, 'stream'), ({'activation': 'relu'}, 'activation'), ({'draft_vocab': 97}, 'draft_vocab'),
    ({'carry': 4, 'exits': (1, 2)}, 'carry'), ({'colour': 1}, 'colour'), ({'num_layers': 5}, 'another shape')])
def test_wrong_fields_are_named(cfg, fields, said):
    with pytest.raises(ConfigError, match=said):
        M2R2Config.of(cfg, fields)
