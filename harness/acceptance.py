"""How many drafted tokens a target keeps, drafter by drafter, on real prompts; counts only, nothing is timed.

    found = measure(loaded, ['tensorhead_smollm2_r4', 'prompt_lookup'], 'mt_bench', count=40)

Accepted drafts are counted without the bonus token (m of m + 1 emitted), and trunk calls without the prompt's. The
error is over prompts. What a round costs is `headway-compare`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backbone.formats.tensors import Loaded
from backbone.sampling import GREEDY, Sampling
from harness import decode, drafters, models
from harness.prompts import questions
from harness.rows import by_position


def measure(loaded: Loaded, names: Sequence[str], source: str, *, count: int, max_tokens: int = 128,
            max_new_tokens: int = 128, batch_size: int = 8, sampling: Sampling = GREEDY, seed: int = 0,
            dtype: str = 'float32', say=print) -> list[dict[str, Any]]:
    """One row a drafter: accepted drafts a round (mean, standard error over prompts, by position), trunk calls a token.

    names: what headway-generate takes as --drafter, with arguments behind it: 'early_exit:layer=28,block=1'. count:
    questions of `source` (harness/prompts.py) of at most max_tokens tokens. Greedy float32 output is the same for every
    drafter; sampled, each draws its own.
    Errors: ConfigError where too few questions fit; those of drafters.load.
    """
    target, packed = models.target(loaded, dtype)
    prompts = [prompt.ids for prompt in questions(source, count, loaded.tokenizer, max_tokens=max_tokens)]
    prompts.sort(key=len)  # like lengths share a compiled program
    rows = []
    for name in names:
        plain_name, _, arguments = name.partition(':')
        drafter, ready = drafters.load(plain_name, loaded, arguments.split(',') if arguments else [])
        params = packed | ready(packed['base'], dtype)
        accepted = drafted = 0
        kept, rounds, tokens = [], [], []
        for first in range(0, len(prompts), batch_size):
            group = prompts[first:first + batch_size]
            padded = group + group[-1:] * (batch_size - len(group))  # one shape; the copies are not counted
            out = decode.generate(target, drafter, params, padded, max_new_tokens=max_new_tokens, sampling=sampling,
                                  seed=seed + first, stop_tokens=loaded.tokenizer.eos_ids)
            made = [len(ids) - 1 for ids in out.tokens[:len(group)]]  # the first one belongs to the prompt's pass
            tokens += made
            rounds += out.rounds[:len(made)].tolist()
            if len(group) == len(padded):  # histograms are of the whole batch
                accepted, drafted = accepted + out.accepted_hist, drafted + out.drafted_hist
        kept = (np.array(tokens) - np.array(rounds)) / np.maximum(rounds, 1)
        row = {'drafter': name, 'prompts': source, 'count': len(prompts), 'temperature': sampling.temperature,
               'max_new_tokens': max_new_tokens, 'dtype': dtype, 'seed': seed, 'block': drafter.block,
               'accepted': float((sum(tokens) - sum(rounds)) / max(sum(rounds), 1)),
               'accepted_stderr': float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else None,
               'calls_per_token': float(sum(rounds) / max(sum(tokens), 1)), 'tokens': int(sum(tokens)),
               'by_position': by_position(accepted, drafted) if drafter.block and not isinstance(accepted, int) else []}
        say(f'{name:40} {source:10} T={sampling.temperature:g}  accepted {row["accepted"]:.3f} '
            f'± {row["accepted_stderr"] or 0:.3f}  calls a token {row["calls_per_token"]:.3f}  '
            f'{[round(p, 3) for p in row["by_position"]]}')
        rows.append(row)
    return rows
