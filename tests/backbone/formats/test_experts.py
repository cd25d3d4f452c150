"""Mixtures of experts: what the tests of every architecture (`tiny`) do not reach."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from backbone import formats
from backbone.config import MoeConfig
from backbone.errors import FormatError, TensorMismatch
from backbone.formats.tensors import leaf_shapes, unflatten

from .conftest import TINY, equal, logits
from .test_faults import edit, rewrite

NAMES = ('mixtral', 'olmoe')


@pytest.fixture(params=NAMES)
def directory(request, tmp_path):
    return shutil.copytree(TINY / request.param, tmp_path / request.param)


def fuse(tensors):
    """As transformers 5 has them in memory: all experts in one, gate before up. Undoes the released names."""
    for layer in range(2):
        start = f'model.layers.{layer}.'
        old = next(old for old in ('block_sparse_moe', 'mlp') if f'{start}{old}.gate.weight' in tensors)
        names = ('w1', 'w3', 'w2') if old != 'mlp' else ('gate_proj', 'up_proj', 'down_proj')
        router = tensors[f'{start}mlp.gate.weight'] = tensors.pop(f'{start}{old}.gate.weight')
        gate, up, down = (np.stack([tensors.pop(f'{start}{old}.experts.{e}.{name}.weight')
                                    for e in range(len(router))]) for name in names)
        tensors[f'{start}mlp.experts.gate_up_proj'] = np.concatenate([gate, up], axis=1)
        tensors[f'{start}mlp.experts.down_proj'] = down


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_transformers(name):
    """To 1e-5 of the largest; a rotation of the experts is far off."""
    loaded, golden = formats.load(TINY / name), np.load(TINY / name / 'golden.npz')
    tolerance = 1e-5 * np.abs(golden['logits']).max()
    assert np.abs(logits(loaded, golden['tokens']) - golden['logits']).max() <= tolerance
    mixture = loaded.params['layers']['moe']
    turned = {k: np.roll(a, 1, axis=1) for k, a in mixture['experts'].items()}
    wrong = loaded.params | {'layers': loaded.params['layers'] | {'moe': mixture | {'experts': turned}}}
    wrong = dataclasses.replace(loaded, params=wrong)
    assert np.abs(logits(wrong, golden['tokens']) - golden['logits']).max() > 1e3 * tolerance


def test_fused_experts_are_read_too(directory):
    loaded = formats.load(directory)
    rewrite(directory, fuse)
    equal(formats.load(directory), loaded)
    rewrite(directory, lambda tensors: tensors.update({k: a[:-1] for k, a in tensors.items() if 'down_proj' in k}))
    with pytest.raises(TensorMismatch, match=r'missing: .*left over: .*mlp.experts.down_proj'):
        formats.load(directory)


@pytest.mark.parametrize('changes,message', [
    ({'num_local_experts': 10**12, 'num_experts': 10**12}, f'2 layers of {10**12} experts, but only'),
    ({'num_local_experts': 3, 'num_experts': 3}, 'tensors .*left over: .*wrong shape'),
    ({'num_experts_per_tok': 9}, 'moe.experts_per_token 9 is not in 1..'),
    ({'num_experts_per_tok': None}, 'num_experts_per_tok is None, not a count'),
    ({'sliding_window': 'wide', 'clip_qkv': 8.0}, "sliding_window is 'wide'|clip_qkv = 8.0 is not supported"),
])
def test_what_does_not_fit_is_named(directory, changes, message):
    edit(directory / 'config.json', **changes)
    with pytest.raises(FormatError, match=message):
        formats.load(directory)


def test_a_missing_expert_is_named(directory):
    gone = []
    rewrite(directory, lambda tensors: gone.append(next(k for k in tensors if '.experts.1.' in k))
            or tensors.pop(gone[0]))
    with pytest.raises(TensorMismatch, match=f'1 missing: {gone[0]}'):
        formats.load(directory)


def test_a_plain_familys_mixture_has_headways_own_form_only(tmp_path):
    """An upcycled model keeps its family's name until somebody says it is a Mixtral."""
    cfg = formats.load(TINY / 'llama').config.replace(moe=MoeConfig(4, 2, shared_size=8))
    rng = np.random.default_rng(0)
    params = unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in leaf_shapes(cfg).items()})
    loaded = formats.Loaded(cfg, params, None, 'upcycled', formats.params_hash(params))
    formats.save(loaded, tmp_path / 'x', 'headway')
    equal(formats.load(tmp_path / 'x'), loaded)
    for kind in ('hf', 'gguf'):
        with pytest.raises(FormatError, match='no name for layers/moe/experts/down'):
            formats.save(loaded, tmp_path / kind, kind)
    mixtral = dataclasses.replace(loaded, config=cfg.replace(family='mixtral'))
    with pytest.raises(FormatError, match='no name for layers/moe/shared|cannot express'):
        formats.save(mixtral, tmp_path / 'shared', 'hf')
    assert json.loads((tmp_path / 'x' / 'headway.json').read_text())['config']['moe']['num_experts'] == 4
    assert [p.name for p in tmp_path.iterdir()] == ['x']
