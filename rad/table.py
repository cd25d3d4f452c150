"""What was evaluated, kept in a file: a search that was killed does not evaluate a set twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backbone.errors import FingerprintMismatch, FormatError
from rad.search import Search
from rad.skip import SkipConfig


class Table:
    """Every set that was evaluated, a line each in a file, under a first line that says of what and how.

    header: the model's hash and all that scores depend on. Errors: FingerprintMismatch names what differs from the
    file's; FormatError where the file is no such table.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]):
        self.path, self.rows = Path(path), {}
        header = json.loads(json.dumps({'format': 1, **header}))
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith('\n')]  # a kill may have cut the last one short
        try:
            found = [dict(json.loads(line)) for line in whole]
            keys = [_key(SkipConfig(**{part: tuple(layers) for part, layers in row['set'].items()}))
                    for row in found[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f'{self.path} is no table of evaluated sets ({error!r})') from error
        if found and found[0] != header:
            raise FingerprintMismatch(f'{self.path} was evaluated with other {differing(found[0], header)}: give '
                                      'another folder')
        self.rows = dict(zip(keys, found[1:], strict=True))
        if not found or len(whole) < len(lines):
            beside = self.path.with_name(self.path.name + '.tmp')
            beside.write_text(''.join(whole) or json.dumps(header) + '\n')
            os.replace(beside, self.path)

    def find(self, skip: SkipConfig) -> dict[str, Any] | None:
        return self.rows.get(_key(skip))

    def add(self, skip: SkipConfig, row: dict[str, Any]) -> dict[str, Any]:
        """The row as it will be read again."""
        line = json.dumps({'set': skip.to_dict(), **row})
        with open(self.path, 'a') as file:
            file.write(line + '\n')
        self.rows[_key(skip)] = json.loads(line)
        return self.rows[_key(skip)]


def _key(skip: SkipConfig) -> str:
    return json.dumps(skip.to_dict())


def run(search: Search, evaluate: Callable[[SkipConfig], dict[str, Any]], score: Callable[[SkipConfig, dict], float],
        table: Table, note: dict[str, Any] | None = None) -> Search:
    """Runs a search to its end. evaluate(skip): the row of a set that the table does not have yet. note: what its row
    says of who asked. Returns the search."""
    while (skip := search.suggest()) is not None:
        row = table.find(skip) or table.add(skip, {**(note or {}), **evaluate(skip)})
        search.observe(skip, score(skip, row))
    return search


def differing(theirs: dict, mine: dict) -> str:
    return ', '.join(f'{name} ({theirs.get(name)!r}, not {mine.get(name)!r})'
                     for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name))
