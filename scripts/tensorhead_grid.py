"""What a round of TensorHead costs on this machine, by rank, horizon, draft vocabulary and components; batch 1, greedy.

    python scripts/tensorhead_grid.py --out=out/tensorhead_grid.json

A round is a draft and a verification of n tokens; both run inside jitted loops, by turns, medians over repeats. Random
heads: what a product costs does not depend on its values. Acceptance comes from trained heads
(harness.launch.acceptance). Prints a table and the share of a plain step that each round costs.
"""

import itertools
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from backbone.layout import pack
from backbone.model import PlainTarget
from harness import compilation, decode, models, provenance, steps
from harness.bench import peak_memory, reset_peak_memory
from harness.launch import common
from tensorhead.drafter import build

MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key, file or directory.')
DTYPES = common.list_flag('dtypes', ['float32', 'bfloat16'], 'Of weights and cache.')
RANKS = common.list_flag('ranks', ['1', '2', '4', '8', '16'], 'r.')
HORIZONS = common.list_flag('horizons', ['2', '4', '8'], 'n.')
WORDS = common.list_flag('words', ['4096'], 'Draft vocabularies at every (r, n); 0 is all words.')
MORE_WORDS = common.list_flag('more_words', ['8192', '16384', '0'], 'Further ones, at n = 4 and r of 1 and 8 only.')
REPEATS = common.integer_flag('repeats', 7, 'By turns.')
OUT = common.string_flag('out', 'out/tensorhead_grid.json', 'Results as JSON.')


def cases() -> list[dict]:
    """(r, n, words, components): all components everywhere, and one component at n = 4."""
    ranks, horizons, words = ([int(x) for x in flag.value] for flag in (RANKS, HORIZONS, WORDS))
    found = [(r, n, w, 0) for r, n, w in itertools.product(ranks, horizons, words)]
    found += [(r, 4, w, 1) for r, w in itertools.product(ranks, words) if r > 1 and 4 in horizons]
    found += [(r, 4, int(w), c) for r, w, c in itertools.product(ranks, MORE_WORDS.value, (0, 1))
              if r in (1, 8) and not (r == 1 and c)]
    return [dict(zip(('rank', 'horizon', 'words', 'components'), case, strict=True)) for case in found]


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    compilation.use_cache()
    loaded = models.load(MODEL.value)
    loaded.check_plain()
    cfg = loaded.config
    prompt = [(np.arange(40) * 97 % cfg.vocab_size).tolist()]
    rows = []
    for dtype in DTYPES.value:
        base = pack(loaded.params, dtype)
        target = PlainTarget(cfg, dtype, stacked=False)
        request = decode.prepare(target, prompt, max_new_tokens=64)
        timers = {}
        for case in cases():
            drafter = build(cfg, {'rank': case['rank'], 'horizon': case['horizon'], 'draft_vocab': case['words']},
                            case['components'])
            head = jax.tree.map(np.asarray, drafter.init_params(jax.random.key(0)))
            params = {'base': base, 'tensorhead': drafter.ready(head, base, dtype)}
            state = decode.start(target, drafter, params, request)
            reset_peak_memory()
            draft = steps.draft_timer(drafter, params, state.cache, state.drafter)
            timers['draft', *case.values()] = draft
            size = sum(leaf.size for name in ('gate', 'factors') for leaf in jax.tree.leaves(head[name]))
            rows.append({'dtype': dtype, **case, 'parameters': size, 'peak_memory': peak_memory(),
                         'bytes': steps.round_bytes(target, drafter, params, state.cache, state.drafter)[0]})
            for k in {1, case['horizon']} - {key[1] for key in timers if key[0] == 'verify'}:
                tokens = np.resize(np.asarray(state.cache.tokens[:, :41]), (1, k))
                timers['verify', k] = steps.forward_timer(target, params, state.cache, jax.numpy.asarray(tokens), None,
                                                          drafter.needs)
        times = {key: [] for key in timers}
        for repeat in range(REPEATS.value):
            order = list(timers)[repeat % len(timers):] + list(timers)[:repeat % len(timers)]
            for key in order:
                times[key].append(timers[key]())
        ms = {key: 1e3 * statistics.median(values) for key, values in times.items()}
        for row in rows:
            if row['dtype'] == dtype:
                case = [row[name] for name in ('rank', 'horizon', 'words', 'components')]
                draft_ms, verify_ms = ms['draft', *case], ms['verify', row['horizon']]
                row |= {'draft_ms': draft_ms, 'verify_ms': verify_ms, 'plain_ms': ms['verify', 1],
                        'round_cost': (draft_ms + verify_ms) / ms['verify', 1]}
                print(f'{dtype:9} r={case[0]:2} n={case[1]} W={case[2] or cfg.vocab_size:5} c={case[3]}  '
                      f'{row["parameters"] / 1e6:7.2f} M  draft {draft_ms:6.2f} ms  verify {verify_ms:6.2f} ms  '
                      f'plain {ms["verify", 1]:6.2f} ms  round {row["round_cost"]:.2f} plain steps', flush=True)
        del timers
    common.write_json(Path(OUT.value), {**provenance.collect({'model': MODEL.value}), 'rows': rows})


if __name__ == '__main__':
    common.run(main)
