import pytest

from backbone.config import ModelConfig
from backbone.errors import ConfigError
from tests.conftest import tiny_config


def test_dict_round_trip():
    cfg = tiny_config()
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize(('path', 'named'), ((('hidden_sise',), 'hidden_sise'),
                                             (('attention', 'heads'), 'attention.heads')))
def test_unknown_key_is_named_by_its_path(path, named):
    data = tiny_config().to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 1
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(data)


def test_missing_key_is_named():
    data = tiny_config().to_dict()
    del data['mlp']['intermediate_size']
    with pytest.raises(ConfigError, match='mlp.intermediate_size'):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize('changes', ({'vocab': 0}, {'heads': 3, 'kv_heads': 2, 'hidden': 24}, {'norm': 'batch'}))
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ConfigError):
        tiny_config(**changes)
