"""The cost formula of m2r2/cost.py beside what `headway-compare` measured. Prints Markdown; measures nothing.

    python scripts/m2r2_prediction.py out/compare_m2r2/results.json

Rows that draft with a fast stream. alpha is fitted to the drafts kept; T(K+1)/T(1) is the run's own curve. Predicted:
from bytes alone, and with that ratio for verifying.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.config import ModelConfig
from harness import zoo
from m2r2 import cost
from m2r2.config import M2R2Config

HEADER = ('row', 'type', 'alpha', 'kept of proposed', 'tokens a round', 'draft ms', 'verify ms', 'T(K+1)/T(1)',
          'predicted by bytes', 'with T(K+1)', 'measured (middle half)')


def table(results: dict) -> list[str]:
    lines = ['| ' + ' | '.join(HEADER) + ' |', '|---' * len(HEADER) + '|']
    cfg = ModelConfig.from_dict(results['model']['config'])
    for row in results['rows']:
        spec = results['config']['methods'][row['method']]
        if not spec['artefact'] or row['draft_ms'] is None:  # identity only, not timed
            continue
        card = json.loads((zoo.ROOT / spec['artefact'] / 'card.json').read_text())
        if 'm2r2' not in card['drafter']['kwargs']:
            continue
        m = M2R2Config.of(cfg, card['drafter']['kwargs']['m2r2'])
        block, kept = spec['kwargs'].get('block', 4), row['mean_accepted_tokens'] - 1
        alpha, parts = cost.alpha_of(kept, block), cost.shares(cfg, m)
        wide = _wide(results['curve'], row['dtype'], block + 1)
        spread = row['speedup_spread']
        cells = (row['method'], row['dtype'], f'{alpha:.3f}', f'{kept / block:.3f}', f'{kept + 1:.2f}',
                 f'{row["draft_ms"]:.2f}', f'{row["verify_ms"]:.2f}', f'{wide:.2f}',
                 f'{cost.speed_up(alpha, parts, block):.2f}', f'{cost.speed_up(alpha, parts, block, wide):.2f}',
                 f'{row["speedup"]:.2f} ({spread["q1"]:.2f}-{spread["q3"]:.2f})')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def _wide(curve: list[dict], dtype: str, size: int) -> float:
    """T(size)/T(1), between the sizes that were timed."""
    points = sorted((point['k'], point['ratio']) for point in curve if point['dtype'] == dtype)
    return float(np.interp(size, *zip(*points, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', type=Path)
    path = parser.parse_args().results
    print('\n'.join(table(json.loads((path / 'results.json' if path.is_dir() else path).read_text()))))


if __name__ == '__main__':
    main()
