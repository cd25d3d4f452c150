"""What makes a run the run it is: every field of its config that changes the numbers, flattened.

A working directory continues only under the same fingerprint. Left out is what only says where, how often or how long
to look: the run may go on with another mesh, cadence or data directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backbone.errors import FingerprintMismatch

# Dotted names, of fields and of whole groups.
IGNORED = ('mesh', 'log_every', 'eval', 'samples', 'checkpoint', 'rehearse', 'max_bad_steps', 'data.data_dir',
           'data.manual_dir')
ABSENT = object()


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """{'a.b': value} in JSON's types. num_steps counts only where the learning rate's schedule leads up to it."""
    flat = dict(_flatten(json.loads(json.dumps(config, default=str))))
    ignored = IGNORED + (('num_steps',) if flat.get('optimizer.schedule') == 'constant' else ())
    return {name: value for name, value in sorted(flat.items())
            if not any(name == other or name.startswith(f'{other}.') for other in ignored)}


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Errors: FingerprintMismatch names every field that differs: saved -> given."""
    wrong = [f'{name} {_said(saved, name)} -> {_said(now, name)}' for name in sorted({*saved, *now})
             if saved.get(name, ABSENT) != now.get(name, ABSENT)]
    if wrong:
        raise FingerprintMismatch(f'this working directory belongs to another config (saved -> given): '
                                  f'{"; ".join(wrong)}. Give the saved values, or another directory')


def _flatten(value: Any, name: str = ''):
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f'{name}.{key}' if name else key)
    else:
        yield name, value


def _said(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else 'absent'
