"""Accelerators, gates and thresholds of early exit in one folder of the zoo, from the run that trained the gates.

    python scripts/m2r2_artefact.py --workdir=out/m2r2_smollm2_gates --name=m2r2_smollm2_early_exit --target=0.95

Held-out rows of the run's own data: half of the positions scale the gates' scores to rates of agreement
(calibrate.fit_scale, folded into the gates), the other half choose a threshold an exit, so that with probability
1 - delta at most 1 - target of all tokens leave with another word than the whole model's (calibrate.per_exit). What is
chosen, its bound and n stand on the card: 'early_exit' {m2r2, gate, thresholds, calibrated, reliability}; 'target' says
what decodes with it, so that `headway-generate --model=NAME` does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.formats.tensors import params_hash
from harness import artefacts, data, models, zoo
from m2r2 import calibrate
from scripts.m2r2_tradeoff import Method, calibrated, look


def main(args: argparse.Namespace) -> dict:
    """The card. Errors: RequestError; those of models.read_run and zoo.save."""
    folder, step = models.split(args.workdir)
    task, params, _ = models.read_run(folder, step)
    if not hasattr(task, 'gate'):
        raise RequestError(f'{args.workdir} trains no gates')
    config = ml_collections.ConfigDict(models.read_config(folder)['config']).data
    rows = data.open_rows(config, config.eval_split, data.make_tokenizer(config))
    count = min(args.rows, len(rows))
    tokens = np.asarray(rows.batch(range(count))['tokens'], np.int32)
    method = Method(args.name, task.m2r2, params.get('m2r2', {}), {task.gate: params['m2r2_gates']})
    method, seen = calibrated(method, look(task.cfg, method, [], jax.device_put(params['base']), tokens))
    scores, agrees = (seen[name][:, ::args.every] for name in (f'score:{task.gate.kind}', 'agreement'))
    found = calibrate.per_exit(scores, agrees, task.m2r2.exits, task.m2r2.num_layers, target=args.target,
                               delta=args.delta)
    early = {'m2r2': task.m2r2.to_dict(), 'gate': task.gate.to_dict(), 'thresholds': found.thresholds,
             'calibrated': found.to_dict() | {'rows': count, 'every': args.every},
             'reliability': [calibrate.reliability(*pair)[0] for pair in zip(scores, agrees, strict=True)]}
    decodes = {'model': task.cfg.to_dict(), 'm2r2': early['m2r2'], 'gate': early['gate'],
               'thresholds': found.thresholds}
    card = artefacts.card_of(args.workdir) | {
        'base_hash': params_hash(jax.tree.map(np.asarray, params['base'])), 'early_exit': early,
        'target': {'factory': 'm2r2.early_exit.build', 'kwargs': decodes, 'pack': 'm2r2.early_exit.pack',
                   'params': ['m2r2', 'm2r2_gates']}}
    tree = {'m2r2': method.m2r2, 'm2r2_gates': method.gates[task.gate]}
    zoo.save(args.name, jax.tree.map(lambda a: np.asarray(a, np.float32), tree), card, args.root,
             overwrite=args.overwrite, int8=tuple(args.int8))
    print(f'wrote {args.name}: thresholds {found.thresholds}, at most {found.bound:.4f} of all tokens wrong (level '
          f'{args.delta}, n = {found.n}), mean depth {found.mean_depth:.2f} of {task.m2r2.num_layers}')
    return card


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='the run that trained the gates, with or without @STEP')
    parser.add_argument('--name', required=True, help='of the artefact')
    parser.add_argument('--target', type=float, default=0.95, help='agreement with the whole model')
    parser.add_argument('--delta', type=float, default=0.05, help='how often the bound may be wrong')
    parser.add_argument('--rows', type=int, default=64)
    parser.add_argument('--every', type=int, default=4, help='one in so many positions chooses thresholds: neighbours '
                        'are not independent')
    parser.add_argument('--int8', nargs='*', default=[r'm2r2/.*kernel'], help='regexes of matrices stored in int8')
    parser.add_argument('--root', type=Path, default=None, help='instead of zoo/')
    parser.add_argument('--overwrite', action='store_true')
    return parser.parse_args(argv)


if __name__ == '__main__':
    main(parse())
