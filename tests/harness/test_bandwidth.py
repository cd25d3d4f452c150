"""The floor: the C product is a product, it reads what it says, and without a compiler it says so."""

import ml_dtypes
import numpy as np
import pytest

from backbone.native import build
from harness import bandwidth

SMALL = {'float32': 1 << 20, 'bfloat16': 1 << 19}


@pytest.fixture(scope='module')
def meter():
    made = bandwidth.Meter(SMALL, threads=2, min_buffer_bytes=1 << 20)
    if made.source != 'c_gemv':
        pytest.skip(f'needs a C compiler: {made.note}')
    return made


@pytest.mark.parametrize(('dtype', 'kind'), [('float32', np.float32), ('bfloat16', ml_dtypes.bfloat16)])
@pytest.mark.parametrize('rows', [1, 7, 64])
def test_the_c_product_is_numpys(meter, dtype, kind, rows):
    rng = np.random.default_rng(rows)
    weights = rng.standard_normal((rows, 96)).astype(kind)
    x = rng.standard_normal(96).astype(np.float32)
    expected = weights.astype(np.float64) @ x.astype(np.float64)
    np.testing.assert_allclose(meter.product(dtype, rows, weights, x), expected, rtol=1e-5, atol=1e-5)


def test_a_shape_it_cannot_read_is_refused(meter):
    with pytest.raises(ValueError, match='multiples of 32'):
        meter.product('float32', 2, np.zeros((2, 33), np.float32), np.zeros(33, np.float32))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_pass_reads_at_least_the_weights(meter, dtype):
    done = meter.measure(dtype)
    assert done.bytes >= max(SMALL[dtype], 1 << 20)
    assert done.seconds > 0
    # Between a floppy disk and the fastest memory there is: a unit mistake falls outside.
    assert 1e7 < done.bytes_per_s < 1e13


def test_more_bytes_take_longer(meter):
    large = bandwidth.Meter({'float32': 128 << 20}, threads=2, min_buffer_bytes=1 << 20)
    assert min(large.measure('float32').seconds for _ in range(5)) > 5 * min(
        meter.measure('float32').seconds for _ in range(5))


def test_the_floor_is_the_weights_over_the_bandwidth(meter):
    assert meter.floor_ms('float32', 1e9) == pytest.approx(1e3 * (1 << 20) / 1e9)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_without_a_compiler_numpy_stands_in_and_says_so(monkeypatch, dtype):
    def none():
        raise build.NoCompiler('no C compiler (cc) on PATH')
    monkeypatch.setattr(bandwidth, 'native_gemv', none)
    meter = bandwidth.Meter(SMALL, min_buffer_bytes=1 << 20)
    assert meter.source == 'numpy_gemv'
    assert 'no C compiler' in meter.note
    assert meter.measure(dtype).bytes_per_s > 1e7


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match='int3'):
        bandwidth.Meter({'int3': 1})
