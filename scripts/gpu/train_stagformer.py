"""Staggered models beside dense ones on one NVIDIA GPU: held-out loss by model and seed, training speed, decode speed.

    python scripts/gpu/train_stagformer.py --rows=rows.npz --held_out=held_out.npz --models=dense,separate --out=$OUT
    python scripts/gpu/train_stagformer.py --heal=smollm2.gguf --rows=... --models=ends,halves --out=$OUT
    python scripts/gpu/train_stagformer.py --models= --shapes=15m,135m,1b --out=$OUT  # decode speed alone
    python scripts/gpu/train_stagformer.py --tiny --out=/tmp/tiny                 # the same path on a CPU, seconds

rows, held_out: scripts/gpu/pack_text.py --config=configs/stagformer.py:30m/dense (--config.data.split=validation), or
of configs/stagformer_heal.py:gpu/ends, at most 64 MB. Models are those of configs/stagformer.py at --scale (30m), every
one with every seed, which is that of the parameters and of the rows' order; with --heal, the deals of
configs/stagformer_heal.py, healed from that file. Writes rows.jsonl, a line a finished run, which
`python scripts/stagformer_grid.py --table --out=...` reads (join the files of several commands); train_stagformer.json
with figures, versions, device, and step times of decoding (scripts/stagformer_speed.py) of --shapes and of the trained
shape; and of the models in --save the parameters of the first seed in float16, in pieces under 15 MB.
MFU: model FLOPs of a step over the published dense peak. A model that does not run is a result, too.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from backbone.formats.tensors import flatten
from backbone.mesh import make_mesh
from backbone.presets import preset
from configs import stagformer, stagformer_heal
from harness import peak, provenance, roofline
from harness.train_step import place_batch, plan
from scripts import stagformer_speed

MODELS = flags.DEFINE_list('models', list(stagformer.MODELS), 'Which, in this order; empty: none.')
SEEDS = flags.DEFINE_list('seeds', ['0'], 'Which; outermost.')
SCALE = flags.DEFINE_string('scale', '30m', 'Of configs/stagformer.py.')
HEAL = flags.DEFINE_string('heal', '', 'Heals this dense model (a file) instead, into the deals that --models names.')
ROWS = flags.DEFINE_string('rows', '', 'Packed rows; without them random tokens, and no claim about any loss.')
HELD_OUT = flags.DEFINE_string('held_out', '', 'Packed rows to measure the loss on; default: those trained on.')
STEPS = flags.DEFINE_integer('steps', 0, 'Of each run; 0: what the config says. The schedule ends there.')
BATCH = flags.DEFINE_integer('batch', 0, 'Rows a step; 0: what the config says.')
ATTENTION = flags.DEFINE_string('attention', 'cudnn', 'Of training: cudnn, xla or dense.')
SHAPES = flags.DEFINE_list('shapes', [], 'Whose decode speed, of scripts/stagformer_speed.py.')
CONTEXTS = flags.DEFINE_list('contexts', ['64'], 'Tokens cached where decode speed is taken.')
FORMS = flags.DEFINE_list('forms', ['arrays', 'tuple'], 'Layouts of the staggered models there.')
REPEATS = flags.DEFINE_integer('repeats', 15, 'Turns there.')
SAVE = flags.DEFINE_list('save', [], 'Models whose parameters are written.')
PIECE_BYTES = flags.DEFINE_integer('piece_bytes', 14_000_000, 'Of one file with parameters, about.')
OUT = flags.DEFINE_string('out', 'out/gpu', 'Folder for the results.')
TINY = flags.DEFINE_bool('tiny', False, 'Small models on random bytes, for trying this script without a GPU.')


def scale() -> str:
    return 'heal' if HEAL.value else 'toy' if TINY.value else SCALE.value


def configure(model: str, seed: int) -> object:
    if HEAL.value:
        config = stagformer_heal.get_config(f'gpu/{model}')
        config.task.kwargs.dense = HEAL.value
    else:
        config = stagformer.get_config(f'{scale()}/{model}')
    if not TINY.value:
        config.task.kwargs.attention = ATTENTION.value
    config.seed = seed
    config.data.batch_size = BATCH.value or config.data.batch_size
    config.num_steps = STEPS.value or config.num_steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.num_steps // 4)
    return config


def read_rows(path: str, config, vocab: int) -> dict[str, np.ndarray]:
    """{'tokens', ..., 'bytes'}: without a file, rows of random tokens of a byte each."""
    if path:
        with np.load(path) as found:
            return {k: found[k] for k in found.files}
    count, size = 2 * config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, vocab, (count, size + 1))
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': np.ones((count, size), np.int32),
            'positions': np.arange(size)[None].repeat(count, 0), 'weights': np.ones((count, size), np.float32),
            'bytes': np.full(count, size)}


class Run:
    """A model while it trains. Rows come in an order of the seed, each once before any comes again."""

    def __init__(self, config, made, rows):
        self.config, self.plan, self.rows, self.order = config, made, rows, np.array([], int)
        self.rng = np.random.default_rng(config.seed)

    def batch(self) -> dict:
        size = self.config.data.batch_size
        while len(self.order) < size:
            self.order = np.r_[self.order, self.rng.permutation(len(self.rows['tokens']))]
        index, self.order = self.order[:size], self.order[size:]
        return place_batch({k: v[index] for k, v in self.rows.items()}, self.plan.batch, 0)

    def train(self, published: float) -> tuple[dict, dict]:
        """(parameters, what the training came to)."""
        state, begin = self.plan.init(), time.perf_counter()
        state, metrics = self.plan.step(state, self.batch())
        curve, seconds, first_s = [(1, float(metrics['nll']))], [], time.perf_counter() - begin
        for done in range(1, self.config.num_steps, 10):
            at, count = time.perf_counter(), min(10, self.config.num_steps - done)
            for _ in range(count):
                state, metrics = self.plan.step(state, self.batch())
            curve.append((done + count, float(metrics['nll'])))  # waits for the device
            seconds.append((time.perf_counter() - at) / count)
        size, middle = (self.config.data.batch_size, self.config.data.seq_len), statistics.median(seconds)
        task = self.plan.task
        flops = task.train_flops(*size) if hasattr(task, 'train_flops') else roofline.train_flops(task.cfg, *size)
        return self.plan.tree(state), {
            'parameters': sum(a.size for a in state.params.values()), 'steps': self.config.num_steps,
            'tokens': self.config.num_steps * math.prod(size), 'first_step_s': first_s,
            'train_s': self.config.num_steps * middle, 'step_ms': [1e3 * s for s in seconds],
            'tokens_per_s': math.prod(size) / middle, 'mfu_published': flops / middle / published,
            'train_nll': curve[-1][1], 'curve': curve}

    def evaluate(self, params: dict, rows: dict) -> dict[str, float]:
        """Means by weight over the whole batches there are."""
        size, sums, weight, count = self.config.data.batch_size, {}, 0.0, 0
        for first in range(0, max(1, len(rows['tokens']) // size) * size, size):
            index = np.arange(first, first + size) % len(rows['tokens'])
            batch = place_batch({k: v[index] for k, v in rows.items()}, self.plan.batch, 0)
            found = {k: float(v) for k, v in self.plan.evaluate(params, batch).items()}
            mine = found.pop('weight')
            weight, count = weight + mine, count + int(rows['bytes'][index].sum())
            sums = {k: sums.get(k, 0.0) + mine * v for k, v in found.items()}
        means = {k: v / weight for k, v in sums.items()}
        return means | {'perplexity': math.exp(min(means['nll'], 700.0)), 'held_out_tokens': weight,
                        'bits_per_byte': means['nll'] * weight / math.log(2) / count}


def one(model: str, seed: int, out: pathlib.Path, published: float) -> dict:
    config = configure(model, seed)
    with jax.set_mesh(make_mesh()):
        made = plan(config, make_mesh())
        vocab = made.task.cfg.vocab_size
        rows = read_rows(ROWS.value, config, vocab)
        run = Run(config, made, rows)
        params, found = run.train(published)
        found |= run.evaluate(params, read_rows(HELD_OUT.value, config, vocab) if HELD_OUT.value else rows)
    if model in SAVE.value and str(seed) == SEEDS.value[0]:
        parts = {name: params[name] for name in ('base', 'stagformer') if name in params}
        found['files'] = save(model, parts, out)
    return found


def save(name: str, params: dict, out: pathlib.Path) -> list[str]:
    """float16 leaves in pieces: {'base/embed/tokens:0': rows from 0 on, ...}; returns the files' names."""
    pieces, limit = [{}], PIECE_BYTES.value
    room = limit
    for path, leaf in flatten(jax.tree.map(lambda a: np.asarray(a, np.float16), params)).items():
        each = max(1, limit * len(leaf) // leaf.nbytes)
        for first in range(0, len(leaf), each):
            part = np.ascontiguousarray(leaf[first:first + each])
            if part.nbytes > room and pieces[-1]:
                pieces, room = [*pieces, {}], limit
            pieces[-1][f'{path}:{first}'], room = part, room - part.nbytes
    files = [f'{name}.{i}.safetensors' for i in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        save_file(piece, out / file)
    return files


def decode_speed(trained: bool) -> dict[str, dict]:
    shapes = {name: preset(stagformer_speed.SHAPES[name]) for name in SHAPES.value}
    if TINY.value:
        shapes = {'tiny': stagformer_speed.tiny()}
    elif trained and not HEAL.value:
        config = stagformer.get_config(f'{SCALE.value}/dense')
        shapes = {SCALE.value: plan(config, make_mesh(), load=False).task.cfg} | shapes
    found = {}
    for name, cfg in shapes.items():
        contexts = sorted({min(int(n), cfg.max_seq_len - 64) for n in CONTEXTS.value})
        try:
            found[name] = stagformer_speed.measure(cfg, 'bfloat16', contexts, 2 if TINY.value else REPEATS.value,
                                                   FORMS.value, 1 << 20 if TINY.value else 256 << 20)
        except Exception as error:
            found[name] = {'skipped': f'{type(error).__name__}: {str(error)[:300]}'}
        print(f'\n{name}\n\n{found[name].get("skipped") or stagformer_speed.table(found[name])}', flush=True)
    return found


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    models = [name for name in MODELS.value if name]
    published, source = peak.peak_flops('float32' if TINY.value else 'bfloat16')
    report = {**provenance.collect(configure(models[0], 0) if models else {}), 'runs': [],
              'peak_flops': {'value': published, 'source': source},
              'text': ROWS.value or 'random tokens: the losses say nothing',
              'held_out': HELD_OUT.value or 'the same rows'}
    for seed in map(int, SEEDS.value):
        for model in models:
            row = {'scale': scale(), 'model': model, 'seed': seed}
            try:
                row |= one(model, seed, out, published)
            except Exception as error:
                row['error'] = f'{type(error).__name__}: {str(error)[:300]}'
            else:
                brief = {k: v for k, v in row.items() if k not in ('step_ms', 'curve')}
                with (out / 'rows.jsonl').open('a') as sink:
                    sink.write(json.dumps(brief) + '\n')
            report['runs'].append(row)
            write(report, out)
            print(json.dumps({k: v for k, v in row.items() if k not in ('step_ms', 'curve')}), flush=True)
    report['decoding'] = decode_speed(bool(models))
    write(report, out)
    if models and not any('error' not in row for row in report['runs']):
        raise SystemExit('no model ran')


def write(report: dict, out: pathlib.Path) -> None:
    (out / 'train_stagformer.json').write_text(json.dumps(report, indent=2))


if __name__ == '__main__':
    app.run(main)
