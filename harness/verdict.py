"""Whether a method pays, and why not: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from harness.results import Spread


def first_difference(ours: Sequence[int], plain: Sequence[int]) -> int | None:
    """Index of the first token where two outputs part; None where they are the same."""
    for i, (a, b) in enumerate(zip(ours, plain, strict=False)):
        if a != b:
            return i
    return None if len(ours) == len(plain) else min(len(ours), len(plain))


def break_even(block: int, draft_cost: float, verify_cost: float) -> float:
    """Mean accepted tokens (bonus included) at which a round of K drafts costs what plain decoding does.

    draft_cost c: one drafted token over one plain step. verify_cost v: what verifying costs beyond one plain step.
    """
    return 1 + block * draft_cost + verify_cost


def pays(speedup: Spread | None, *, identical: bool, lossless: bool, exact_dtype: bool) -> str:
    """'yes' or 'no' where the middle half of the repeats agrees, 'even' where it straddles 1.

    A lossless method whose float32 output differs from plain decoding never pays: it is broken.
    """
    if lossless and exact_dtype and not identical:
        return 'no'
    if speedup is None:
        return 'untimed'
    if speedup.q1 > 1:
        return 'yes'
    return 'no' if speedup.q3 < 1 else 'even'


def explain(*, pays: str, method: str, dtype: str, batch: int, lossless: bool, identical: bool, exact_dtype: bool,
            speedup: Spread | None = None, speedup_any_dtype: float | None = None,
            fastest_plain_dtype: str | None = None, mean_accepted: float = 1.0, block: int = 0,
            draft_cost: float | None = None, verify_cost: float | None = None, host_cost: float | None = None) -> str:
    """One line for a reader: what the row gained, and where it did not pay, what ate the gain.

    Costs are in plain steps: draft_cost per drafted token, verify_cost and host_cost per round.
    """
    where = f'{method}, {dtype}, batch {batch}'
    if lossless and exact_dtype and not identical:
        return f'{where}: NOT LOSSLESS, its float32 output differs from plain decoding: a bug, ignore its speed.'
    if pays == 'baseline':
        return f'{where}: the baseline.'
    if speedup is None:
        return f'{where}: output {"identical to" if identical else "differs from"} plain decoding (not timed).'
    gain = f'{speedup.median:.2f}x (middle half {speedup.q1:.2f} to {speedup.q3:.2f})'
    head = {'yes': f'{where}: pays, {gain}', 'no': f'{where}: does not pay, {gain}',
            'even': f'{where}: no clear difference, {gain}'}[pays]
    if draft_cost is None or verify_cost is None:
        return f'{head}: {mean_accepted:.2f} tokens accepted a round.'
    needed = break_even(block, draft_cost, verify_cost)
    sign = '-' if verify_cost < 0 else '+'  # a verification that resumes inside the model may cost less than a step
    sums = f'break-even {needed:.2f} = 1 + {block} x {draft_cost:.3f} (draft) {sign} {abs(verify_cost):.2f} (verify)'
    if pays == 'yes':
        tail = f'{mean_accepted:.2f} tokens accepted a round, {sums}'
        if speedup_any_dtype is not None and speedup_any_dtype < 1:
            tail += f'; but plain {fastest_plain_dtype} decoding is faster still ({speedup_any_dtype:.2f}x against it)'
        return f'{head}: {tail}.'
    if mean_accepted < needed:
        # Name the larger cost only where there is one to speak of; else nothing was accepted to pay for anything.
        draft, verify = block * draft_cost, verify_cost
        if max(draft, verify) < 0.05:
            cause = 'hardly anything is accepted'
        else:
            cause = 'drafting costs most' if draft > verify else f'verifying {block + 1} tokens costs most'
        return f'{head}: {mean_accepted:.2f} tokens accepted a round, {sums}; {cause}.'
    cleared = f'{head}: {mean_accepted:.2f} tokens accepted a round clear the {sums}'
    if host_cost is None or host_cost < 0.05:
        return f'{cleared}; the parts, timed apart from the rounds, do not add up to them: the machine was not quiet.'
    return f'{cleared}, but the rest of the round ({host_cost:.2f} plain steps) eats the gain.'


def explain_other(*, pays: str, method: str, dtype: str, batch: int, lossless: bool, identical: bool, exact_dtype: bool,
                  speedup: Spread, mean_accepted: float, bits_per_byte: float | None = None,
                  over_own: Spread | None = None) -> str:
    """One line about a row that decodes a model of its own. over_own: its speed over plain decoding of that model."""
    where = f'{method}, {dtype}, batch {batch}'
    if lossless and exact_dtype and not identical:
        return f'{where}: NOT LOSSLESS, its float32 output differs from plain decoding of it: a bug, ignore its speed.'
    word = {'yes': 'faster', 'no': 'slower', 'even': 'no clear difference'}[pays]
    line = (f'{where}: {word}, {speedup.median:.2f}x (middle half {speedup.q1:.2f} to {speedup.q3:.2f}) of plain '
            'decoding of the compared model')
    if over_own is not None:
        line += f', {over_own.median:.2f}x of its own, {mean_accepted:.2f} tokens accepted a round'
    return line + ('.' if bits_per_byte is None else f'; {bits_per_byte:.3f} bits a byte on the held-out text.')


def usd_per_million(price_per_hour: float, tokens_per_s: float) -> float:
    """Dollars for a million tokens from the price of the whole machine for an hour."""
    return price_per_hour / 3600 / tokens_per_s * 1e6
