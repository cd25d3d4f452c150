"""What a staggered model refuses, by name, and what it shows of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backbone.contract import Resume
from backbone.errors import CheckpointMismatch, ConfigError, RequestError
from backbone.model import unembed
from harness.baselines import Autoregressive
from harness.checkpoint import Checkpoints
from harness.decode import generate
from stagformer import layout, model
from stagformer import target as targets
from stagformer.config import StagFormerConfig
from stagformer.target import StagFormerTarget
from tests.stagformer.reference import staggered
from tests.stagformer.test_model import BASE, make, params_of


@pytest.mark.parametrize('fields, said', (
    (dict(depths=(2, 1)), r'depths \(2, 1\) are 3 layers, the base has 4'),
    (dict(depths=(4, 0)), r'depths: every stack needs a layer, got \(4, 0\)'),
    (dict(depths=()), r'depths: every stack needs a layer, got \(\)'),
    (dict(depths=(2, 2), shared=True), r'shared: every stack is the whole base of 4 layers, got depths \(2, 2\)'),
    (dict(depths=(2, 2), window=0), 'window must be at least 1 or None, got 0'),
    (dict(depths=(2, 2), window=-3), 'window must be at least 1 or None, got -3'),
    (dict(depths=(2, 2), lag=2), r'lag must be 1 \(staggered\) or 0 .*, got 2'),
    (dict(depths=(2, 2), context_from='next'), "context_from: unknown 'next', one of prev, all_prev"),
    (dict(depths=(2, 2), cross_kv_heads=3), 'cross_kv_heads 3 do not divide 4 heads'),
    (dict(depths=(2, 2), base=BASE.replace(norm_placement='post')), 'norm_placement pre'),
))
def test_a_model_that_cannot_be(fields, said):
    with pytest.raises(ConfigError, match=said):
        StagFormerConfig(**{'base': BASE} | fields)


def test_layers_that_do_not_divide():
    for stacks, said in ((3, '4 layers are not 3 stacks of equal depth'), (0, 'stacks must be at least 1, got 0')):
        with pytest.raises(ConfigError, match=said):
            StagFormerConfig.even(BASE, stacks)
    assert StagFormerConfig.even(BASE, 3, shared=True).depths == (4, 4, 4)
    assert StagFormerConfig.even(BASE, 4, window=2) == StagFormerConfig(BASE, (1, 1, 1, 1), window=2)


def test_a_config_as_a_dict():
    cfg = make((1, 2, 1), window=3, context_from='all_prev', mix=True)
    fields = cfg.to_dict()
    assert StagFormerConfig.from_dict(fields | {'depths': list(cfg.depths)}) == cfg
    with pytest.raises(ConfigError, match='unknown config key: widnow'):
        StagFormerConfig.from_dict(fields | {'widnow': 3})


@pytest.mark.parametrize('cfg, options, said', (
    (make((2, 2)), dict(recurrent=True), 'needs shared weights and at least two stacks'),
    (make((2,), shared=True), dict(recurrent=True), 'needs shared weights and at least two stacks'),
    (make((2, 2), shared=True, mix=True), dict(recurrent=True), 'nothing to mix'),
    (make((2, 2), shared=True, lag=0), dict(recurrent=True), 'and lag 1'),
    (make((1, 3)), dict(form='arrays'), 'form arrays needs several stacks of equal depth'),
    (make((1, 1, 2), context_from='all_prev'), dict(form='arrays'), 'that read one stack each'),
    (make((2, 2)), dict(form='list'), "form: unknown 'list', one of storage, tuple, arrays"),
    (make((2, 2), lag=0), dict(form='staged'), 'lag must be 1, got 0'),
), ids=str)
def test_a_target_that_cannot_be(cfg, options, said):
    with pytest.raises(ConfigError, match=said):
        StagFormerTarget(cfg, **options)


def test_requests_it_cannot_serve():
    target = StagFormerTarget(make())
    with pytest.raises(ConfigError, match='a cache of 17 slots is longer than the context of 16'):
        target.init_cache(1, 17, 0)
    with pytest.raises(RequestError, match='10 tokens . 7 new ones exceed the context of 16'):
        generate(target, Autoregressive(), {}, [[1] * 10], max_new_tokens=7)
    cache, tokens = target.init_cache(1, 16, 0), jnp.ones((1, 1), jnp.int32)
    for options, said in ((dict(taps=('hidden:last', 'hidden:1')), "unknown tap 'hidden:1'.*hidden:last"),
                          (dict(masks={}), 'no masks'), (dict(resume=Resume(None, 1)), 'takes no resume')):
        with pytest.raises(ConfigError, match=said):
            target.forward({'base': {}}, tokens, cache, **options)


@pytest.mark.parametrize('other, said', (
    # As many layers, cut otherwise: the cross-attention has other sizes.
    (make((1, 1, 1, 1)), r'stagformer/context_norm/scale is \[1, 16\], the model has \[3, 16\]'),
    (make((4,)), r'left over: .*stagformer/context_norm/scale'),
    (make((2, 2), mix=True), '1 missing: params/stagformer/mix')))
def test_a_checkpoint_of_another_cut(tmp_path, other, said):
    abstract = lambda cfg: jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    checkpoints = Checkpoints(tmp_path / 'run')
    checkpoints.save(1, {'params': params_of(make(), np.float32)}, {})
    checkpoints.wait()
    assert checkpoints.restore_latest_valid({'params': abstract(make())})[0] == 1
    with pytest.raises(CheckpointMismatch, match=said):
        checkpoints.restore_latest_valid({'params': abstract(other)})
    checkpoints.close()


def test_taps_and_one_position():
    """The tap is the hidden state the head reads, of the whole block; logits_at asks for one position's logits."""
    cfg, at = make((1, 1), mix=True), jnp.array([1, 3])
    target, tokens = StagFormerTarget(cfg), jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])

    @jax.jit
    def run(params):
        output = target.forward(params, tokens, target.init_cache(2, 16, 0), taps=('hidden:last',), logits_at=at)
        return output, unembed(cfg.base, params['base'], output.taps['hidden:last'])

    params = params_of(cfg, np.float32)
    output, whole = run(params)
    assert output.logits.shape == (2, 1, 23) and output.cache.pos.tolist() == [0, 0]
    np.testing.assert_allclose(whole[0], staggered(cfg, params, [1, 2, 3, 4])[0], atol=1e-5)
    np.testing.assert_allclose(output.logits[:, 0], whole[jnp.arange(2), at], atol=1e-5)


def test_by_name():
    """What a checkpoint's config or an artefact's card says: a target and packed parameters that fit each other."""
    cfg = make((1, 1), base=BASE, window=2)
    target = targets.build(cfg.to_dict(), 'bfloat16', packed=True)
    assert target == StagFormerTarget(cfg, 'bfloat16', layout.form_here(cfg)) and hash(target)
    assert targets.build(cfg.to_dict(), packed=False).form == 'storage'
    packed = layout.build(cfg.to_dict(), params_of(cfg, np.float32), 'bfloat16')
    step = lambda p, cache: target.forward(p, jnp.ones((1, 1), jnp.int32), cache).logits
    assert jax.eval_shape(step, packed, target.init_cache(1, 8, 0)).shape == (1, 1, 23)
    kernels = [a for a in jax.tree.leaves(packed['stagformer']) if a.ndim > 1]
    assert kernels and {a.dtype for a in kernels if a.size > 16} == {jnp.bfloat16.dtype}
