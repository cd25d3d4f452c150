"""Self-generation: a model answers prompts in bulk, and its answers are the training text of later methods.

    session = generation.Session.load('smollm2-135m', 'none', [], 'float32', chat=True)
    run(session, prompts.texts('catalogue:gsm8k'), 'out/answers', Plan(sampling=Sampling(0.8), seed=1))

What row (prompt i, sample j) draws depends on (seed, i, j) alone: its key is folded from them, and every row of a
batch draws by its own key. Batches are made of prompts of one padded length, so that neither the cache's size nor the
padding depends on which prompts come along. What is left is the arithmetic: a device may round a matrix product
differently for another batch size, so an answer may differ there once two tokens are nearly as likely. The same batch
size gives the same bits, wherever a run was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from backbone.errors import RequestError, TokenizerError
from backbone.sampling import GREEDY, Sampling
from harness import decode, provenance
from harness.generation import Session
from harness.partial import RECORD, Partial, beside, check, clear

SCHEMA = 'headway.selfgen/1'
FORMS = ('jsonl', 'tfds')
NAME, VERSION, SPLIT = 'self_generated', '1.0.0', 'train'  # of the TFDS dataset
SHARD_ROWS = 50_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """form: 'jsonl' or 'tfds'. batch_size may change between two starts; everything else decides the rows.

    Errors: RequestError names what is outside its range.
    """

    form: str = 'tfds'
    samples_per_prompt: int = 1
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        if self.form not in FORMS:
            raise RequestError(f'format {self.form!r} is not one of {", ".join(FORMS)}')
        for name in ('samples_per_prompt', 'max_new_tokens', 'batch_size'):
            if getattr(self, name) < 1:
                raise RequestError(f'{name} must be at least 1, got {getattr(self, name)}')
        if self.sampling.greedy and self.samples_per_prompt > 1:
            raise RequestError(f'samples_per_prompt is {self.samples_per_prompt} at temperature 0: '
                               'every answer to a prompt would be the same')


def check_flags(plan: Plan, batch_file: str | None, out: str | None) -> None:
    """Errors: RequestError where a flag asks for what only --batch_file with --out can give."""
    if out is not None and batch_file is None:
        raise RequestError('--out needs --batch_file')
    if out is None and (plan.form != 'jsonl' or plan.samples_per_prompt > 1):
        raise RequestError('--format=tfds and --samples_per_prompt need --out')


def say(message: str) -> None:
    print(message, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Job:
    """One answer to make. index: of the prompt's first occurrence in what was given."""

    index: int
    sample: int
    prompt: str
    ids: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.sample


@dataclasses.dataclass(frozen=True)
class Summary:
    """rows: in the output. same_prompts, same_answers: left out as duplicates. tokens, seconds: of this start."""

    rows: int
    same_prompts: int
    same_answers: int
    unfinished: int
    tokens: int = 0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        speed = f': {self.tokens / self.seconds:.1f} tokens/s, compilation included' if self.tokens else ''
        return [f'{self.rows} rows, {self.unfinished} of them cut at max_new_tokens; left out: {self.same_prompts} '
                f'repeated prompts, {self.same_answers} repeated answers',
                f'{self.tokens} new tokens in {self.seconds:.1f} s{speed}']


def run(session: Session, texts: Sequence[str], out: str | Path, plan: Plan, *, source: str = '', report=say,
        progress: bool = True) -> Summary:
    """Makes every answer that is not there yet and then the output; does nothing where that is complete.

    texts: prompts; a repeated one is answered once. source: where they are from, for the record.
    Errors: RequestError (nothing was made; or the disk is full, what was made is kept), FingerprintMismatch where
    rows or output were made with other settings.
    """
    out, jobs = Path(out), make_jobs(session, texts, plan)
    settings = deciding(session, jobs, plan)
    if out.exists():
        if not beside(out).exists():
            raise RequestError(f'{out} exists and was not made by this command: give another --out, or remove it')
        counts = check(beside(out), settings, out)['counts']
        clear(out)
        report(f'{out} is complete already')
        return Summary(**counts)
    begin, made = time.perf_counter(), 0
    with Partial(out, settings, report) as partial:
        there = {(row['index'], row['sample']) for row in partial.rows}
        with tqdm.tqdm(total=len(jobs), initial=len(there), desc='answers', unit='row',
                       disable=None if progress else True) as bar:
            for batch, size in batches(jobs, plan.batch_size, session.target.max_seq_len):
                todo = [job for job in batch if job.key not in there]
                if todo:
                    start = time.perf_counter()
                    rows = answer(session, todo, size, plan)
                    partial.append(rows)
                    count = sum(len(row['tokens']) for row in rows)
                    made += count
                    bar.set_postfix({'tokens/s': f'{count / (time.perf_counter() - start):.1f}'}, refresh=False)
                    bar.update(len(rows))
        seconds = time.perf_counter() - begin
        rows, same = assemble(session.tokenizer, jobs, partial.rows)
        counts = {'rows': len(rows), 'same_prompts': len(texts) - len(jobs) // plan.samples_per_prompt,
                  'same_answers': same, 'unfinished': sum(not row['finished'] for row in rows)}
        record = describe(session, settings, counts, plan, source)
        if plan.form == 'tfds':
            partial.finish(lambda path: write_tfds(path, rows, record))
        else:
            partial.finish(lambda path: write_jsonl(path, rows), record)
    summary = Summary(**counts, tokens=made, seconds=seconds)
    for line in summary.lines():
        report(line)
    return summary


def make_jobs(session: Session, texts: Sequence[str], plan: Plan) -> list[Job]:
    """Every (distinct prompt, sample), in order. Errors: RequestError names the prompt that does not fit."""
    jobs, seen = [], set()
    for index, text in enumerate(texts):
        if text in seen:
            continue
        seen.add(text)
        try:
            ids = tuple(session.encode(text))
            decode.check_request(session.target, [ids], plan.max_new_tokens)
        except (RequestError, TokenizerError) as error:
            raise type(error)(f'prompt number {index + 1} of {len(texts)}: '
                              f'{str(error).removeprefix("prompt 0: ")}') from None
        jobs += [Job(index, sample, text, ids) for sample in range(plan.samples_per_prompt)]
    return jobs


def deciding(session: Session, jobs: Sequence[Job], plan: Plan) -> dict[str, Any]:
    """The settings under which rows may stand in one output."""
    sha = hashlib.sha256(json.dumps([[job.prompt, job.ids] for job in jobs if job.sample == 0]).encode())
    return {'schema': SCHEMA, 'base_hash': session.base_hash, 'prompts': sha.hexdigest(), 'chat': session.chat,
            'dtype': session.target.cache_dtype, 'drafter': _name(session.drafter), 'format': plan.form,
            'samples_per_prompt': plan.samples_per_prompt, 'max_new_tokens': plan.max_new_tokens, 'seed': plan.seed,
            **dataclasses.asdict(plan.sampling)}


def _name(drafter: Any) -> str:
    """Its class and its plain settings; what it takes from the model, base_hash stands for."""
    values = ', '.join(f'{k}={v}' for k, v in vars(drafter).items() if isinstance(v, (int, float, str)))
    return f'{type(drafter).__qualname__}({values})'


def batches(jobs: Sequence[Job], batch_size: int, max_seq_len: int) -> Iterator[tuple[list[Job], int]]:
    """(jobs, rows of the call), each of one padded length, the longest first: what does not fit shows at once.

    A function of the jobs and batch_size alone, so that a second start has the batches of the first.
    """
    buckets: dict[int, list[Job]] = {}
    for job in jobs:
        buckets.setdefault(min(decode.bucket(len(job.ids)), max_seq_len), []).append(job)
    for length in sorted(buckets, reverse=True):
        group = buckets[length]
        size = -(-len(group) // -(-len(group) // batch_size))  # even calls: one shape a length, and few idle rows
        for first in range(0, len(group), size):
            yield group[first:first + size], size


def answer(session: Session, jobs: Sequence[Job], size: int, plan: Plan) -> list[dict[str, Any]]:
    """One row a job. size: rows of the call; the last job fills up what is missing."""
    stops = session.tokenizer.eos_ids
    padded = [*jobs, *jobs[-1:] * (size - len(jobs))]
    made = decode.generate(session.target, session.drafter, session.params, [job.ids for job in padded],
                           max_new_tokens=plan.max_new_tokens, sampling=plan.sampling, stop_tokens=stops,
                           seed=row_keys(plan.seed, padded))
    return [{'index': job.index, 'sample': job.sample, 'tokens': ids, 'finished': ids[-1] in stops}
            for job, ids in zip(jobs, made.tokens, strict=False)]


def row_keys(seed: int, jobs: Sequence[Job]) -> jax.Array:
    """One key a row, from (seed, prompt index, sample index)."""
    fold = jax.vmap(jax.random.fold_in)
    start = jnp.broadcast_to(jax.random.key(seed), (len(jobs),))
    return fold(fold(start, jnp.array([job.index for job in jobs])), jnp.array([job.sample for job in jobs]))


def assemble(tokenizer: Any, jobs: Sequence[Job], rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """(rows of the output in the order of the jobs, how many were left out as repeated answers to their prompt)."""
    made = {(row['index'], row['sample']): row for row in rows}
    found, seen = [], set()
    for job in jobs:
        row = made[job.key]
        text = tokenizer.decode_bytes(row['tokens'], skip_special=True).decode('utf-8', errors='replace')
        if (job.index, text) not in seen:
            seen.add((job.index, text))
            found.append({'prompt': job.prompt, 'text': text, 'prompt_tokens': list(job.ids), **row})
    return found, len(jobs) - len(found)


def describe(session: Session, settings: dict[str, Any], counts: dict[str, int], plan: Plan,
             source: str) -> dict[str, Any]:
    """selfgen.json: what the rows are and how to make them again."""
    config = dataclasses.asdict(plan) | {'model': session.name, 'prompts': source}
    return {'schema': SCHEMA, 'settings': settings, 'counts': counts, **provenance.collect(config),
            'seed': plan.seed, 'model': {'name': session.name, 'base_hash': session.base_hash,
                                         'config': session.target.cfg.to_dict()}}


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open('w', encoding='utf-8') as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + '\n')


def write_tfds(path: Path, rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
    """A dataset that `tfds.builder_from_directory` opens and `as_data_source` reads, in array_record files."""
    import tensorflow_datasets as tfds  # half a second, and needed here only
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    kinds = tfds.features
    features = {'prompt': kinds.Text(doc='as given, without a chat template'),
                'text': kinds.Text(doc='the answer without special tokens'),
                'prompt_tokens': kinds.Tensor(shape=(None,), dtype=np.int32, doc='as the model saw it'),
                'tokens': kinds.Tensor(shape=(None,), dtype=np.int32, doc='the answer, a stop token included'),
                'index': kinds.Scalar(np.int64, doc='number of the prompt, from 0'),
                'sample': kinds.Scalar(np.int64, doc='number of the answer to that prompt, from 0'),
                'finished': kinds.Scalar(np.bool_, doc='it ended by itself, not at max_new_tokens')}
    path.mkdir()
    identity = DatasetIdentity(name=NAME, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=kinds.FeaturesDict(features),
                                 description=f'Answers sampled from {record["model"]["name"]}.')
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=SHARD_ROWS, file_format='array_record')
    writer.initialize_splits([SPLIT])
    for row in rows:
        writer.add_examples({SPLIT: [row | {'tokens': np.array(row['tokens'], np.int32),
                                            'prompt_tokens': np.array(row['prompt_tokens'], np.int32)}]})
    writer.close_all()
    (path / RECORD).write_text(json.dumps(record, indent=2))
