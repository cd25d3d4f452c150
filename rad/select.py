"""The layers that are replaced, by what a config says: numbers, a simple selection, or the file of a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backbone.errors import ConfigError, FormatError
from rad.search import evenly

NAMED = ('evenly', 'last', 'random:SEED')


def chosen(layers: Sequence[int] | str, num_layers: int, count: int = 0) -> tuple[int, ...]:
    """layers: numbers; one of NAMED, `count` of them; or a .json file, {'set': {'attention': numbers, 'mlp': none}} or
    that by count, as scripts/rad_search.py leaves it. count: 0 takes as many as there are.

    Errors: ConfigError for what is none of these, or not `count`; FormatError for a file that is not of that form.
    """
    if not isinstance(layers, str):
        found = tuple(sorted(map(int, layers)))
    elif layers in ('evenly', 'last') or layers.startswith('random:'):
        if not 1 <= count <= num_layers:
            raise ConfigError(f'layers {layers}: count must be in 1..{num_layers}, got {count}')
        found = _named(layers, num_layers, count)
    elif layers.endswith('.json'):
        found = _of_file(Path(layers), count)
    else:
        raise ConfigError(f'layers: unknown {layers!r}, numbers, a .json file or one of {", ".join(NAMED)}')
    if count and len(found) != count:
        raise ConfigError(f'layers: {len(found)} where count says {count}: {found}')
    return found


def _named(name: str, num_layers: int, count: int) -> tuple[int, ...]:
    if name == 'evenly':
        return evenly(num_layers, count)
    if name == 'last':
        return tuple(range(num_layers - count, num_layers))
    seed = name.partition(':')[2]
    if not seed.isdigit():
        raise ConfigError(f'layers: {name!r} is not random:SEED with a whole number')
    drawn = np.random.default_rng(int(seed)).choice(num_layers, count, replace=False)
    return tuple(sorted(drawn.tolist()))


def _of_file(path: Path, count: int) -> tuple[int, ...]:
    try:
        found = json.loads(path.read_text())
        found = found['set'] if 'set' in found else found[str(count)]['set']
        layers, more = tuple(sorted(map(int, found['attention']))), found.get('mlp', [])
    except OSError as error:
        raise FormatError(f'{path}: cannot be read ({error.strerror}); a search writes it') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f'{path} is not the result of a search ({error!r})') from None
    if more:
        raise ConfigError(f'{path}: this set leaves out MLPs too, {more}; only attentions are replaced')
    return layers
