"""A trained predictor in a folder of the zoo, with what is to be kept: a sparse target of its base, by name.

    python scripts/sparsity_artefact.py --workdir=out/sparsity_stories --name=sparsity_stories --neurons=0.5 --heads=0.5
    headway-generate --model=sparsity_stories --prompt='Once upon a time'                              # approximate
    headway-generate --model=stories-15m --drafter=sparsity_stories --prompt='Once upon a time'        # lossless

The predictor lies there in int8 with a scale a column; the base does not, `base_hash` names it. What it was worth on
held-out text goes on the card: the ranks it foretold with --measured (scripts/sparsity_predictor.py), the perplexity
that was left with --evaluated (scripts/sparsity_eval.py, the run as `ours`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.formats.tensors import params_hash
from harness import artefacts, models, zoo
from sparsity.config import SparsityConfig


def main(args: argparse.Namespace) -> dict:
    """The card. Errors: RequestError; those of models.read_run and zoo.save."""
    task, params, _ = models.read_run(*models.split(args.workdir))
    if not hasattr(task, 'predictor') or task.predictor.kind != 'unified':
        raise RequestError(f'{args.workdir} trains no predictor that knows all layers before they run')
    p = task.predictor
    s = SparsityConfig.of(task.cfg, {'heads': args.heads, 'neurons': args.neurons, 'refresh': args.refresh,
                                     'head_unit': p.head_unit, 'block': p.block})
    card = artefacts.card_of(args.workdir) | {
        'base_hash': params_hash(jax.tree.map(np.asarray, params['base'])),
        'target': {'factory': 'sparsity.methods.build', 'pack': 'sparsity.methods.pack', 'params': ['sparsity'],
                   'kwargs': {'model': task.cfg.to_dict(), 'sparsity': s.to_dict(), 'selector': 'predictor',
                              'predictor': p.to_dict()}},
        'drafter': {'factory': 'sparsity.drafter.build', 'params': 'sparsity',
                    'kwargs': {'sparsity': s.to_dict(), 'predictor': p.to_dict(), 'block': args.drafts,
                               'compute': 'gathered'}}}
    measured = json.loads(args.measured.read_text())['parts'] if args.measured else {}
    if args.evaluated:
        measured |= row_of(args.evaluated / 'rows.jsonl', args.heads, args.neurons)
    if measured:
        card['measured'] = measured
    tree = {'sparsity': jax.tree.map(lambda a: np.asarray(a, np.float32), params['sparsity'])}
    zoo.save(args.name, tree, card, args.root, overwrite=args.overwrite, int8=tuple(args.int8))
    return card


def row_of(path: Path, heads: float, neurons: float) -> dict:
    """What scripts/sparsity_eval.py measured at these shares. Errors: RequestError where it did not."""
    part = 'neurons' if heads == 1 else 'heads' if neurons == 1 else 'both'
    key = f'ours/{part}/share{min(heads, neurons):g}'
    row = next((row for row in map(json.loads, path.read_text().splitlines()) if row['key'] == key), None)
    if row is None or part == 'both' and heads != neurons:
        raise RequestError(f'{path}: {key} was not measured')
    return {name: row[name] for name in ('perplexity', 'perplexity_stderr', 'ratio', 'ratio_stderr', 'windows')}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='the run that trained the predictor, with or without @STEP')
    parser.add_argument('--name', required=True, help='of the artefact')
    parser.add_argument('--heads', type=float, default=1.0, help='share of the heads that is kept')
    parser.add_argument('--neurons', type=float, default=0.5, help='share of the neurons that is kept')
    parser.add_argument('--refresh', type=int, default=1, help='tokens between two choices')
    parser.add_argument('--drafts', type=int, default=2, help='tokens a round, where it drafts for the whole model')
    parser.add_argument('--int8', nargs='*', default=['.*/kernel'], help='regexes of matrices stored in int8')
    parser.add_argument('--measured', type=Path, default=None, help='.json of scripts/sparsity_predictor.py')
    parser.add_argument('--evaluated', type=Path, default=None, help='--out of scripts/sparsity_eval.py')
    parser.add_argument('--root', type=Path, default=None, help='instead of zoo/')
    parser.add_argument('--overwrite', action='store_true')
    return parser.parse_args(argv)


if __name__ == '__main__':
    main(parse())
