"""Other stacks: the protocol with a worker process, and the ratios. The stacks themselves need `make peers`."""

import itertools
import sys

import pytest

from harness import peers

ECHO = '''
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "load":
        answer = {"version": "echo 1"} if asked["dtype"] != "int1" else {"error": "no such type"}
    elif asked["do"] == "die":
        sys.exit(3)
    else:
        answer = {"tokens": asked["prompt"][:1] * asked["max_new_tokens"], "prefill_s": 0.5, "decode_s": 2.0}
    print(json.dumps(answer), flush=True)
'''


@pytest.fixture
def worker():
    made = peers.Worker([sys.executable, '-c', ECHO])
    yield made
    made.close()


def test_a_worker_loads_and_decodes(worker, tmp_path):
    engine = peers.peer(worker, 'echo', 'float32', tmp_path, 2, 4)
    assert engine.version == 'echo 1'
    assert engine.decode([7, 8]) == ([7, 7, 7, 7], 0.5, 2.0)


def test_what_a_stack_says_is_the_error(worker, tmp_path):
    with pytest.raises(peers.PeerError, match='no such type'):
        peers.peer(worker, 'echo', 'int1', tmp_path, 2, 4)


def test_a_worker_that_ends_is_an_error(worker):
    with pytest.raises(peers.PeerError, match='ended with code 3'):
        worker.ask(do='die')


def test_an_environment_that_is_not_there_says_how_to_make_it():
    with pytest.raises(peers.PeerError, match='make peers'):
        peers.Worker(['/nowhere/bin/python'])


def test_the_real_worker_reports_a_missing_stack():
    worker = peers.Worker([sys.executable, '-S', str(peers._WORKER)])  # -S: no installed package is seen
    try:
        for engine in ('transformers', 'llama.cpp'):
            with pytest.raises(peers.PeerError, match='ModuleNotFoundError'):
                worker.ask(do='load', engine=engine, path='x', dtype='float32', threads=1)
        with pytest.raises(peers.PeerError, match='unknown request'):
            worker.ask(do='dance')
    finally:
        worker.close()


def engine(name, dtype, tokens, seconds, order):
    ticking = itertools.cycle(seconds)

    def decode(prompt):
        order.append((name, dtype))
        return tokens, 0.1, next(ticking)
    return peers.Engine(name, dtype, '', decode)


def test_stacks_take_turns_and_ratios_are_within_a_repeat():
    order = []
    # The machine doubles its speed after the warm-up's first repeat; ratios must not see it.
    ours = engine('headway', 'float32', [1, 2, 3, 4, 5], [9, 8, 4, 4], order)
    half = engine('headway', 'bfloat16', [1, 2, 3, 4, 5], [9, 4, 2, 2], order)
    other = engine('other', 'bfloat16', [1, 2, 9, 4, 5], [9, 16, 8, 8], order)
    floors = itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    peers.interleave([ours, half, other], [[1]], 3, lambda: next(floors), lambda text: None, settle_s=0)
    assert [name for name, _ in order] == ['headway', 'headway', 'other', 'headway', 'headway', 'other',
                                           'headway', 'other', 'headway', 'other', 'headway', 'headway']
    rows = peers.rows([ours, half, other])
    assert [r['ratio'] for r in rows] == [1, 0.5, 2]
    assert [r['ratio_same_dtype'] for r in rows] == [1, 1, 4]
    assert [r['agreement'] for r in rows] == [1, 1, 2 / 5]
    assert rows[0]['tokens_per_s'] == 1  # 4 tokens after the first, in 4 s
    assert rows[0]['over_floor'] == 2
    text = peers.table(rows, ['left out: x'])
    assert 'other' in text and text.endswith('left out: x')
