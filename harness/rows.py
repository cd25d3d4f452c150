"""From measurements to the rows of the result: costs, verdicts, and a look at every output that differs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backbone import cache as caches
from backbone import model
from backbone.config import ModelConfig
from harness import decode, stepwise, verdict
from harness.bandwidth import Meter
from harness.bench import Bench
from harness.prompts import Prompt
from harness.results import Mismatch, Row, Spread


def plain_of(benches: Sequence[Bench], dtype: str | None, batch: int, timed: bool = True,
             model: str = '') -> Bench | None:
    """The fastest plain row of that dtype (None: any), batch and model."""
    rows = [b for b in benches if b.stepwise and b.model == model and b.batch == batch and dtype in (None, b.dtype)
            and b.timed == timed]
    return min(rows, key=lambda b: statistics.median(b.decode_s) / b.decoded if b.decode_s else 0.0, default=None)


def make_row(config, bench: Bench, benches, plain_out, floor, parts, ties: NearTies, prompts, quality) -> Row:
    """plain_out, ties, quality: of the row's own model."""
    # float32 is held against plain decoding at batch 1, whatever the batch; bfloat16 against its own plain row.
    own = plain_of(benches, bench.dtype, bench.batch, model=bench.model)
    if bench.dtype != 'float32':
        plain_out = own.outputs
    mismatches = []
    for i, ours in sorted(bench.outputs.items()):
        at = verdict.first_difference(ours, plain_out[i])
        if at is not None:
            mismatches.append(ties.look(bench.dtype, prompts, i, ours, plain_out[i], at))
    identical = 1 - len(mismatches) / len(bench.outputs)
    lossless = bench.spec.mode == 'lossless'
    mean_accepted = float((bench.accepted * (1 + np.arange(len(bench.accepted)))).sum() / max(bench.accepted.sum(), 1))
    settings = dict(bench.spec.kwargs) | dict(bench.spec.get('target_kwargs') or {})
    settings |= {'artefact': bench.spec.artefact} if bench.spec.get('artefact') else {}
    settings |= getattr(bench.target, 'counted', {})
    common = {
        'method': bench.method, 'mode': bench.spec.mode, 'dtype': bench.dtype, 'batch': bench.batch,
        'settings': settings,
        'mean_accepted_tokens': mean_accepted,
        'identical_rate': identical, 'mismatches': mismatches,
        'quality': 1.0 if lossless else agreement(bench, prompts, plain_out),
        'bytes_per_token': bench.bytes_per_round * bench.rounds / max(bench.decoded, 1),
        'acceptance_by_position': by_position(bench.accepted, bench.drafted),
        'tokens': bench.tokens, 'rounds': bench.rounds, 'model': bench.model,
        'kv_bytes_per_token': bench.kv_bytes_per_token, 'kv_bytes_formula': bench.kv_bytes_formula,
        **(quality if bench.target.exact else {}),
    }
    name = bench.method + (f', the model {bench.model}' if bench.model else '')
    about = {'method': name, 'dtype': bench.dtype, 'batch': bench.batch, 'lossless': lossless,
             'identical': identical == 1, 'exact_dtype': bench.dtype == 'float32'}
    judge = {k: about[k] for k in ('identical', 'lossless', 'exact_dtype')}
    if not bench.timed:
        word = verdict.pays(None, **judge)
        return Row(tokens_per_s=None, speedup=None, peak_memory=bench.peak_memory, usd_per_million=None, pays=word,
                   verdict=verdict.explain(pays=word, **about), **common)

    speeds = [bench.decoded / s for s in bench.decode_s]
    plain, fastest = plain_of(benches, bench.dtype, bench.batch), plain_of(benches, None, bench.batch)
    ratio = Spread.of([v * p / plain.decoded for v, p in zip(speeds, plain.decode_s, strict=True)])
    ratio_any = Spread.of([v * p / fastest.decoded for v, p in zip(speeds, fastest.decode_s, strict=True)])
    spread = Spread.of(speeds)
    costs = round_costs(bench, parts[id(bench)], own, parts[id(own)])
    word = 'baseline' if bench is plain else verdict.pays(ratio, **judge)
    host_cost = costs.pop('host_cost')
    if bench.model:
        over_own = Spread.of([v * p / own.decoded for v, p in zip(speeds, own.decode_s, strict=True)])
        line = verdict.explain_other(pays=word, **about, speedup=ratio, mean_accepted=mean_accepted,
                                     bits_per_byte=common.get('bits_per_byte'),
                                     over_own=None if bench is own else over_own)
    else:
        line = verdict.explain(pays=word, **about, speedup=ratio, speedup_any_dtype=ratio_any.median,
                               fastest_plain_dtype=fastest.dtype, mean_accepted=mean_accepted,
                               block=bench.drafter.block, draft_cost=costs['draft_cost'],
                               verify_cost=costs['verify_cost'], host_cost=host_cost)
    warm = [d + p for d, p in zip(bench.decode_s, bench.prefill_s, strict=True)]
    return Row(
        tokens_per_s=spread.median, speedup=ratio.median, peak_memory=bench.peak_memory,
        usd_per_million=verdict.usd_per_million(config.price_per_hour, spread.median), pays=word, verdict=line,
        tokens_per_s_spread=spread, tokens_per_s_repeats=speeds,
        tokens_per_s_with_prefill=bench.tokens / statistics.median(warm), ms_per_token=1e3 / spread.median,
        prefill_ms=1e3 * statistics.median(bench.prefill_s) / len(bench.groups),
        compile_s=max(bench.cold_s - statistics.median(warm), 0.0), speedup_spread=ratio,
        speedup_any_dtype=ratio_any.median,
        # A token over the floor beside it: of a row of the batch, because weights are read once for all of them.
        over_floor=None if bench.model else statistics.median(
            d / bench.decoded * bench.batch / f for d, f in zip(bench.decode_s, bench.floor_s, strict=True)),
        predicted_ms=1e3 * bench.bytes_per_round / floor[bench.dtype].bytes_per_s.median,
        bandwidth_share=common['bytes_per_token'] * spread.median / floor[bench.dtype].bytes_per_s.median,
        **costs, **common)


def round_costs(bench: Bench, parts: dict, plain: Bench, plain_parts: dict) -> dict[str, float | None]:
    """Milliseconds of a round's parts, and the costs the break-even is made of, in plain steps."""
    keys = ('draft_ms', 'verify_ms', 'host_ms', 'draft_cost', 'verify_cost', 'break_even', 'host_cost')
    round_ms = 1e3 * statistics.median(bench.decode_s) / max(bench.rounds, 1)
    if 'verify' not in parts or 'verify' not in plain_parts:
        return dict.fromkeys(keys) | {'round_ms': round_ms}
    draft_ms, verify_ms = (1e3 * statistics.median(parts.get(p) or [0.0]) for p in ('draft', 'verify'))
    step_ms = 1e3 * statistics.median(plain_parts['verify'])
    plain_host_ms = max(1e3 * statistics.median(plain.decode_s) / max(plain.rounds, 1) - step_ms, 0.0)
    block = bench.drafter.block
    draft_cost = draft_ms / step_ms / block if block else 0.0
    verify_cost = verify_ms / step_ms - 1
    # What is left of the round: acceptance, commit, dispatch. The parts are timed apart, so noise may leave less than
    # nothing.
    host_ms = max(round_ms - draft_ms - verify_ms, 0.0)
    values = (draft_ms, verify_ms, host_ms, draft_cost, verify_cost,
              verdict.break_even(block, draft_cost, verify_cost), max(host_ms - plain_host_ms, 0.0) / step_ms)
    return dict(zip(keys, values, strict=True)) | {'round_ms': round_ms}


def by_position(accepted: np.ndarray, drafted: np.ndarray) -> list[float]:
    """[K]: of the rounds that proposed a draft at that position, the share that kept it."""
    kept, proposed = (h[::-1].cumsum()[::-1][1:] for h in (accepted, drafted))
    return np.divide(kept, proposed, out=np.zeros(len(kept)), where=proposed > 0).tolist()


def agreement(bench: Bench, prompts: list[Prompt], plain_out: dict[int, list[int]]) -> float:
    """Quality of an approximate target: the share of plain decoding's tokens that it would have chosen itself, step by
    step, given plain decoding's text so far."""
    same = total = 0
    longest = max(len(plain_out[i]) for i in bench.outputs)
    for i in sorted(bench.outputs):
        best = _choices(bench.target, bench.params, prompts[i].ids, plain_out[i], longest)
        same, total = same + int((best == np.array(plain_out[i])).sum()), total + len(plain_out[i])
    return same / total


def _choices(target, params, prompt: Sequence[int], given: list[int], longest: int) -> np.ndarray:
    """What the target finds best at each place of `given`. longest: of all texts, so that they share a program."""
    request = decode.prepare(target, [prompt], max_new_tokens=longest)
    cache = target.init_cache(1, request.capacity, 0)
    output = decode.run_prompt(target, (), params, request.tokens, cache, request.lengths)
    text = np.zeros((1, longest), np.int32)
    text[0, :len(given)] = given
    cache = caches.commit(output.cache, request.lengths - 1, text[:, 0])
    rest = stepwise.follow(target, params, cache, text[:, 1:])[2]
    return np.concatenate([output.logits[0].argmax(-1), rest[0]])[:len(given)]


class NearTies:
    """Looks at a first difference with the stacked float32 model: was the choice within rounding?"""

    def __init__(self, cfg: ModelConfig, base: Any):
        self._cfg, self._base = cfg, base
        self._forward = jax.jit(lambda params, tokens, at: model.forward(cfg, params, tokens)[0, at])
        self._params: dict[str, Any] = {}

    def look(self, dtype: str, prompts: list[Prompt], prompt: int, ours: list[int], plain: list[int],
             at: int) -> Mismatch:
        # One output may end where the other goes on: then the missing token is "none", -1.
        token, expected = (out[at] if at < len(out) else -1 for out in (ours, plain))
        if -1 in (token, expected):
            return Mismatch(prompt, at, expected, token, float('inf'), 0.0, False)
        ids = [*prompts[prompt].ids, *plain[:at]]
        exact = self._logits('float32', ids)
        gap = float(exact[expected] - exact[token])
        rounding = 0.0 if dtype == 'float32' else float(np.abs(exact - self._logits('bfloat16', ids)).max())
        return Mismatch(prompt, at, expected, token, gap, rounding, abs(gap) <= 2 * rounding)

    def _logits(self, dtype: str, ids: list[int]) -> np.ndarray:
        if dtype not in self._params:
            # Matrices in the dtype, vectors in float32, as layout.pack has them; stacked, because a scan compiles fast.
            def cast(tree, rank):
                return jax.tree.map(lambda a: jnp.asarray(a, dtype if a.ndim >= rank else 'float32'), tree)
            self._params[dtype] = {k: cast(v, 3 if k == 'layers' else 2) for k, v in self._base.items()}
        padded = np.zeros((1, decode.bucket(len(ids))), np.int32)
        padded[0, :len(ids)] = ids
        return np.asarray(self._forward(self._params[dtype], padded, len(ids) - 1), np.float32)


def notes(config: Any, meter: Meter, rows: list[Row]) -> list[str]:
    """What a reader must know before the table."""
    found = [meter.note] if meter.note else []
    plain = {r.dtype: r for r in rows if r.pays == 'baseline' and r.batch == 1}
    if len(plain) == 2 and plain['bfloat16'].tokens_per_s > plain['float32'].tokens_per_s:
        found.append('Plain bfloat16 decoding is faster than plain float32: a float32 method that "pays" may still '
                     'lose to it (speedup_any_dtype).')
    flips = [m for r in rows if r.dtype == 'bfloat16' for m in r.mismatches]
    if flips:
        ties = sum(m.near_tie for m in flips)
        found.append(f'bfloat16: {ties} of {len(flips)} first differences from plain decoding are near-ties '
                     '(the float32 logits of the two tokens differ by less than bfloat16 rounding).')
    if config.price_per_hour:
        found.append(f'Cost assumes {config.price_per_hour} USD an hour for the whole machine (price_per_hour).')
    return found


