"""Which implementation a call gets, and the table that decides it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, choice, tune
from pallas_kernels.errors import KernelError

OP = api.OPS['stacked_gemv']
X, W = jnp.ones((2, 3, 128), jnp.bfloat16), jnp.ones((2, 2, 128, 256), jnp.bfloat16)


def measured(monkeypatch, tmp_path, kernel_s, **changes):
    row = {'op': OP.name, 'spec': 'x', 'sizes': OP.sizes(X, W), 'dtype': 'bfloat16', 'xla_s': 2.0, 'kernel_s': kernel_s}
    (tmp_path / 'my_chip.json').write_text(json.dumps({'rows': [row | changes], 'interpreted': False}))
    monkeypatch.setattr(choice, 'MEASURED', tmp_path)
    choice.table.cache_clear()
    return lambda x, w, **options: choice.choose(OP, (x, w, 0), platform='cuda', device_kind='My chip', **options)


@pytest.fixture(autouse=True)
def forget():
    yield
    choice.table.cache_clear()


def test_xla_unless_a_measurement_says_otherwise(monkeypatch, tmp_path):
    faster = measured(monkeypatch, tmp_path, 1.0)
    assert faster(X, W).platform == 'gpu'
    assert faster(X, W, implementation='xla') is None
    assert faster(X[:, :2], W).platform == 'gpu', 'near enough'
    assert faster(X[:, :1], W) is None, 'three times fewer rows: nobody measured that'
    assert faster(X.astype(jnp.float32), W.astype(jnp.float32)) is None, 'not a type the kernel takes'
    assert choice.choose(OP, (X, W, 0), platform='cuda', device_kind='another') is None
    assert choice.choose(OP, (X, W, 0), platform='cpu') is None
    assert measured(monkeypatch, tmp_path, 3.0)(X, W) is None, 'a kernel that does not win'
    assert measured(monkeypatch, tmp_path, 1.0, error='refused')(X, W) is None


def test_a_name_means_that_one_or_an_error(monkeypatch, tmp_path):
    slower = measured(monkeypatch, tmp_path, 3.0)
    assert slower(X, W, implementation='gpu').platform == 'gpu'
    with pytest.raises(KernelError, match="no implementation 'triton', only xla, tpu, gpu"):
        slower(X, W, implementation='triton')
    with pytest.raises(KernelError, match='stacked_gemv by its gpu kernel: .*bfloat16'):
        slower(X.astype(jnp.float32), W, implementation='gpu')


def test_the_call_is_the_reference_on_a_host_without_kernels():
    np.testing.assert_array_equal(api.stacked_gemv(X, W, 1), OP.ref(X, W, 1))
    assert jax.default_backend() == 'cpu'


def test_a_table_is_measured_and_read(tmp_path, capsys):
    """The tiny form on this host: every op once, interpreted, and such a table chooses nothing."""
    path = tune.main(['--tiny', f'--out={tmp_path}', '--ops=stacked_gemv'])
    found = json.loads(path.read_text())
    assert found['interpreted'] and [row['op'] for row in found['rows']] == ['stacked_gemv'] * len(OP.kernels)
    assert all('error' not in row and row['difference'] < 1e-2 and row['kernel_s'] > 0 for row in found['rows'])
    assert 'stacked_gemv' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='kernels for TPUs and GPUs'):
        tune.main([])
