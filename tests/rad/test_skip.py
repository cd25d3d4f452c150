"""The model without some sublayers drafts, and the whole one verifies it: any set gives plain decoding's text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.config import AttentionConfig
from backbone.errors import ConfigError
from backbone.layout import pack
from backbone.model import PlainTarget, cache_context, embed, finish, forward, sequence_context, unembed
from backbone.sampling import GREEDY
from harness import decode as loop
from harness.baselines import Autoregressive
from harness.decode import generate
from rad import skip as skipping
from rad.skip import ExitRule, SkipConfig, SkipDrafter, run_skipping
from tests.conftest import lively, tiny_config

pytestmark = pytest.mark.usefixtures('quick_compile')
CFG = tiny_config(vocab=41, layers=3, max_seq_len=64)
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 9, 30], list(range(3, 14))]
NEW, BLOCK = 17, 3
ALL = tuple(range(3))
SETS = {'none': SkipConfig(), 'first': SkipConfig((0,)), 'two': SkipConfig((1, 2)), 'attention': SkipConfig(ALL),
        'mixed': SkipConfig((1,), (0, 2)), 'everything': SkipConfig(ALL, ALL)}


@pytest.fixture(scope='module')
def base():
    return lively(CFG)


@pytest.fixture(scope='module')
def want(base):
    return generate(PlainTarget(CFG), Autoregressive(), {'base': base}, PROMPTS, max_new_tokens=NEW).tokens


def drafted(base, skip, rows=slice(None), rule=None):
    """By one compiled loop a batch size: what is skipped is an argument."""
    params = {'base': base, 'skip': skip.flags(CFG.num_layers)}
    return generate(PlainTarget(CFG), SkipDrafter(CFG, None, BLOCK, rule), params, PROMPTS[rows], max_new_tokens=NEW)


@pytest.mark.parametrize('name', SETS)
def test_any_set_gives_the_text_of_plain_decoding(base, want, name):
    got = drafted(base, SETS[name])
    assert got.tokens == want
    assert [drafted(base, SETS[name], slice(row, row + 1)).tokens[0] for row in (0, 3)] == [want[0], want[3]]
    if name != 'none':  # and some of it was refused on the way, or there would be nothing to see
        assert got.mean_accepted_tokens < BLOCK


def test_nothing_skipped_is_always_right(base, want):
    got = drafted(base, SETS['none'])
    assert got.rounds.tolist() == [-(-(NEW - 1) // (BLOCK + 1))] * len(PROMPTS)
    assert got.accepted_hist.tolist() == [0, 0, 0, 4 * len(PROMPTS)]
    assert got.mean_accepted_tokens == BLOCK + 1


def test_positions_that_start_at_zero_are_seen(base, monkeypatch):
    """Negative control: positions taken from a cache that is empty where attention is left out."""
    at_zero = lambda cfg, cache, size: cache_context(cfg, cache, size).replace(
        rope=cache_context(cfg, cache.replace(pos=0 * cache.pos), size).rope)
    monkeypatch.setattr(skipping, 'cache_context', at_zero)
    drafter = SkipDrafter(CFG, None, BLOCK, ExitRule(start=0.0))  # another name for the loop that is compiled above
    params = {'base': base, 'skip': SkipConfig().flags(3)}
    got = generate(PlainTarget(CFG), drafter, params, PROMPTS, max_new_tokens=NEW)
    assert got.mean_accepted_tokens < BLOCK + 0.5


def without(base, chosen):
    """The same by hand: a skipped sublayer adds nothing where its output matrix is zero."""
    cut = jax.tree.map(jnp.copy, base)
    for part, out in (('attention', ('attn', 'o')), ('mlp', ('mlp', 'down'))):
        kernel = cut['layers'][out[0]][out[1]]['kernel']
        cut['layers'][out[0]][out[1]]['kernel'] = kernel.at[jnp.array(getattr(chosen, part), int)].set(0)
    return cut


def test_traced_static_and_unstacked_agree(base):
    tokens = jnp.arange(1, 13).reshape(2, 6)
    ctx = sequence_context(CFG, tokens.shape)
    packed = pack(base, native=False)

    def logits(p, skip):
        x = embed(CFG, p, tokens, ctx.positions)
        return unembed(CFG, p, finish(CFG, p, run_skipping(CFG, p, x, None, ctx, skip)[0]))

    traced, static = jax.jit(logits), jax.jit(logits, static_argnums=1)
    whole = jax.jit(lambda p: forward(CFG, p, tokens))
    for chosen in (SETS['mixed'], SETS['attention']):
        expected = np.asarray(whole(without(base, chosen)))
        for got in (traced(base, chosen.flags(3)), traced(packed, chosen.flags(3)), static(packed, chosen)):
            np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(static(base, SETS['mixed']), whole(without(base, SETS['mixed'])), atol=1e-4)
    assert np.abs(expected - whole(base)).max() > 0.1


def test_what_is_static_is_not_there(base):
    """A draft step without attention has no product with its matrices, and leaves the cache as it was."""
    packed, target = {'base': pack(base, native=False)}, PlainTarget(CFG, stacked=False)
    cache = target.init_cache(1, 16, BLOCK)
    wide = CFG.attention.head_dim * (CFG.attention.num_heads + 2 * CFG.attention.num_kv_heads)

    def program(skip):
        drafter = SkipDrafter(CFG, skip, BLOCK)
        return str(jax.make_jaxpr(lambda p, c: drafter.draft(p, c, (), jax.random.key(0), GREEDY)[0])(packed, cache))

    matrix = f'f32[{CFG.hidden_size},{wide}]'
    products = lambda skip: program(skip).count('dot_general')
    assert matrix in program(SETS['none'])
    assert products(SETS['none']) - products(SETS['first']) == 2 * 4  # first step and loop: q/k/v, scores, heads, out
    assert products(SETS['attention']) - products(SETS['everything']) == 2 * 3 * 2  # gate/up and down of three layers


def test_the_exit_rule_follows_its_recurrence():
    rule, gamma, rate = ExitRule(start=0.5, aim=0.6), 0.5, 0.0
    state, update = rule.init(2), jax.jit(rule.update, static_argnums=2)
    for kept, proposed in ((0, 1), (3, 3), (3, 3), (2, 2), (1, 2), (2, 2)):
        state = update(state | {'drafted': jnp.array([proposed, 1])}, jnp.array([kept, -1]), BLOCK)
        rate = 0.5 * rate + 0.5 * kept / proposed
        goal = gamma + 0.01 if rate < 0.6 else gamma if proposed == BLOCK else gamma - 0.01
        gamma = 0.9 * gamma + 0.1 * goal
        np.testing.assert_allclose((state['gamma'][0], state['rate'][0]), (gamma, rate), rtol=1e-5)
        assert (float(state['gamma'][1]), float(state['rate'][1])) == (0.5, 0.0)  # a finished row


def test_doubt_ends_a_draft_behind_the_token_that_is_doubted(base, want):
    """Every draft is one to K long; the text stays; gamma 0 never ends one, gamma 1 always after the first."""
    rule = ExitRule(start=0.036)  # the words of this model are near one in 41, none stands out
    got = drafted(base, SETS['two'], rule=rule)
    assert got.tokens == want and got.drafted_hist[0] == 0 and (got.drafted_hist[1:] > 0).all()
    target, request = PlainTarget(CFG), loop.prepare(PlainTarget(CFG), PROMPTS, max_new_tokens=NEW)
    for gamma, length in ((0.0, BLOCK), (1.0, 1)):
        drafter = SkipDrafter(CFG, SETS['two'], BLOCK, ExitRule(start=gamma))
        state = loop.start(target, drafter, {'base': base}, request)
        draft, _, after = jax.jit(lambda s: drafter.draft({'base': base}, s.cache, s.drafter, s.rng, GREEDY))(state)
        assert draft.length.tolist() == after['drafted'].tolist() == [length] * 4


@pytest.mark.parametrize('make, message', [
    (lambda: SkipConfig.of(CFG, (3,)), 'skip.attention: there is no layer 3, the model has 3'),
    (lambda: SkipConfig.of(CFG, (), (1, 5)), 'skip.mlp: there is no layer 5'),
    (lambda: SkipConfig((2, 1)), 'skip.attention: layers from 0 on, sorted'),
    (lambda: SkipConfig((-1,)), 'skip.attention: layers from 0 on'),
    (lambda: SkipDrafter(CFG, SkipConfig((7,))), 'no layer 7'),
    (lambda: SkipDrafter(CFG, None, 0), 'block >= 1, got 0'),
    (lambda: skipping.build(CFG, gamma=1.5), 'exit.start must be in 0..1, got 1.5')])
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_by_config():
    made = skipping.build(CFG, [2, 0], block=2, gamma=0.5)
    assert made == SkipDrafter(CFG, SkipConfig((0, 2)), 2, ExitRule(0.5))
    assert skipping.build(CFG).rule is None
    assert SkipDrafter(CFG, None).init_params(None)['attention'].tolist() == [False] * 3


@pytest.mark.slow
@pytest.mark.parametrize('changes', ({'norm': 'layer', 'norm_placement': 'post'},
                                     {'attention': AttentionConfig(4, 2, 8, window=3)}), ids=('post', 'window'))
def test_other_shapes_of_a_layer(changes):
    cfg = CFG.replace(num_layers=2, **changes)
    params = {'base': lively(cfg), 'skip': SkipConfig().flags(2)}
    got = generate(PlainTarget(cfg), SkipDrafter(cfg, None, BLOCK), params, PROMPTS[:1], max_new_tokens=NEW)
    assert got.mean_accepted_tokens == BLOCK + 1
