"""Accelerators and their gates, calibrated, in one folder of the zoo, from the run that trained the gates.

    python scripts/m2r2_artefact.py --workdir=out/m2r2_smollm2_gates --name=m2r2_smollm2_early_exit --target=0.95
    python scripts/m2r2_artefact.py --workdir=out/m2r2_smollm2_draft_gate --name=m2r2_smollm2_gated --drafts=30

Held-out rows of the run's own data: half of the positions scale the gates' scores to rates of agreement
(calibrate.fit_scale, folded into the gates), the other half choose a threshold an exit, so that with probability
1 - delta at most 1 - target of all tokens leave with another word than the whole model's (calibrate.per_exit). What is
chosen, its bound and n stand on the card: 'early_exit' {m2r2, gate, thresholds, calibrated, reliability}; 'target' says
what decodes with it, so that `headway-generate --model=NAME` does.

--drafts=PERCENT: instead, a drafter that stops where the first exit's gate is less confident than that ('doubt' of
m2r2/drafter.py). What is drafted is verified, so nothing is bounded: half of the positions scale the gate as above, the
other half say how good it is ('draft_gate' on the card).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.formats.tensors import params_hash
from harness import artefacts, data, models, zoo
from m2r2 import calibrate
from m2r2.gate_task import GateTask
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
    base = {'base_hash': params_hash(jax.tree.map(np.asarray, params['base']))}
    if args.drafts is None and (task.m2r2.carry or task.m2r2.draft_vocab):
        raise RequestError(f'{args.workdir}: these accelerators draft and do not answer: give --drafts')
    if args.drafts is not None:
        tree, card = drafting(task, params, [rows.batch([i]) for i in range(count)], args.drafts)
        save(args, tree, artefacts.card_of(args.workdir) | base | card, r'(layers|exits|carry)/.*kernel')
        print(f'wrote {args.name}: {card["draft_gate"]}')
        return card
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
    card = artefacts.card_of(args.workdir) | base | {
        'early_exit': early,
        'target': {'factory': 'm2r2.early_exit.build', 'kwargs': decodes, 'pack': 'm2r2.early_exit.pack',
                   'params': ['m2r2', 'm2r2_gates']}}
    save(args, {'m2r2': method.m2r2, 'm2r2_gates': method.gates[task.gate]}, card, r'm2r2/.*kernel')
    print(f'wrote {args.name}: thresholds {found.thresholds}, at most {found.bound:.4f} of all tokens wrong (level '
          f'{args.delta}, n = {found.n}), mean depth {found.mean_depth:.2f} of {task.m2r2.num_layers}')
    return card


def save(args: argparse.Namespace, tree: dict, card: dict, int8: str) -> None:
    """int8: regex of the matrices stored so, unless --int8 says which."""
    wide = lambda a: np.asarray(a, np.float32 if np.issubdtype(a.dtype, np.floating) else a.dtype)
    zoo.save(args.name, jax.tree.map(wide, tree), card, args.root, overwrite=args.overwrite,
             int8=(int8,) if args.int8 is None else tuple(args.int8))


def drafting(task: GateTask, params: dict, batches: list[dict], doubt: float) -> tuple[dict, dict[str, Any]]:
    """(params['m2r2'] with the first exit's gate, of which a score is a rate of agreement; its part of the card)."""
    task = dataclasses.replace(task, cached=False)
    read = jax.jit(lambda params, batch: task.read(params, batch)[0])
    counted = [np.asarray(batch['weights'])[0] > 0 for batch in batches]
    found = [[np.asarray(a)[0] for a in read(params, batch)] for batch in batches]
    logits, agrees = (np.concatenate([part[i][at] for part, at in zip(found, counted, strict=True)]) for i in (0, 1))
    scores, half = 1 / (1 + np.exp(-logits)), len(logits) // 2
    by = calibrate.fit_scale(scores[:half], agrees[:half])
    scores, agrees = calibrate.scaled(scores[half:], *by), agrees[half:]
    reliability, error = calibrate.reliability(scores, agrees)
    tree = params.get('m2r2', {}) | {'gate': calibrate.fold(params['m2r2_gates']['exit_1'], *by)}
    kwargs = {'m2r2': task.m2r2.to_dict(), 'gate': task.gate.to_dict(), 'doubt': doubt}
    return tree, {'drafter': {'factory': 'm2r2.drafter.build', 'kwargs': kwargs, 'params': 'm2r2'},
                  'draft_gate': {'n': len(scores), 'agreement': float(agrees.mean()), 'calibration_error': error,
                                 'auc': calibrate.auc(scores, agrees), 'reliability': reliability}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='the run that trained the gates, with or without @STEP')
    parser.add_argument('--name', required=True, help='of the artefact')
    parser.add_argument('--drafts', type=float, default=None, metavar='PERCENT', help='a drafter that stops below that')
    parser.add_argument('--target', type=float, default=0.95, help='agreement with the whole model')
    parser.add_argument('--delta', type=float, default=0.05, help='how often the bound may be wrong')
    parser.add_argument('--rows', type=int, default=64)
    parser.add_argument('--every', type=int, default=4, help='one in so many positions chooses thresholds: neighbours '
                        'are not independent')
    parser.add_argument('--int8', nargs='*', default=None, help='regexes of matrices stored in int8, not those of the '
                        'accelerators')
    parser.add_argument('--root', type=Path, default=None, help='instead of zoo/')
    parser.add_argument('--overwrite', action='store_true')
    return parser.parse_args(argv)


if __name__ == '__main__':
    main(parse())
