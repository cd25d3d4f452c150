"""CP heads by rank on frozen SmolLM2-135M: training speed, held-out loss, accepted drafts, speed-up. One NVIDIA GPU.

    python scripts/gpu/train_tensorhead.py --base=FILE.gguf --rows=rows.npz --held_out=held_out.npz \\
        --prompts=prompts.npz --draft_ids=ids.npy --heads=r1,r2,r4 --steps=1500 --out=$OUT
    python scripts/gpu/train_tensorhead.py --tiny --out=/tmp/tiny               # the same path on a CPU, seconds

rows, held_out, prompts: scripts/gpu/pack_text.py; draft_ids: scripts/draft_vocabulary.py. The base is
configs/tensorhead_smollm2.py's own unless --base names a file. Its hidden states are computed once, as
`headway-train` does for a cached task; then each head of --heads trains for the same --steps, and all of them decode
the same prompts, in turns with plain decoding. Writes train_tensorhead.json, again after each part, and every head's
parameters in safetensors pieces under 15 MB; a part's name says where its rows start along the leaf's first axis.
MFU: the model FLOPs of a step (HeadTask.train_flops: trunk not run, so not counted) over the published dense peak.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from backbone import formats, layout
from backbone.formats.tensors import flatten
from backbone.mesh import make_mesh
from backbone.model import PlainTarget
from backbone.sampling import GREEDY, Sampling
from configs import tensorhead_smollm2
from harness import components, decode, peak, provenance
from harness.baselines import Autoregressive
from harness.train_step import narrow, place_batch, plan

BASE = flags.DEFINE_string('base', '', 'The frozen model: a file or folder (docs/checkpoints.md).')
ROWS = flags.DEFINE_string('rows', '', 'Packed rows; without them random tokens, and no claim about any loss.')
HELD_OUT = flags.DEFINE_string('held_out', '', 'Packed rows to measure the loss on; default: those trained on.')
PROMPTS = flags.DEFINE_string('prompts', '', 'Packed prompts; default: the starts of rows.')
DRAFT_IDS = flags.DEFINE_string('draft_ids', '', 'The draft vocabulary; default: the first ids.')
WHICH = flags.DEFINE_list('heads', '', 'Which to train, by name; default all.')
STEPS = flags.DEFINE_integer('steps', 0, 'Steps of each head; 0: what the config says.')
NEW = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens each prompt is continued by.')
BATCH = flags.DEFINE_integer('batch', 16, 'Prompts decoded at once where drafts are counted.')
TIMED = flags.DEFINE_integer('timed', 8, 'Prompts decoded one by one where time is taken.')
REPEATS = flags.DEFINE_integer('repeats', 5, 'How often each decodes them, in turns.')
GIB = flags.DEFINE_float('logits_gib', 8.0, "One chunk's logits at most; a larger step is split into microbatches.")
PIECE_BYTES = flags.DEFINE_integer('piece_bytes', 14_000_000, 'Of one file with parameters, about.')
OUT = flags.DEFINE_string('out', 'out/gpu', 'Folder for the results.')
TINY = flags.DEFINE_bool('tiny', False, 'A random model of 2 layers on bytes, for trying this script without a GPU.')

HEADS = {'r1': (1, 4), 'r2': (2, 4), 'r4': (4, 4), 'r8': (8, 4), 'r16': (16, 4), 'r8n2': (8, 2), 'r8n8': (8, 8)}
TINY_HEADS = {'r1': (1, 3), 'r2': (2, 3)}  # rank, horizon


def configure(rank: int, horizon: int) -> object:
    config = tensorhead_smollm2.get_config('tiny' if TINY.value else 'gpu')
    kwargs = config.task.kwargs
    if TINY.value:
        kwargs.update({'frozen': True, 'cached': True, 'positions': 0, 'chunk': 100})
        config.num_steps = 20
    else:
        kwargs.update({'base': BASE.value or kwargs.base, 'draft_ids': DRAFT_IDS.value})
    kwargs.head.update({'rank': rank, 'horizon': horizon})
    config.num_steps = STEPS.value or config.num_steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.num_steps // 4)
    logits = 4 * config.data.batch_size * config.data.seq_len * rank * horizon * kwargs.chunk / 2**30
    while logits / config.optimizer.accumulate > GIB.value and config.optimizer.accumulate < config.data.batch_size:
        config.optimizer.accumulate *= 2
    return config


def read_rows(path: str, task, config) -> dict[str, np.ndarray]:
    if path:
        with np.load(path) as found:
            return {k: found[k] for k in found.files}
    count, size = 2 * config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, task.cfg.vocab_size, (count, size + 1))
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': np.ones((count, size), np.int32),
            'positions': np.arange(size)[None].repeat(count, 0), 'weights': np.ones((count, size), np.float32)}


def read_prompts(rows) -> list[list[int]]:
    if not PROMPTS.value:
        return [row[:9].tolist() for row in rows['tokens'][:max(TIMED.value, BATCH.value)]]
    with np.load(PROMPTS.value) as found:
        return [ids[:n].tolist() for ids, n in zip(found['prompts'], found['lengths'], strict=True)]


class Rows:
    """Rows in their packed order, batch after batch, with the base's hidden states."""

    def __init__(self, rows, task, base, config):
        self.rows, self.size = rows, config.data.batch_size
        dtype = jnp.dtype(config.compute_dtype)
        run = jax.jit(lambda base, batch: task.features(base, batch)['hidden'].astype(jnp.bfloat16))
        base = narrow(base, dtype)
        count, made = len(rows['tokens']), []
        for first in range(0, count, self.size):
            index = np.minimum(np.arange(first, first + self.size), count - 1)
            made.append(np.asarray(run(base, {k: v[index].astype(np.int32) for k, v in rows.items()})))
        self.rows['hidden'] = np.concatenate(made)[:count]

    def __len__(self):
        return len(self.rows['tokens'])

    def batch(self, number: int) -> dict[str, np.ndarray]:
        index = np.arange(number * self.size, (number + 1) * self.size) % len(self)
        return {k: v[index] for k, v in self.rows.items()}


def train(config, step, state, rows: Rows, held_out: Rows, published: float, part: str = '') -> tuple[dict, dict]:
    """(the drafter's parameters, or that part of the tree, what its training came to)."""
    begin = time.perf_counter()
    state, metrics = step.step(state, place_batch(rows.batch(0), step.batch, 0))
    curve, seconds, compile_s = [(1, float(metrics['loss']))], [], time.perf_counter() - begin
    for done in range(1, config.num_steps, 10):
        at = time.perf_counter()
        count = min(10, config.num_steps - done)
        for number in range(done, done + count):
            state, metrics = step.step(state, place_batch(rows.batch(number), step.batch, 0))
        curve.append((done + count, float(metrics['loss'])))  # waits for the device
        seconds.append((time.perf_counter() - at) / count)
    tokens, middle = config.data.batch_size * config.data.seq_len, statistics.median(seconds)
    params = step.tree(state)
    return params[part or step.task.drafter()['params']], {
        'parameters': sum(a.size for a in state.params.values()), 'steps': config.num_steps,
        'accumulate': config.optimizer.accumulate, 'first_step_s': compile_s, 'train_s': time.perf_counter() - begin,
        'step_ms': [1e3 * s for s in seconds], 'tokens_per_s': tokens / middle,
        'mfu_published': step.task.train_flops(config.data.batch_size, config.data.seq_len) / middle / published,
        'curve': curve, 'held_out': evaluate(step, params, held_out)}


def evaluate(step, params, rows: Rows) -> dict[str, float]:
    """The task's own metrics (nats), means by weight over the whole batches there are."""
    sums, weight = {}, 0.0
    for number in range(max(1, len(rows) // rows.size)):
        found = {k: float(v) for k, v in step.evaluate(params, place_batch(rows.batch(number), step.batch, 0)).items()}
        mine = found.pop('weight')
        weight += mine
        sums = {k: sums.get(k, 0.0) + mine * v for k, v in found.items()}
    return {k: v / weight for k, v in sums.items()} | {'tokens': weight}


def save(name: str, head: dict, out: pathlib.Path) -> list[str]:
    """The head in pieces: {'factors/down:0': rows from 0 on, ...}; returns the files' names."""
    pieces, limit = [{}], PIECE_BYTES.value
    room = limit
    for path, leaf in flatten(jax.tree.map(np.asarray, head)).items():
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


# --- decoding -------------------------------------------------------------------------------------------------


class Method:
    """A drafter with its parameters, and how fast it was."""

    def __init__(self, target, drafter, params, prompts, stops):
        self.prompts, self.times, self.texts = prompts, [], None
        self.run = lambda group, sampling=GREEDY, seed=0: decode.generate(
            target, drafter, params, group, max_new_tokens=NEW.value, sampling=sampling, stop_tokens=stops, seed=seed)

    def accepted(self, sampling) -> dict:
        """Drafts kept a round, without the bonus token, over all prompts."""
        size, kept, drafted = BATCH.value, 0, 0
        for first in range(0, len(self.prompts) - size + 1, size):
            found = self.run(self.prompts[first:first + size], sampling, first)
            kept, drafted = kept + found.accepted_hist, drafted + found.drafted_hist
        at_least = lambda counts: counts[::-1].cumsum()[::-1][1:]
        return {'accepted': float((kept * np.arange(len(kept))).sum() / kept.sum()), 'rounds': int(kept.sum()),
                'by_position': (at_least(kept) / np.maximum(at_least(drafted), 1)).tolist()}

    def turn(self, timed) -> None:
        """Decodes the prompts one by one, greedily."""
        found = [self.run([prompt]) for prompt in timed]
        self.texts = [one.tokens[0] for one in found]
        made = sum(len(text) - 1 for text in self.texts)  # the first token belongs to the prompt's pass
        spent, rounds = sum(one.decode_s for one in found), sum(int(one.rounds[0]) for one in found)
        self.times.append((made / spent, 1e3 * spent / rounds))


class Bench:
    """Plain decoding of one base, and trained drafters beside it."""

    def __init__(self, cfg, base, prompts, stops):
        self.dtype = 'float32' if TINY.value else 'bfloat16'
        self.base, self.prompts, self.stops = layout.pack(base, self.dtype), prompts, stops
        self.target = PlainTarget(cfg, self.dtype, stacked=False)
        self.plain = Method(self.target, Autoregressive(), {'base': self.base}, prompts, stops)

    def method(self, task, head) -> Method:
        spec = task.drafter()
        drafter = components.build(spec['factory'], spec['kwargs'], {'cfg': task.cfg}, spec['factory'])
        params = {'base': self.base, spec['params']: drafter.ready(head, self.base, jnp.dtype(self.dtype))}
        return Method(self.target, drafter, params, self.prompts, self.stops)

    def in_turns(self, heads: dict[str, Method]) -> dict[str, dict]:
        """Speeds of all on the prompts of the commonest padded length, after a turn that compiles."""
        lengths = [decode.bucket(len(prompt)) for prompt in self.prompts]
        common = max(set(lengths), key=lengths.count)
        timed = [p for p, n in zip(self.prompts, lengths, strict=True) if n == common][:TIMED.value]
        everyone = [self.plain, *heads.values()]
        for turn in range(-1, REPEATS.value):
            for method in everyone[turn % len(everyone):] + everyone[:turn % len(everyone)]:
                method.turn(timed)
                if turn < 0:
                    method.times.clear()
        return {name: self.figures(method) for name, method in {'plain': self.plain, **heads}.items()}

    def figures(self, method: Method) -> dict:
        ratios = [t / p for (t, _), (p, _) in zip(method.times, self.plain.times, strict=True)]
        same = [a == b for a, b in zip(method.texts, self.plain.texts, strict=True)]
        return {'tokens_per_s': [t for t, _ in method.times], 'round_ms': [ms for _, ms in method.times],
                'speedup': statistics.median(ratios), 'speedups': ratios, 'same_text': sum(same) / len(same)}


def main(argv: list[str]) -> None:
    every = TINY_HEADS if TINY.value else HEADS
    compare('train_tensorhead', {name: every[name] for name in WHICH.value or every},
            lambda shape: configure(*shape), lambda shape: dict(zip(('rank', 'horizon'), shape, strict=True)))


def compare(title: str, chosen: dict, configure, describe) -> None:
    """Trains what `configure(chosen[name])` says, one after the other, and decodes with all; writes TITLE.json."""
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    report, methods, rows = {}, {}, None
    for name, shape in chosen.items():
        config = configure(shape)
        with jax.set_mesh(make_mesh()):
            step = plan(config, make_mesh())
            state = step.init()
            if rows is None:  # the base is the same for all: what it makes of the rows, and plain decoding
                base = jax.tree.map(jnp.copy, step.tree(state)['base'])  # a step gives its state away
                published, source = peak.peak_flops(config.compute_dtype)
                begin = time.perf_counter()
                rows = Rows(read_rows(ROWS.value, step.task, config), step.task, base, config)
                held_out = rows
                if HELD_OUT.value:
                    held_out = Rows(read_rows(HELD_OUT.value, step.task, config), step.task, base, config)
                report = {**provenance.collect(config), 'peak_flops': {'value': published, 'source': source},
                          'text': ROWS.value or 'random tokens: the losses say nothing', 'rows': len(rows),
                          'held_out': HELD_OUT.value or 'the same rows',
                          'features_s': time.perf_counter() - begin, 'heads': {}}
                bench = Bench(step.task.cfg, base, read_prompts(rows.rows), stop_tokens(config))
            head, found = train(config, step, state, rows, held_out, published)
        found['files'] = save(name, head, out)
        methods[name] = bench.method(step.task, head)
        found |= {'greedy': methods[name].accepted(GREEDY), 'sampled': methods[name].accepted(Sampling(1.0))}
        report['heads'][name] = describe(shape) | found
        write_json(report, out / f'{title}.json')
        print(name, json.dumps({k: v for k, v in found.items() if k not in ('step_ms', 'curve')}), flush=True)
    report['decoding'] = {'dtype': bench.dtype, 'batch': 1, 'temperature': 0, **bench.in_turns(methods)}
    write_json(report, out / f'{title}.json')
    print(json.dumps(report['decoding']))


def write_json(report: dict, path: pathlib.Path) -> None:
    path.write_text(json.dumps(report, indent=2))


def stop_tokens(config) -> tuple[int, ...]:
    if TINY.value:
        return ()
    tokenizer = formats.load(config.task.kwargs.base).tokenizer
    return () if tokenizer is None else tuple(tokenizer.eos_ids)


if __name__ == '__main__':
    app.run(main)
