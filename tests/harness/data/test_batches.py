"""A batch is a function of (seed, step)."""

import threading
import time

import numpy as np
import pytest

from backbone import tokenizer as tokenizer_lib
from backbone.errors import ConfigError, DataError
from harness import data
from harness.data.batches import _Steps


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """53 rows that all differ: no multiple of any batch size here."""
    folder = tmp_path_factory.mktemp('batches')
    (folder / 'books').mkdir()
    for i in range(9):
        text = ' '.join(str(i * 1000 + k) for k in range(40)).encode()
        (folder / 'books' / f'{i}.txt').write_bytes(text)
    part = {'dataset': 'gutenberg', 'manual_dir': str(folder / 'books'), 'data_dir': str(folder / 'data'),
            'seq_len': 24}
    return data.open_rows(part, 'train', tokenizer_lib.of_bytes())


def take_steps(rows, count, **options) -> list[dict]:
    with data.batches(rows, **{'batch_size': 8, 'seed': 3} | options) as stream:
        return [next(stream) for _ in range(count)]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_starting_at_a_step_is_running_to_it(rows):
    whole = take_steps(rows, 12)
    for start in (1, 5, 9):
        assert all(map(same, whole[start:], take_steps(rows, 12 - start, start_step=start)))
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_any_number_of_hosts_sees_the_same_global_batch(rows, hosts):
    whole = take_steps(rows, 4, start_step=5)
    share = 8 // hosts
    parts = [take_steps(rows, 4, start_step=5, take=slice(h * share, (h + 1) * share)) for h in range(hosts)]
    for step in range(4):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        assert same(whole[step], joined)


def test_an_epoch_is_every_row_once_and_in_its_own_order(rows):
    steps, n = _Steps(rows, 1, 3, slice(None)), len(rows)
    epochs = [[steps.numbers(epoch * n + i)[0] for i in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(n)) not in epochs
    # Batches run over the edge of an epoch: eight rows each, none left out.
    flat = sum((_Steps(rows, 8, 3, slice(None)).numbers(step) for step in range(n)), [])
    assert flat == sum(([steps.numbers(i)[0]] for i in range(8 * n)), [])


def test_another_seed_is_another_order(rows):
    order = {seed: tuple(_Steps(rows, len(rows), seed, slice(None)).numbers(0)) for seed in range(4)}
    assert len(set(order.values())) == 4
    # grain's own epochs count on from the seed: seed 1 must not be seed 0 one epoch later.
    assert _Steps(rows, len(rows), 0, slice(None)).numbers(1) != list(order[1])


def test_the_order_is_the_same_on_every_machine_and_version():
    """Fixed numbers: a library that shuffled otherwise would silently change every resumed run."""
    assert _Steps(range(1000), 8, 0, slice(None)).numbers(0) == [233, 815, 962, 246, 407, 428, 821, 490]
    assert _Steps(range(1000), 8, 7, slice(None)).numbers(1234) == [218, 918, 315, 681, 763, 925, 612, 972]
    assert _Steps(range(10 ** 7), 4, 7, slice(None)).numbers(10 ** 8) == [5382787, 4534554, 8023225, 6905612]


def test_errors_on_threads_reach_the_consumer(rows):
    class Broken:
        folder = 'somewhere'

        def __len__(self):
            return 100

        def batch(self, numbers):
            raise ZeroDivisionError('deep inside')

    with data.batches(Broken(), batch_size=4, seed=0) as stream, pytest.raises(
            DataError, match='batch 0 of somewhere cannot be made: .*deep inside'):
        next(stream)


def test_closing_does_not_wait(rows):
    class Slow:
        def __len__(self):
            return 100

        def batch(self, numbers):
            release.wait(20)
            return {}

    release = threading.Event()
    stream = data.batches(Slow(), batch_size=4, seed=0)
    puller = threading.Thread(target=lambda: next(stream), daemon=True)
    puller.start()
    time.sleep(0.1)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 5
    release.set()
    puller.join(10)
    with pytest.raises(ValueError, match='closed'):
        next(stream)


def test_what_cannot_be_a_batch(rows):
    with pytest.raises(DataError, match=f'has {len(rows)} rows, fewer than a batch of 500'):
        data.batches(rows, batch_size=500, seed=0)
    with pytest.raises(ConfigError, match='leaves nothing of a batch of 8'):
        data.batches(rows, batch_size=8, seed=0, take=slice(8, 16))
    for bad in ({'batch_size': 0}, {'start_step': -1}, {'seed': -1}):
        with pytest.raises(ConfigError, match='at least'):
            data.batches(rows, **{'batch_size': 8, 'seed': 0} | bad)


def test_evaluation_sees_every_row_once_and_pads_with_nothing(rows):
    whole = data.eval_batches(rows, batch_size=10, count=0)
    assert len(whole) == -(-len(rows) // 10)
    tokens = np.concatenate([batch['tokens'] for batch in whole])
    assert np.array_equal(tokens[:len(rows)], np.stack([rows[i]['tokens'] for i in range(len(rows))]))
    last = whole[-1]
    spare = len(whole) * 10 - len(rows)
    assert spare and not last['weights'][-spare:].any() and not last['segments'][-spare:].any()
    assert last['weights'][:-spare].any() and all(array.shape == (10, 24) for array in last.values())
    some = data.eval_batches(rows, batch_size=10, count=2)
    assert len(some) == 2 and same(some[1], data.eval_batches(rows, batch_size=10, count=2)[1])
    assert np.array_equal(some[0]['tokens'][1], rows[len(rows) // 20]['tokens'])  # spread over all of the split
    assert len(data.eval_batches(rows, batch_size=10, count=99)) == len(whole)
