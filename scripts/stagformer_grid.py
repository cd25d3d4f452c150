"""The models of configs/stagformer.py trained one after the other on the same text, several seeds, as one table.

    headway-generate --model=stories-15m --batch_file=configs/prompts/stories.txt --samples_per_prompt=6 \\
                     --temperature=1 --max_new_tokens=200 --batch_size=100 --out=out/text/stories/stories.jsonl
    python scripts/stagformer_grid.py --out=out/stagformer/tiny                 # one to two minutes a run on two cores
    python scripts/stagformer_grid.py --out=out/stagformer/tiny --table         # what there is so far
    python scripts/stagformer_grid.py --scale=toy --out=/tmp/toy --models=half,separate --seeds=0     # seconds

Seeds run outermost: cut at any moment, it leaves whole comparisons, and the same command goes on, a run that was cut
included. OUT has a working directory a run (MODEL_SEED: what headway-generate and headway-evaluate take), rows.jsonl
with a line a finished run, and table.md. A seed is that of the parameters and of the order of the text, so all models
of a seed read the same tokens: differences are taken within a seed. Held out: eval.batches batches of the validation
split, at the end, in the type the run computes in.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backbone.errors import RequestError
from configs import stagformer as configs
from harness.launch import common

SCALE = common.enum_flag('scale', 'tiny', configs.SCALES, 'Of configs/stagformer.py.')
MODELS = common.list_flag('models', list(configs.MODELS), 'Which, in this order.')
SEEDS = common.list_flag('seeds', ['0', '1', '2'], 'Which.')
STEPS = common.integer_flag('steps', 0, 'Of each run; 0: as the config says.')
TEXT = common.string_flag('manual_dir', '', 'data.manual_dir, where it is not as in the config.')
OUT = common.string_flag('out', 'out/stagformer/tiny', 'Folder of the runs.')
TABLE = common.bool_flag('table', False, 'Trains nothing, prints the table.')

ORDER = ('half', 'shared', 'dense', 'separate')  # worst to best in perplexity, as the paper has them
QUANTILE = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # Student's t, 97.5 %, by degrees of freedom from 1


def configure(model: str, seed: int):
    config = configs.get_config(f'{SCALE.value}/{model}')
    config.seed = seed
    config.num_steps = STEPS.value or config.num_steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.num_steps // 4)
    config.data.manual_dir = TEXT.value or config.data.manual_dir
    return config.lock()


def row_of(folder: Path, config, model: str) -> dict:
    """What a finished run came to, from its working directory. train_s: of the steps, by their median speed."""
    import jax

    from harness.train_step import build_task

    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    held_out = [line for line in lines if line['kind'] == 'eval'][-1]
    speeds = [line['tokens_per_s'] for line in lines if 'tokens_per_s' in line]
    tokens = config.num_steps * config.data.batch_size * config.data.seq_len
    leaves = jax.tree.leaves(jax.eval_shape(build_task(config).init, jax.random.key(0)))
    return {'scale': SCALE.value, 'model': model, 'seed': config.seed, 'steps': config.num_steps, 'tokens': tokens,
            'parameters': sum(leaf.size for leaf in leaves),
            'train_s': tokens / statistics.median(speeds) if speeds else None,
            'train_nll': statistics.mean([line['nll'] for line in lines if line['kind'] == 'train'][-5:]),
            **{name: held_out[name] for name in ('nll', 'perplexity', 'bits_per_byte', 'accuracy')}}


def grid(out: Path, models: list[str], seeds: list[int]) -> bool:
    """Trains what is not there yet. False where a signal asked to stop."""
    from harness import train

    done = {(row['model'], row['seed']) for row in read(out)}
    for seed in seeds:
        for model in models:
            config, folder = configure(model, seed), out / f'{model}_{seed}'
            if (folder / 'config.json').exists():
                train.claim(folder, config, True)  # a row of another config would be a lie
            if (model, seed) in done:
                continue
            if train.run(config, folder) != 'finished':
                return False
            with (out / 'rows.jsonl').open('a') as sink:
                sink.write(json.dumps(row_of(folder, config, model)) + '\n')
            print(f'{model}_{seed}: {read(out)[-1]["bits_per_byte"]:.4f} bits a byte', flush=True)
    return True


def read(out: Path) -> list[dict]:
    path = out / 'rows.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- the table --------------------------------------------------------------------------------------------------------


def paired(rows: list[dict], first: str, second: str, measure: str = 'bits_per_byte') -> tuple[float, float, int]:
    """(mean of first - second over the seeds that both have, half of its 95 % interval or inf, number of seeds)."""
    values = {(row['model'], row['seed']): row[measure] for row in rows}
    seeds = sorted({seed for model, seed in values if model == first and (second, seed) in values})
    apart = [values[first, seed] - values[second, seed] for seed in seeds]
    if len(apart) < 2:
        return (apart or [float('nan')])[0], float('inf'), len(apart)
    t = QUANTILE[min(len(apart) - 2, len(QUANTILE) - 1)]
    return statistics.mean(apart), t * statistics.stdev(apart) / len(apart) ** 0.5, len(apart)


def table(rows: list[dict]) -> str:
    """Markdown: a row a model with its spread over seeds, then whether the paper's order holds."""
    names = [name for name in dict.fromkeys((*configs.MODELS, *(row['model'] for row in rows)))
             if any(row['model'] == name for row in rows)]
    lines = ['| model | parameters | bits a byte, held out | minus dense, same seed | perplexity | seeds | '
             'training time / dense |', '|---|---|---|---|---|---|---|']
    time = lambda name: statistics.median([row['train_s'] or float('nan') for row in rows if row['model'] == name])
    for name in names:
        mine = [row for row in rows if row['model'] == name]
        bits = [row['bits_per_byte'] for row in mine]
        spread = f' ({min(bits):.4f} to {max(bits):.4f})' if len(bits) > 1 else ''
        apart, half, count = paired(rows, name, 'dense')
        against = ('' if name == 'dense' or not count else
                   f'{apart:+.4f}' + (f' ± {half:.4f}' if count > 1 else ''))
        ratio = f'{time(name) / time("dense"):.2f}' if 'dense' in names else ''
        perplexity = statistics.mean([row['perplexity'] for row in mine])
        size = f'{mine[0]["parameters"] / 1e6:.2f} M'
        lines.append(f'| {name} | {size} | {statistics.mean(bits):.4f}{spread} | {against} | '
                     f'{perplexity:.3f} | {len(mine)} | {ratio} |')
    lines += ['', 'Held out, mean over seeds (least to most); ± is half the 95 % interval of the mean difference.', '']
    for worse, better in zip(ORDER, ORDER[1:], strict=False):
        apart, half, count = paired(rows, worse, better)
        if count:
            lines.append(f'- {better} better than {worse}: {verdict(apart, half)}, {apart:+.4f} bits a byte'
                         + (f' ± {half:.4f} over {count} seeds' if count > 1 else ' from one seed'))
    return '\n'.join(lines) + '\n'


def verdict(apart: float, half: float) -> str:
    """What a difference `apart` ± `half` says of a claim that it is positive."""
    return 'yes' if apart > half else 'no, the reverse' if -apart > half else 'not resolved'


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    out = Path(OUT.value)
    if not TABLE.value:
        from harness import compilation

        compilation.use_cache()
        out.mkdir(parents=True, exist_ok=True)
        grid(out, MODELS.value, [int(seed) for seed in SEEDS.value])
    text = table(read(out))
    (out / 'table.md').write_text(text)
    print(text)


if __name__ == '__main__':
    common.run(main)
