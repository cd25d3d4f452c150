"""Artefacts: what is saved comes back, and only for the base it was trained on."""

import json

import ml_dtypes
import numpy as np
import pytest

from backbone.errors import FormatError
from harness import models, zoo

CARD = {'base': 'smollm2-135m', 'base_hash': 'a' * 64, 'config': {'layer': 8}, 'data': 'self-generated, 2 MB',
        'steps': 300, 'seed': 0, 'command': 'headway-train --config=configs/x.py', 'metrics': {'loss': 2.25}}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {'head': {'kernel': rng.normal(size=(8, 4)).astype(np.float32)},
            'norm': {'scale': np.ones(8, ml_dtypes.bfloat16)}, 'kept': np.arange(5, dtype=np.int32)}


def test_round_trip(tmp_path, params):
    zoo.save('x', params, CARD, tmp_path)
    found, card = zoo.load('x', 'a' * 64, tmp_path)
    assert {k: v for k, v in card.items() if k != 'params_hash'} == CARD
    assert np.array_equal(found['head']['kernel'], params['head']['kernel'])
    assert found['norm']['scale'].dtype == ml_dtypes.bfloat16 and found['kept'].dtype == np.int32
    assert zoo.names(tmp_path) == ['x']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x']


def test_int8_is_a_quarter_of_the_size_and_near(tmp_path):
    rng = np.random.default_rng(1)
    scales = 10.0 ** rng.integers(-3, 3, 40)
    params = {'a': {'up': (rng.normal(size=(3, 64, 40)) * scales).astype(np.float32),
                    'bias': rng.normal(size=40).astype(np.float32)}, 'zero': {'up': np.zeros((4, 4), np.float32)}}
    zoo.save('wide', params, CARD, tmp_path)
    zoo.save('int8', params, CARD, tmp_path, int8=('.*/up',))
    found, card = zoo.load('int8', 'a' * 64, tmp_path)
    step = np.abs(params['a']['up']).max(1, keepdims=True) / 127
    off = np.abs(found['a']['up'] - params['a']['up'])
    assert found['a']['up'].dtype == np.float32 and 0 < off.max() and (off <= step * 0.51).all()
    assert np.array_equal(found['a']['bias'], params['a']['bias']) and not found['zero']['up'].any()
    assert card['params_hash'] != json.loads((tmp_path / 'wide' / zoo.CARD).read_text())['params_hash']
    sizes = [(tmp_path / name / zoo.WEIGHTS).stat().st_size for name in ('int8', 'wide')]
    assert sizes[0] < 0.35 * sizes[1]


def test_another_base_names_both(tmp_path, params):
    zoo.save('x', params, CARD, tmp_path)
    with pytest.raises(FormatError, match=f'x: trained on smollm2-135m with parameters {"a" * 64}, .* {"b" * 64}'):
        zoo.load('x', 'b' * 64, tmp_path)


@pytest.mark.parametrize('field', [field for field in zoo.FIELDS if field != 'params_hash'])
def test_a_card_without_a_field(tmp_path, params, field):
    less = {k: v for k, v in CARD.items() if k != field}
    with pytest.raises(FormatError, match=f'lacks {field}'):
        zoo.save('x', params, less, tmp_path)
    assert not list(tmp_path.iterdir())
    zoo.save('x', params, CARD, tmp_path)
    (tmp_path / 'x' / zoo.CARD).write_text(json.dumps(less))
    with pytest.raises(FormatError, match=f'card.json: the card lacks .*{field}'):
        zoo.load('x', 'a' * 64, tmp_path)


def test_a_field_of_the_wrong_kind(tmp_path, params):
    with pytest.raises(FormatError, match='steps is not int'):
        zoo.save('x', params, CARD | {'steps': 'many'}, tmp_path)


def test_over_ten_megabytes(tmp_path, params):
    large = {'kernel': np.zeros((2_500_001,), np.float32)}
    with pytest.raises(FormatError, match='x: 1000.... bytes, an artefact may have 10000000'):
        zoo.save('x', large, CARD, tmp_path)
    assert not list(tmp_path.iterdir())
    zoo.save('x', params, CARD, tmp_path)
    with open(tmp_path / 'x' / zoo.WEIGHTS, 'ab') as file:
        file.truncate(zoo.MAX_BYTES + 1)
    with pytest.raises(FormatError, match='an artefact may have 10000000'):
        zoo.load('x', 'a' * 64, tmp_path)


def test_damaged_weights(tmp_path, params):
    zoo.save('x', params, CARD, tmp_path)
    path = tmp_path / 'x' / zoo.WEIGHTS
    sane = path.read_bytes()
    for damaged in (sane[:-1], b'', sane[:4], b'\xff' * 8 + sane[8:], sane[:-1] + bytes([sane[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match='weights.safetensors'):
            zoo.load('x', 'a' * 64, tmp_path)


def test_unknown_or_impossible_names(tmp_path, params):
    zoo.save('x', params, CARD, tmp_path)
    for name in ('y', '../x', ''):
        with pytest.raises(FormatError, match='no such artefact .* there are: x'):
            zoo.load(name, 'a' * 64, tmp_path)
    for name in ('../y', 'a/b', '.hidden', ''):
        with pytest.raises(FormatError, match='not a name'):
            zoo.save(name, params, CARD, tmp_path)
    with pytest.raises(FormatError, match='exists already'):
        zoo.save('x', params, CARD, tmp_path)
    zoo.save('x', params, CARD | {'seed': 1}, tmp_path, overwrite=True)
    assert zoo.load('x', 'a' * 64, tmp_path)[1]['seed'] == 1


def test_the_zoo_of_this_repository():
    """Every artefact here is whole and within its size, and all of them within the repository's share."""
    total = sum(path.stat().st_size for path in zoo.ROOT.rglob('*') if path.is_file())
    assert total <= zoo.MAX_TOTAL_BYTES
    for name in zoo.names():
        zoo.load(name, json.loads((zoo.ROOT / name / zoo.CARD).read_text())['base_hash'])
    assert {path.name for path in zoo.ROOT.iterdir() if path.is_dir()} == set(zoo.names())


def test_what_is_in_the_zoo():
    """Every artefact is whole, small enough, and says what it was trained on and how well it does."""
    names = zoo.names()
    assert {f'tensorhead_smollm2_r{r}' for r in (1, 2, 4, 8)} <= set(names)
    total = sum(path.stat().st_size for path in zoo.ROOT.rglob('*') if path.is_file())
    assert total <= zoo.MAX_TOTAL_BYTES
    for name in names:
        card = json.loads((zoo.ROOT / name / zoo.CARD).read_text())
        params, _ = zoo.load(name, card['base_hash'])  # checks size and hash
        if 'model' in card:
            assert models.load(name).base_hash == card['base_hash']
        elif 'target' in card:
            assert models.load(name).decodes == card['target']
            if 'early_exit' in card:
                chosen = card['early_exit']['calibrated']
                assert chosen['bound'] <= 1 - chosen['target'] and chosen['n'] > 1000
            else:
                assert card['measured']['ratio'] > 1, 'perplexity on held-out text, of the whole model'
        else:
            assert card['base'] == 'smollm2-135m' and card['drafter']['params'] and params
            assert card['metrics']['acceptance'], 'measured on held-out prompts'
        assert not any(word in json.dumps(card) for word in ('/tmp/', '/root', '/home')), 'a path of some machine'


def test_more_components_give_a_lower_joint_loss_and_the_same_next_token():
    """What the method claims, of the trained heads themselves, same base and steps."""
    cards = {r: json.loads((zoo.ROOT / f'tensorhead_smollm2_r{r}' / zoo.CARD).read_text()) for r in (1, 2, 4, 8)}
    assert len({card['base_hash'] for card in cards.values()}) == len({card['steps'] for card in cards.values()}) == 1
    joint, first = ([card['metrics'][key] for card in cards.values()] for key in ('joint_nll', 'nll_1'))
    assert joint == sorted(joint, reverse=True) and len(set(joint)) == 4
    assert max(first) - min(first) < 0.1 * min(first)
