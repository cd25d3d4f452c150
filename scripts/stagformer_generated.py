"""Models of scripts/stagformer_grid.py judged by what they write: another model's bits a byte, by place in the text.

    python scripts/stagformer_generated.py --runs=out/stagformer/tiny --judge=stories-15m

Recurrent decoding of the shared model differs from the exact one only while it writes, so no held-out loss can see it:
a given text is read in both passes. Here every model continues the starts of held-out documents, and the judge (a
model's name or directory; '' for the dense run) reads what was written, piece by piece: tokens 1 to 16, 17 to 64 and
so on, each given all before it. A text that its own model could have written is easy to a good judge: fewer bits are
better, down to what the document itself has (row `text`); far fewer are a text that repeats itself. Sampled at
--temperature, from the same draws for all. Then how far greedy recurrent text agrees with greedy exact text.
Writes OUT/generated.json and generated.md; a minute on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_collections
import numpy as np

from backbone.errors import RequestError
from backbone.sampling import GREEDY, Sampling
from harness import compilation, data, decode, models, provenance
from harness.baselines import Autoregressive
from harness.launch import common
from harness.scoring import Scorer
from harness.tasks.perplexity import ratio

RUNS = common.string_flag('runs', 'out/stagformer/tiny', "The grid's folder.")
SEED = common.integer_flag('seed', 0, "Which of the grid's seeds; of the sampling too.")
MODELS = common.list_flag('models', ['dense', 'half', 'shared', 'separate'], 'Which runs; of shared also recurrent.')
JUDGE = common.string_flag('judge', 'stories-15m', "Whose bits count; '': the dense run.")
PROMPTS = common.integer_flag('prompts', 48, 'How many.')
PROMPT = common.integer_flag('prompt', 32, 'Tokens of each.')
PIECES = common.list_flag('pieces', ['16', '64', '192'], 'Where the pieces of a continuation end, in tokens.')
TEMPERATURE = common.float_flag('temperature', 0.8, 'Of sampling.')
OUT = common.string_flag('out', '', 'Where results go; default: RUNS.')


def documents(folder: Path, count: int, prompt: int) -> tuple[list[list[int]], list[list[int]]]:
    """(starts, continuations) of held-out documents, token ids, from the rows that the run was evaluated on."""
    config = ml_collections.ConfigDict(models.read_config(folder)['config'])
    tokenizer = data.make_tokenizer(config.data)
    rows = data.open_rows(config.data, config.data.eval_split, tokenizer)
    starts, rest = [], []
    for batch in data.eval_batches(rows, batch_size=1, count=0):
        tokens, segments = batch['tokens'][0], batch['segments'][0]
        place = next((np.flatnonzero(segments == s) for s in dict.fromkeys(segments[segments > 0].tolist())
                      if (segments == s).sum() > prompt + 1), None)
        if place is not None and len(starts) < count:
            starts.append(tokens[place[:prompt]].tolist())
            rest.append(tokens[place[prompt:]].tolist())
    if not starts:
        raise RequestError(f'{folder}: no held-out document has more than {prompt + 1} tokens')
    return starts, rest


def written(target, params, tokenizer, prompts: list[list[int]], count: int, sampling: Sampling) -> list[list[int]]:
    return decode.generate(target, Autoregressive(), params, prompts, max_new_tokens=count, sampling=sampling,
                           seed=SEED.value, stop_tokens=tokenizer.eos_ids).tokens


def judged(scorer: Scorer, tokenizer, prompts: list[list[int]], texts: list[list[int]], ends: list[int]) -> list[dict]:
    """Bits a byte of each piece of the texts, with its standard error over them, and how many there are."""
    rows, sizes, place = [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        for i, end in enumerate(ends):
            before, piece = prompt + text[:ends[i - 1] if i else 0], text[ends[i - 1] if i else 0:end]
            if words := tokenizer.decode(piece):
                rows.append(scorer.pair(tokenizer.decode(before), words))
                sizes.append(len(words.encode()))
                place.append(i)
    bits = np.array([-score.total for score in scorer.score(rows)]) / np.log(2)
    found = []
    for i, end in enumerate(ends):
        mine = np.array(place) == i
        value, error = ratio(bits[mine], np.array(sizes)[mine]) if mine.any() else (float('nan'), float('nan'))
        found.append({'to': end, 'bits_per_byte': value, 'stderr': error, 'texts': int(mine.sum())})
    return found


def agreement(exact: list[list[int]], other: list[list[int]], ends: list[int]) -> list[dict]:
    """By length: the share of texts that are equal up to there."""
    return [{'to': end, 'equal': float(np.mean([a[:end] == b[:end] for a, b in zip(exact, other, strict=True)]))}
            for end in ends]


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    compilation.use_cache()
    ends = sorted(int(end) for end in PIECES.value)
    folder = lambda name: Path(RUNS.value) / f'{name}_{SEED.value}'
    prompts, rest = documents(folder(MODELS.value[0]), PROMPTS.value, PROMPT.value)
    tokenizer = models.load(folder(MODELS.value[0])).tokenizer
    scorer = Scorer.of(models.load(JUDGE.value or folder('dense')), progress=False)
    tables, greedy = {'text': judged(scorer, tokenizer, prompts, rest, ends)}, {}
    for name in MODELS.value:
        loaded = models.load(folder(name))
        ways = {name: {}} | ({'recurrent': {'recurrent': True}} if name == 'shared' else {})
        params = models.pack(loaded)
        for way, arguments in ways.items():
            made = models.make_target(loaded, arguments=arguments), params
            texts = written(*made, tokenizer, prompts, ends[-1], Sampling(TEMPERATURE.value))
            tables[way] = judged(scorer, tokenizer, prompts, texts, ends)
            if name == 'shared':
                greedy[way] = written(*made, tokenizer, prompts, ends[-1], GREEDY)
    equal = agreement(greedy['shared'], greedy['recurrent'], ends) if greedy else []
    out = Path(OUT.value or RUNS.value)
    settings = {flag.name: flag.value for flag in (RUNS, SEED, MODELS, JUDGE, PROMPTS, PROMPT, PIECES, TEMPERATURE)}
    common.write_json(out / 'generated.json', {**provenance.collect(settings), 'judged': tables, 'agreement': equal})
    text = report(tables, equal)
    (out / 'generated.md').write_text(text)
    print(text)


def report(tables: dict[str, list[dict]], equal: list[dict]) -> str:
    ends = [piece['to'] for piece in next(iter(tables.values()))]
    names = [f'tokens {start + 1} to {end}' for start, end in zip([0, *ends], ends, strict=False)]
    lines = ['| written by | ' + ' | '.join(names) + ' |', '|---' * (len(ends) + 1) + '|']
    for way, pieces in tables.items():
        lines.append(f'| {way} | ' + ' | '.join(f'{p["bits_per_byte"]:.3f} ± {p["stderr"]:.3f} ({p["texts"]})'
                                                for p in pieces) + ' |')
    lines += ['', "The judge's bits a byte ± standard error (texts)."]
    if equal:
        lines += ['Greedy recurrent texts equal to the exact ones: '
                  + ', '.join(f'{p["equal"]:.0%} up to token {p["to"]}' for p in equal) + '.']
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    common.run(main)
