"""Plain decoding beside other stacks on the same weights, prompts and token counts, by turns, as ratios.

    make peers
    python -m harness.peers --peers_python=.venv-peers/bin/python --workdir=out/peers

Each stack runs in a process of its own (scripts/peers/worker.py), loads once, and decodes when it is its turn. A stack
that is not installed is left out by name.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from backbone.errors import HeadwayError, RequestError
from harness.launch import common
from harness.results import Spread

SCHEMA = 'headway.peers/1'
_WORKER = pathlib.Path(__file__).resolve().parent.parent / 'scripts' / 'peers' / 'worker.py'
SETTLE_S = 0.3  # threads of the stack that just ran spin a little while; nobody else is timed meanwhile

PEERS_PYTHON = common.string_flag('peers_python', '.venv-peers/bin/python', 'The interpreter of the other stacks.')
WORKDIR = common.string_flag('workdir', 'out/peers', 'Folder for peers.json.')
MODEL = common.string_flag('model', 'smollm2-135m', 'Catalogue key or path.')
PROMPTS = common.integer_flag('prompts', 2, 'MT-Bench questions to decode.')
NEW_TOKENS = common.integer_flag('max_new_tokens', 64, 'New tokens a prompt; no stack stops earlier.')
REPEATS = common.integer_flag('repeats', 7, 'Interleaved repeats.')


class PeerError(HeadwayError):
    """A stack could not be loaded or failed to decode."""


class Worker:
    """A stack in its own process. ask() sends one request and waits for its answer."""

    def __init__(self, command: list[str]):
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=subprocess.DEVNULL, text=True, bufsize=1)
        except OSError as error:
            raise PeerError(f'cannot start {command[0]}: {error.strerror}; make peers sets it up') from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """Errors: PeerError with the stack's own line, or when its process has gone."""
        try:
            self._process.stdin.write(json.dumps(request) + '\n')
            line = self._process.stdout.readline()
        except OSError as error:
            raise PeerError(f'the worker has gone: {error.strerror}') from error
        if not line:
            raise PeerError(f'the worker ended with code {self._process.wait()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise PeerError(answer['error'])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclasses.dataclass
class Engine:
    """A stack at one dtype. decode(prompt ids) -> (new ids, prefill seconds, decode seconds)."""

    name: str
    dtype: str
    version: str
    decode: Callable[[list[int]], tuple[list[int], float, float]]
    outputs: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    decode_s: list[float] = dataclasses.field(default_factory=list)
    prefill_s: list[float] = dataclasses.field(default_factory=list)
    floor_s: list[float] = dataclasses.field(default_factory=list)  # float32 floor a token, measured beside


def ours(cfg: Any, base: Any, dtype: str, count: int) -> Engine:
    """Headway's plain decoding in its decode layout."""
    import jax

    from backbone import layout
    from backbone.model import PlainTarget
    from harness import decode
    from harness.baselines import Autoregressive

    params = {'base': layout.pack(base, dtype)}
    target = PlainTarget(cfg, cache_dtype=dtype, stacked=False)

    def run(prompt):
        out = decode.generate(target, Autoregressive(), params, [prompt], max_new_tokens=count)
        return out.tokens[0], out.prefill_s, out.decode_s

    return Engine('headway', dtype, f'jax {jax.__version__}', run)


def peer(worker: Worker, engine: str, dtype: str, path: pathlib.Path, threads: int, count: int) -> Engine:
    """A stack behind a worker. Errors: PeerError."""
    version = worker.ask(do='load', engine=engine, path=str(path), dtype=dtype, threads=threads)['version']

    def run(prompt):
        out = worker.ask(do='decode', prompt=list(prompt), max_new_tokens=count)
        return out['tokens'], out['prefill_s'], out['decode_s']

    return Engine(engine, dtype, version, run)


def interleave(engines: list[Engine], prompts: list[list[int]], repeats: int, floor: Callable[[], float],
               tick: Callable[[str], None], settle_s: float = SETTLE_S) -> None:
    """Decodes every prompt with every engine, `repeats` times in rotated order, after one untimed round.

    floor() -> seconds to read the float32 weights once, measured right beside each engine.
    """
    for engine in engines:
        tick(f'warming up {engine.name} {engine.dtype}')
        for i, prompt in enumerate(prompts):
            engine.outputs[i] = engine.decode(prompt)[0]
    for repeat in range(repeats):
        first = repeat % len(engines)
        for engine in engines[first:] + engines[:first]:
            tick(f'repeat {repeat + 1} of {repeats}: {engine.name} {engine.dtype}')
            time.sleep(settle_s)
            before = floor()
            runs = [engine.decode(prompt) for prompt in prompts]
            engine.floor_s.append((before + floor()) / 2)
            engine.prefill_s.append(sum(r[1] for r in runs))
            engine.decode_s.append(sum(r[2] for r in runs))


def rows(engines: list[Engine]) -> list[dict[str, Any]]:
    """One a engine. `ratio`: its time over Headway's float32 time in the same repeat; `ratio_same_dtype` over
    Headway's time at its own dtype, where there is one. `agreement`: share of tokens before the first that differs
    from Headway's float32 output."""
    reference = {e.dtype: e for e in engines if e.name == 'headway'}
    exact = reference['float32']
    made = []
    for engine in engines:
        steps = sum(len(out) - 1 for out in engine.outputs.values())  # the first token belongs to prefill
        same = total = 0
        for i, out in engine.outputs.items():
            same += next((k for k, (a, b) in enumerate(zip(out, exact.outputs[i], strict=False)) if a != b), len(out))
            total += len(out)
        own = reference.get(engine.dtype)
        ms = [1e3 * s / steps for s in engine.decode_s]
        made.append({
            'engine': engine.name, 'dtype': engine.dtype, 'version': engine.version,
            'tokens_per_s': 1e3 / statistics.median(ms), 'ms_per_token': dataclasses.asdict(Spread.of(ms)),
            'over_floor': statistics.median(m / 1e3 / f for m, f in zip(ms, engine.floor_s, strict=True)),
            'ratio': _ratio(engine, exact), 'ratio_same_dtype': _ratio(engine, own) if own else None,
            'prefill_ms': 1e3 * statistics.median(engine.prefill_s) / len(engine.outputs),
            'agreement': same / total})
    return made


def _ratio(engine: Engine, other: Engine) -> float:
    return statistics.median(a / b for a, b in zip(engine.decode_s, other.decode_s, strict=True))


def table(made: list[dict[str, Any]], skipped: list[str]) -> str:
    heads = ('engine', 'dtype', 'tokens/s', 'ms/token', 'over float32 floor', 'time / ours float32',
             'time / ours same dtype', 'agreement %')
    cells = [heads] + [(r['engine'], r['dtype'], f'{r["tokens_per_s"]:.1f}', f'{r["ms_per_token"]["median"]:.2f}',
                        f'{r["over_floor"]:.2f}', f'{r["ratio"]:.2f}',
                        '–' if r['ratio_same_dtype'] is None else f'{r["ratio_same_dtype"]:.2f}',
                        f'{100 * r["agreement"]:.0f}') for r in made]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['  '.join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]
    return '\n'.join([*lines, *skipped])


def _load_peers(python: str, folder: pathlib.Path, loaded: Any, threads: int, count: int, workers: list[Worker],
                tick: Callable[[str], None]) -> tuple[list[Engine], list[str]]:
    """Writes the model in the peers' own forms and starts them. Returns engines, and a line for each one left out."""
    from backbone import formats

    hf, f32, q8, bf16 = folder / 'hf', folder / 'model-f32.gguf', folder / 'model-q8_0.gguf', folder / 'model-bf16.gguf'
    tick('writing the model in the peers\' forms')
    formats.save(loaded, hf, 'hf', 'f32')
    formats.save(loaded, f32, 'gguf', 'f32')
    formats.save(loaded, q8, 'gguf', 'q8_0')
    engines, skipped = [], []
    for engine, dtype, path in (('transformers', 'float32', hf), ('transformers', 'bfloat16', hf),
                                ('llama.cpp', 'float32', f32), ('llama.cpp', 'bfloat16', bf16),
                                ('llama.cpp', 'q8_0', q8)):
        tick(f'loading {engine} {dtype}')
        worker = Worker([python, str(_WORKER)])
        workers.append(worker)
        try:
            if path == bf16:
                worker.ask(do='convert', source=str(f32), target=str(bf16), ftype='BF16')
            engines.append(peer(worker, engine, dtype, path, threads, count))
        except PeerError as error:
            skipped.append(f'left out: {engine} {dtype} ({error})')
    return engines, skipped


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise RequestError(f'unexpected argument {argv[1]!r}')
    from harness import compilation, models, prompts, provenance, roofline
    from harness.bandwidth import Meter, cpu_threads

    compilation.use_cache()
    loaded = models.load(MODEL.value)
    loaded.check_plain()
    questions = prompts.questions('mt_bench', PROMPTS.value, loaded.tokenizer, min_tokens=33, max_tokens=64)
    threads, count, workers = cpu_threads(), NEW_TOKENS.value, []
    workdir = pathlib.Path(WORKDIR.value)
    with tempfile.TemporaryDirectory() as scratch, tqdm(bar_format='{elapsed} {desc}') as bar:
        def tick(text):
            bar.set_description_str(text)
            bar.refresh()
        try:
            others, skipped = _load_peers(PEERS_PYTHON.value, pathlib.Path(scratch), loaded, threads, count, workers,
                                          tick)
            engines = [ours(loaded.config, loaded.params, d, count) for d in ('float32', 'bfloat16')] + others
            meter = Meter({'float32': int(roofline.step_cost(loaded.config).weight_bytes)}, threads=threads)

            def floor():
                passes = [meter.measure('float32') for _ in range(3)]
                return meter.weight_bytes['float32'] / statistics.median(p.bytes_per_s for p in passes)

            interleave(engines, [list(q.ids) for q in questions], REPEATS.value, floor, tick)
        finally:
            for worker in workers:
                worker.close()
    made = rows(engines)
    config = {'model': MODEL.value, 'prompts': [q.name for q in questions], 'max_new_tokens': count,
              'repeats': REPEATS.value, 'threads': threads, 'floor': meter.source}
    common.write_json(workdir / 'peers.json', {'schema': SCHEMA, **provenance.collect(config), 'rows': made,
                                               'skipped': skipped})
    print(table(made, skipped))
    print(f'\nwrote {workdir / "peers.json"}')


def cli() -> None:
    common.run(main)


if __name__ == '__main__':
    cli()
