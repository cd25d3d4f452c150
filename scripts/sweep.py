"""What scripts that measure many points share: an output folder of one setting, rows that go on after a kill, text."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from backbone.errors import RequestError
from harness import data


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What belongs to the results in --out. Errors: RequestError where that folder was made with other settings."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != 'out'}
    if (out / 'settings.json').exists() and json.loads((out / 'settings.json').read_text()) != settings:
        raise RequestError(f'{out} was made with other settings (settings.json): give another --out')
    return settings


def held_out(config: str, count: int) -> np.ndarray:
    """The first `count` held-out rows [count, S] of MODULE:VARIANT, a training config. Errors: RequestError."""
    module, _, variant = config.partition(':')
    found = importlib.import_module(f'configs.{module}').get_config(*[variant] * bool(variant)).data
    rows = data.open_rows(found, found.eval_split, data.make_tokenizer(found))
    if len(rows) < count:
        raise RequestError(f'{count} rows are wanted, the held-out data has {len(rows)}')
    return np.asarray(rows.batch(range(count))['tokens'], np.int32)


def write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + '.tmp')
    beside.write_text(text)
    os.replace(beside, path)


def read_rows(path: Path) -> list[dict]:
    """Whole lines; a line that a kill cut short is dropped, from the file too."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith('\n')]
    if len(whole) < len(lines):
        write(path, ''.join(whole))
    return [json.loads(line) for line in whole]


def append(path: Path, row: dict) -> dict:
    """The row as it will be read again."""
    line = json.dumps(row)
    with open(path, 'a') as file:
        file.write(line + '\n')
    return json.loads(line)
