"""Every way to look for a set: what it asks for, what it finds, what it spends, and that it goes on after a kill."""

import itertools
import json

import numpy as np
import pytest

from backbone.errors import ConfigError, FingerprintMismatch, FormatError, RequestError
from rad import search, tpe
from rad.search import METHODS, Space
from rad.skip import SkipConfig
from rad.table import Table, run
from scripts import rad_search

SIZE = 8
HARM = np.array([0.9, 0.05, 0.4, 0.1, 0.02, 0.6, 0.2, 0.3])


def worth(skip, row=None):
    """Leaving a layer out harms by HARM, next to another one some more; each is worth 0.15 to be without."""
    on = skip.attention
    together = sum(0.03 for a, b in itertools.pairwise(on) if b == a + 1)
    return 0.15 * len(on) - HARM[list(on)].sum() - together


BEST = {k: max((worth(SkipConfig(c)), c) for c in itertools.combinations(range(SIZE), k)) for k in (1, 3, 4)}
FREE = max((worth(SkipConfig(c)), c) for n in range(SIZE + 1) for c in itertools.combinations(range(SIZE), n))


def finished(made):
    asked = []
    while (skip := made.suggest()) is not None:
        assert made.suggest() == skip  # asked again, it says the same
        asked.append(skip)
        made.observe(skip, worth(skip))
    return asked


def of(method, k, **options):
    return search.make(method, Space(SIZE, k), harm=HARM if method == 'output_kl' else None, **options)


@pytest.mark.parametrize('k', (1, 3, 4))
def test_the_top_k_rule(k):
    """Exactly k, of a shuffled vector the shuffled places, and of equals the lower ones."""
    rng = np.random.default_rng(k)
    z = rng.normal(size=SIZE)
    chosen = search.top_k(z, k)
    assert len(set(chosen)) == k and list(chosen) == sorted(chosen) and min(z[list(chosen)]) >= np.sort(z)[-k]
    order = rng.permutation(SIZE)
    assert {int(order[i]) for i in search.top_k(z[order], k)} == set(chosen)
    assert search.top_k(np.zeros(SIZE), k) == tuple(range(k))
    assert search.top_k([0.5, 0.7, 0.5, 0.5, 0.7], 3) == (0, 1, 4)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('k', (1, 4, None), ids=('one', 'four', 'free'))
def test_every_method_at_equal_and_at_free_k(method, k):
    made = of(method, k, trials=25, seed=1)
    asked = finished(made)
    skip, score = made.best
    fits = [s for s in asked if k is None or len(s.attention) == k]
    assert score == max(map(worth, fits)) == worth(skip) and (k is None or len(skip.attention) == k)
    assert made.evaluations == len(set(asked)) and not any(s.mlp for s in asked)
    if method in ('leave_one_out', 'greedy') and k is not None:
        assert score >= BEST[k][0] - 0.061  # all but what neighbours add
    if k == 1 and method in ('leave_one_out', 'greedy', 'output_kl'):
        assert skip == SkipConfig((4,))


def test_what_each_spends():
    spent = lambda method, k, **options: (lambda made: (finished(made), made.evaluations)[1])(of(method, k, **options))
    assert spent('leave_one_out', 3) == SIZE + 1 and spent('leave_one_out', None) == SIZE + (SIZE - 1)
    assert spent('greedy', 3) == 8 + 7 + 6 and spent('greedy', 3, width=2) == 8 + 2 + 2
    assert spent('evenly', 3) == spent('last', 3) == spent('output_kl', 3) == 1
    assert spent('evenly', None) == spent('last', None) == SIZE
    assert spent('random', 3, trials=5) <= 5
    assert spent('random', SIZE, trials=5) == 1  # the only set there is


def test_the_simple_selections():
    assert finished(of('evenly', 4))[0].attention == (0, 2, 4, 6)
    assert finished(of('evenly', 3))[0].attention == (0, 2, 5)
    assert search.evenly(28, 14) == tuple(range(0, 28, 2)) and len(set(search.evenly(30, 7))) == 7
    assert finished(of('last', 3))[0].attention == (5, 6, 7)
    assert finished(of('output_kl', 3))[0].attention == (1, 3, 4)
    assert finished(of('random', 3, trials=4, seed=2)) == finished(of('random', 3, trials=4, seed=2))
    made = of('greedy', None)
    finished(made)
    assert made.best[1] == pytest.approx(FREE[0]) and made.best[0].attention == FREE[1]


def test_mlps_are_numbers_behind_the_attentions():
    space = Space(3, 2, mlp=True)
    assert space.skip((0, 4)) == SkipConfig((0,), (1,)) and space.chosen(SkipConfig((0,), (1,))) == (0, 4)
    made = search.make('greedy', space)
    while (skip := made.suggest()) is not None:
        made.observe(skip, -len(skip.attention))
    assert made.best == (SkipConfig((), (0, 1)), 0.0)


@pytest.mark.parametrize('k', (3, None), ids=('three', 'free'))
def test_tpe_in_two_parts_is_tpe_in_one(tmp_path, k):
    """Killed between two trials, and killed while a set was evaluated: the same sets in the same order."""
    first = [SkipConfig((1, 3, 4)), SkipConfig((0, 2, 4))]
    new = lambda name, trials=22: search.make('tpe', Space(SIZE, k), trials=trials, seed=3, first=first,
                                              storage=tmp_path / name if name else None)
    whole = finished(new(None))
    assert whole[:2] == first and len(whole) == 22 and len(set(whole[2:])) > 5
    parts = finished(new('between', 13))
    assert parts + finished(new('between')) == whole
    cut, parts = new('within'), []
    for _ in range(13):
        parts.append(cut.suggest())
        cut.observe(parts[-1], worth(parts[-1]))
    assert cut.suggest() == whole[13]  # asked for, never observed
    again = new('within')
    assert again.evaluations == len(set(whole[:13])) and parts + finished(again) == whole
    assert again.best == (max(whole, key=worth), max(map(worth, whole)))
    with pytest.raises(FingerprintMismatch, match='searched with other seed .3, not 4'):
        search.make('tpe', Space(SIZE, k), seed=4, first=first, storage=tmp_path / 'within')


def test_a_table_is_continued(tmp_path):
    path, header, evaluated = tmp_path / 'table.jsonl', {'model': 'abc', 'block': 4}, []

    def evaluate(skip):
        evaluated.append(skip)
        if len(evaluated) == 12:
            raise KeyboardInterrupt
        return {'tau': worth(skip)}

    go = lambda: run(of('greedy', 3), evaluate, lambda skip, row: row['tau'], Table(path, header))
    with pytest.raises(KeyboardInterrupt):
        go()
    with open(path, 'a') as file:
        file.write('{"set": {"atten')  # a line that the kill cut short
    made = go()
    assert made.best == of_itself() and len(evaluated) == 8 + 7 + 6 + 1 and len(set(evaluated)) == 21
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(lines) == 1 + 21 and lines[0] == {'format': 1, **header}
    for other, said in (({'model': 'xyz', 'block': 4}, "other model .'abc', not 'xyz'"),
                        ({'model': 'abc', 'block': 5}, 'other block .4, not 5')):
        with pytest.raises(FingerprintMismatch, match=said):
            Table(path, other)
    path.write_text('[1]\n')
    with pytest.raises(FormatError, match='no table of evaluated sets'):
        Table(path, header)
    path.write_text(json.dumps({'format': 1, **header}) + '\n{"no": "set"}\n')
    with pytest.raises(FormatError, match='no table of evaluated sets'):
        Table(path, header)


def of_itself():
    made = of('greedy', 3)
    finished(made)
    return made.best


@pytest.mark.parametrize('make, message', [
    (lambda: Space(4, 0), r'k: 0 is not in 1..4'), (lambda: Space(4, 5), r'k: 5 is not in 1..4'),
    (lambda: Space(4, 9, mlp=True), r'k: 9 is not in 1..8'),
    (lambda: Space(4).skip((4,)), r'sublayer 4 is not in 0..3'),
    (lambda: of('simulated_annealing', 2), "unknown method 'simulated_annealing', one of leave_one_out"),
    (lambda: search.make('output_kl', Space(4, 2)), 'needs 4 values of harm'),
    (lambda: of('random', 2, trials=0), 'trials must be at least 1, got 0'),
    (lambda: of('greedy', 2, width=-1), 'width must not be negative, got -1'),
    (lambda: of('last', 2).observe(SkipConfig((0,)), 1.0), 'was suggested')])
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_without_optuna(monkeypatch):
    monkeypatch.setattr(tpe, 'optuna', None)
    with pytest.raises(ConfigError, match=r'needs optuna: pip install headway\[search\]'):
        of('tpe', 2)


def test_the_script_goes_on_where_it_stopped(tmp_path, capsys):
    """Model, prompts, every method, files; a second call evaluates nothing; other settings are refused."""
    args = lambda *more: rad_search.parse(['--tiny', f'--out={tmp_path}', '--k=2', *more])
    chosen = rad_search.main(args())
    rows = {row['method']: row for row in json.loads((tmp_path / 'searches.json').read_text())['searches']}
    assert set(rows) == set(METHODS) and chosen['2']['score'] == max(row['score'] for row in rows.values())
    assert all(len(row['set']['attention']) == 2 for row in rows.values()) and rows['leave_one_out']['evaluations'] == 5
    table = (tmp_path / 'table.jsonl').read_text().splitlines()
    again = rad_search.main(args())
    assert again == chosen == json.loads((tmp_path / 'chosen.json').read_text())
    assert (tmp_path / 'table.jsonl').read_text().splitlines() == table
    (tmp_path / 'table.jsonl').write_text('\n'.join(table[:4]) + '\n')
    assert rad_search.main(args()) == chosen
    with pytest.raises(FingerprintMismatch, match='other seed .0, not 1'):
        rad_search.main(args('--seed=1'))
    with pytest.raises(RequestError, match='is not there'):
        rad_search.main(args(f'--costs={tmp_path}/none.json'))
    with pytest.raises(SystemExit):
        args('--methods=magic')
    assert "unknown 'magic'" in capsys.readouterr().err
