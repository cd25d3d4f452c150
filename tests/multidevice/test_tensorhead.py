"""A CP head on a mesh of data x expert x model: the loss and gradients of one device, and U stays where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from backbone.mesh import make_mesh, shardings
from harness import hlo, hlo_costs
from tensorhead import head as heads
from tensorhead import losses, lse
from tensorhead.config import TensorHeadConfig
from tests.conftest import tiny_config

V, D, N, R, B, S = 96, 16, 3, 4, 4, 6
BASE = tiny_config(vocab=V, hidden=D, layers=1, heads=2, kv_heads=2)
U_BYTES = V * D * 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def setting(mode, tied, draft):
    cfg = TensorHeadConfig(D, V, N, R, mode, inner_rank=4, draft_vocab=draft)
    ids = 2 * np.arange(draft, dtype=np.int32) if draft else None
    base = {'embed': {'tokens': normal(0, V, D)}} | ({} if tied else {'lm_head': {'kernel': normal(1, D, V)}})
    like = jax.eval_shape(lambda: heads.init(cfg, jax.random.key(0), ids))
    head = {part: jax.tree.map(lambda a: 0.3 * normal(len(a.shape), *a.shape), like[part])
            for part in ('gate', 'factors')}
    params = {'base': base, 'tensorhead': head | ({'draft_ids': jnp.asarray(ids)} if draft else {})}
    rng = np.random.default_rng(2)
    batch = {'hidden': normal(3, B, S, D), 'targets': rng.integers(0, V, (B, S)),
             'segments': np.sort(rng.integers(1, 3, (B, S))), 'weights': np.ones((B, S), np.float32)}
    return cfg, params, batch


def loss(cfg, trained, params, batch, chunk, kl):
    """Everything at once; `trained` leaves of `params` get gradients, U only if it is one of them."""
    params = params | trained
    base, head, e = params['base'], params['tensorhead'], batch['hidden']
    future, valid, weight = losses.windows(batch['targets'], batch['segments'], batch['weights'], N)
    index, known = heads.index_of(head, future)
    valid = valid & known
    U, mixture = heads.unembedding(base, head), heads.factors(cfg, head, e)
    logp = losses.gold_logp(cfg, head, mixture, U, index, valid, chunk, 'base' not in trained)
    c = np.float32(0.8) ** np.arange(N)
    found = losses.discounted_nll(mixture.log_w, logp, weight, c) + losses.balance(mixture.log_w, weight, 'switch')
    if kl:
        teacher = jnp.stack([e] * N, axis=-2)
        found = found + losses.kl_full(cfg, head, mixture, U, teacher, logp, index, valid, weight, c, chunk)
    return found


# mode, draft vocabulary, tied, U trained, chunk, distilled
CASES = {'frozen': ('lowrank_shared', 0, False, False, 20, False),
         'trained': ('linear_shared', 0, True, True, 20, False),
         'full': ('full', 0, True, False, 0, False),
         'draft_words': ('lowrank_shared', 48, True, False, 20, False),
         'dense': ('medusa_shared', 0, True, True, 0, False),
         'distilled': ('lowrank_shared', 0, True, True, 20, True),
         'full_chunked': ('full', 0, True, False, 20, False),
         'full_distilled': ('full', 0, True, False, 20, True)}
QUICK = ('frozen', 'trained', 'full')


@pytest.mark.parametrize('case', [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in QUICK)])
def test_eight_devices_equal_one(case):
    mode, draft, tied, with_base, chunk, kl = CASES[case]
    cfg, params, batch = setting(mode, tied, draft)

    def step(params, batch):
        trained = {'tensorhead': {k: params['tensorhead'][k] for k in ('gate', 'factors')}}
        if with_base:
            trained['base'] = params['base']

        def of(trained):
            head = params['tensorhead'] | trained['tensorhead']
            return loss(cfg, trained | {'tensorhead': head}, params, batch, chunk, kl)

        return jax.value_and_grad(of)(trained)

    one = jax.jit(step)(params, batch)
    mesh = make_mesh(data=2, expert=2, model=2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings(BASE, params, mesh))
        program = jax.jit(step).lower(spread, jax.device_put(batch, NamedSharding(mesh, P('data')))).compile()
        many = program(spread, jax.device_put(batch, NamedSharding(mesh, P('data'))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-5), many, one)
    assert max(gathered(program), default=0) < U_BYTES
    cut = {spread['tensorhead']['gate']['kernel'].sharding.spec[1]} | {
        leaf.sharding.spec[1] for leaf in jax.tree.leaves(spread['tensorhead']['factors'])}
    assert cut == {'expert'}
    if mode == 'full':
        assert spread['tensorhead']['factors']['kernel'].sharding.spec[3] == 'model'


def gathered(program) -> list[float]:
    """Bytes of each array that the devices gather."""
    found = hlo_costs.collectives(hlo.parse(program.as_text()))
    assert found  # the devices do talk
    return [c.payload for c in found if c.kind == 'all-gather']


def test_one_walk_over_sharded_words_would_gather_them(monkeypatch):
    """The control: each shard walks its own words; a walk over the whole vocabulary has to bring U together."""
    mesh = make_mesh(data=2, expert=2, model=2)
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
    h, U = place(normal(0, B, S, N, R, D), 'data', None, None, 'expert'), place(normal(1, V, D), 'model')

    def compiled():
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(lambda h, U: lse.linear_lse(h, U, 20, True).sum())).lower(h, U).compile()

    assert max(gathered(compiled()), default=0) < U_BYTES
    monkeypatch.setattr(lse, 'ways', lambda axis, size: 1)
    assert max(gathered(compiled())) >= U_BYTES / 2
