"""Makes what a run trained an artefact of the zoo: weights, and a card that says what they are and how to make them.

    python -m harness.launch.artefact --workdir=out/tensorhead_smollm2_r4 --name=tensorhead_smollm2_r4 \\
        --int8='factors/(down|up|kernel)' --measured=out/acceptance.json

What a run trains is a drafter, or a model: then --model of the other commands takes its name.
"""

from __future__ import annotations

import json
from pathlib import Path

from backbone.errors import RequestError
from harness.launch import common

WORKDIR = common.string_flag('workdir', None, 'The training directory, with or without @STEP.')
NAME = common.string_flag('name', None, 'Of the artefact: a folder of that name in zoo/.')
INT8 = common.list_flag('int8', None, 'Regexes of the matrices to store in int8 with a scale a column. Default: none '
                        'of a drafter, every kernel and embedding of a model; --int8= is none.')
NOTE = common.string_flag('note', '', 'What a reader of the card should know.')
MEASURED = common.string_flag('measured', None, "A file of harness.launch.acceptance: rows whose drafter is NAME or "
                              'WORKDIR enter the card.')
OVERWRITE = common.bool_flag('overwrite', False, 'Replace an artefact of that name.')


def main(argv: list[str]) -> None:
    if argv[1:] or not (WORKDIR.value and NAME.value):
        raise RequestError(f'unexpected argument {argv[1]!r}' if argv[1:] else '--workdir and --name are needed')
    from harness import artefacts

    rows = []
    if MEASURED.value:
        try:
            rows = json.loads(Path(MEASURED.value).read_text())['rows']
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f'--measured={MEASURED.value} cannot be read ({error!r})') from None
        rows = [row for row in rows if row['drafter'] in (NAME.value, WORKDIR.value)]
    card = artefacts.card_of(WORKDIR.value) | ({'note': NOTE.value} if NOTE.value else {})
    card['metrics'] |= {'acceptance': rows} if rows else {}
    int8 = None if INT8.value is None else tuple(INT8.value)
    artefacts.to_zoo(NAME.value, WORKDIR.value, card, int8, overwrite=OVERWRITE.value)
    print(f'wrote zoo/{NAME.value}')


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
