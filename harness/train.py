"""The training loop, one for every task: restore or start, step, log, evaluate, sample, save, until done.

A run lives in its working directory and nowhere else: started again with the same config it continues exactly where
its newest valid checkpoint was. Whatever is written for a step is written before that step's checkpoint, so a kill
between the two only repeats rows, and those are cut on restoring.

    workdir/ config.json tokenizer/ checkpoints/ metrics.jsonl tensorboard/ samples.jsonl loss.png finished
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from backbone.errors import ConfigError, RequestError, TrainingDiverged
from backbone.formats.staging import staged
from backbone.formats.tensors import params_hash
from backbone.sampling import Sampling
from harness import compilation, data, decode, provenance, roofline
from harness import fingerprint as fingerprints
from harness.baselines import Autoregressive
from harness.checkpoint import Checkpoints
from harness.launch.common import write_json
from harness.metrics import Metrics, Progress, cut, plot
from harness.models import CHECKPOINTS, CONFIG, FORMAT, TOKENIZER, read_config
from harness.peak import peak_flops
from harness.preemption import Preemption
from harness.train_step import StepPlan, TrainState, build_mesh, build_task, host_rows, place_batch, plan

FINISHED, SAMPLES = 'finished', 'samples.jsonl'


def run(config: Any, workdir: str | Path, say=tqdm.write) -> str:
    """'finished', or 'preempted' where a signal asked to stop; the state is then saved.

    Errors: ConfigError, FingerprintMismatch (the directory belongs to another config), DataError, CheckpointError
    (none is valid, or the disk is full), TrainingDiverged. What was saved before is never touched by them.
    """
    check(config)
    compilation.use_cache()
    folder, leader = Path(workdir), jax.process_index() == 0
    claim(folder, config, leader)
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        trainer = Trainer(config, folder, leader, stack, say)
        return trainer.train(preemption)


def check(config: Any) -> None:
    for name in ('num_steps', 'log_every', 'max_bad_steps'):
        if config[name] < 1:
            raise ConfigError(f'{name} must be at least 1, got {config[name]}')
    for name, low in (('data.batch_size', 1), ('data.seq_len', 1), ('optimizer.accumulate', 1), ('eval.every', 0),
                      ('eval.batches', 0), ('samples.every', 0), ('checkpoint.every', 1)):
        group, _, key = name.partition('.')
        if config[group][key] < low:
            raise ConfigError(f'{name} must be at least {low}, got {config[group][key]}')
    if config.compute_dtype not in ('float32', 'bfloat16'):
        raise ConfigError(f'compute_dtype: {config.compute_dtype!r} is neither float32 nor bfloat16')
    if not 0 <= config.ema_decay < 1:
        raise ConfigError(f'ema_decay must be in [0, 1), got {config.ema_decay}')


def claim(folder: Path, config: Any, leader: bool) -> None:
    """The directory belongs to one config. Errors: FingerprintMismatch names every field that differs."""
    now = fingerprints.fingerprint(config.to_dict())
    path = folder / CONFIG
    if path.exists():
        fingerprints.check(read_config(folder)['fingerprint'], now)
    elif leader and folder.exists() and any(not found.name.startswith('.') for found in folder.iterdir()):
        raise RequestError(f'{folder} holds other files and no {CONFIG}: give a directory of its own')
    elif leader:
        write_json(path, {'format': FORMAT, **provenance.collect(config), 'fingerprint': now})


class Trainer:
    """Everything that stays while steps go by."""

    def __init__(self, config: Any, folder: Path, leader: bool, stack: contextlib.ExitStack, say):
        self.config, self.folder, self.leader = config, folder, leader
        self.say = say if leader else (lambda *_: None)
        mesh = build_mesh(config)
        task = build_task(config)
        self.tokenizer = data.make_tokenizer(config.data)
        self.tokenizer.check_model(task.cfg.vocab_size)
        self.rows = data.open_rows(config.data, config.data.split, self.tokenizer)
        self.eval_rows = data.open_rows(config.data, config.data.eval_split, self.tokenizer)
        self.target_bytes = data.target_bytes(self.tokenizer)
        if leader and not (folder / TOKENIZER).exists():
            with staged(folder / TOKENIZER) as whole:
                self.tokenizer.save(whole)
        stack.enter_context(jax.set_mesh(mesh))
        self.plan: StepPlan = plan(config, mesh, task)
        limits = config.checkpoint
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, max_to_keep=limits.max_to_keep,
                                       keep_every=limits.keep_every)
        stack.callback(self.checkpoints.close)
        self.state, self.first = self._begin()
        if getattr(task, 'cached', False):
            self.rows, self.eval_rows = self._with_features(self.rows, self.eval_rows)
        if leader:
            cut(folder / SAMPLES, self.first)
        self.metrics = Metrics(folder, self.first, enabled=leader)
        stack.callback(self.metrics.close)
        self.progress = Progress(config.num_steps, self.first, enabled=leader)
        stack.callback(self.progress.close)
        size = (config.data.batch_size, config.data.seq_len)
        self.flops = task.train_flops(*size) if hasattr(task, 'train_flops') else roofline.train_flops(task.cfg, *size)
        self.peak = peak_flops(config.compute_dtype)[0] * mesh.size
        take = host_rows(self.plan.batch['tokens'])
        self.first_row = take.start
        self.batches = data.batches(self.rows, batch_size=config.data.batch_size, seed=config.seed,
                                    start_step=self.first, take=take)
        stack.callback(self.batches.close)
        self.clock: tuple[float, int] | None = None  # (time, step) of the last row; starts once the step is compiled
        self.speed: dict[str, float] = {}

    # --- start and end of a run ---------------------------------------------------------------------------------

    def _begin(self) -> tuple[TrainState, int]:
        self.metadata = {'format': FORMAT, 'fingerprint': fingerprints.fingerprint(self.config.to_dict()),
                         'data': self.rows.fingerprint, 'frozen_hash': self.plan.frozen_hash}
        abstract = self.plan.state
        like = {'params': abstract.params, 'rest': _rest(abstract)} | ({'ema': abstract.ema} if abstract.ema else {})
        found = self.checkpoints.restore_latest_valid(like, report=self.say)
        if found is None:
            return self.plan.init(), 0
        step, parts, saved = found
        fingerprints.check({k: saved.get(k) for k in ('data', 'frozen_hash')},
                           {k: self.metadata[k] for k in ('data', 'frozen_hash')})
        rest = parts['rest']
        # Only frozen leaves are made anew: where there are none, the state is never in memory twice.
        state = self.plan.init() if abstract.frozen else abstract
        state = state.replace(step=jnp.asarray(step, jnp.int32), params=parts['params'], ema=parts.get('ema', {}),
                              opt_state=rest['opt_state'], rng=rest['rng'], bad_steps=rest['bad_steps'])
        state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, abstract))
        self.say(f'continuing after step {step} of {self.config.num_steps}')
        return state, step

    def _with_features(self, *splits: Any) -> list[Any]:
        """The rows of each split with what the frozen base makes of them, so that no step runs it again."""
        if jax.process_count() > 1:
            raise ConfigError('cached features are for one process: set task.kwargs.cached to False')
        task, base = self.plan.task, self.plan.tree(self.state)['base']
        leaves = {path: a for path, a in self.state.frozen.items() if path.startswith('base/')}
        digest = params_hash(jax.tree.map(np.asarray, leaves))
        return [data.cached(rows, task.features, base, digest, task.feature_name, self.config.data.batch_size)
                for rows in splits]

    def save(self, step: int) -> None:
        self.metrics.flush()
        parts = {'params': self.state.params, 'rest': _rest(self.state)}
        parts |= {'ema': self.state.ema} if self.state.ema else {}
        self.checkpoints.save(step, parts, self.metadata | {'step': step})

    def train(self, preemption: Preemption) -> str:
        config, last = self.config, self.config.num_steps
        pending, saved = None, self.first
        for step in range(self.first + 1, last + 1):
            batch = place_batch(next(self.batches), self.plan.batch, self.first_row)
            self.state, metrics = self.plan.step(self.state, batch)
            # The step before is looked at while this one runs: the device is never left waiting.
            self.settle(pending)
            pending = (step, metrics)
            stop = preemption.asked(step)
            if due(step, config.eval.every, last) or due(step, config.samples.every, last) or stop or due(
                    step, config.checkpoint.every, last):
                self.settle(pending)
                pending = None
                self.look(step, last)  # also when stopping: the run goes on after this step, not before it
                if stop or due(step, config.checkpoint.every, last):
                    self.save(step)
                    saved = step
            if stop:
                self.checkpoints.wait()
                self.say(f'stopped by a signal; saved after step {saved}, the same command continues')
                return 'preempted'
        self.checkpoints.wait()
        if self.leader:
            self.metrics.flush()
            self.say(f'wrote {plot(self.folder)}')
            (self.folder / FINISHED).write_text(f'{last}\n')
        self.say(f'finished {last} steps')
        return 'finished'

    # --- what is looked at --------------------------------------------------------------------------------------

    def settle(self, pending: tuple[int, dict] | None) -> None:
        """Reads a step's metrics: a bad step is told, too many end the run, every log_every-th is written."""
        if pending is None:
            return
        step, metrics = pending[0], {name: float(value) for name, value in pending[1].items()}
        bad = int(metrics.pop('bad_steps'))
        if bad:
            self.say(f'step {step}: loss {metrics["loss"]:.4g}, gradient norm {metrics["grad_norm"]:.4g}: skipped, '
                     f'{bad} in a row')
            self.metrics.write(step, {'bad_steps': bad}, kind='event')
        if bad >= self.config.max_bad_steps:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            raise TrainingDiverged(
                f'loss or gradient not finite in {bad} steps in a row, up to step {step}; '
                + (f'the checkpoint of step {kept[-1]} is kept' if kept else 'there was no checkpoint yet')
                + ': lower optimizer.learning_rate or look at the data')
        if self.clock is None:
            self.clock = (time.perf_counter(), step)
        elif due(step, self.config.log_every, self.config.num_steps):
            rate = (step - self.clock[1]) / (time.perf_counter() - self.clock[0])  # steps a second
            self.clock = (time.perf_counter(), step)
            size = self.config.data.batch_size * self.config.data.seq_len
            self.speed = {'tokens_per_s': rate * size, 'mfu': rate * self.flops / self.peak}
        if due(step, self.config.log_every, self.config.num_steps):
            self.metrics.write(step, metrics | self.speed)
        self.progress.update(step, loss=metrics['loss'], **self.speed)

    def look(self, step: int, last: int) -> None:
        """Evaluation and samples; the time they take is not the training's."""
        config, start = self.config, time.perf_counter()
        if due(step, config.eval.every, last) and config.eval.batches:
            found = evaluate(self.plan, self.state, self.eval_rows, self.target_bytes, config)
            self.metrics.write(step, found, kind='eval')
            self.say(f'step {step}: ' + ', '.join(f'{k.replace("_", " ")} {v:.4f}' for k, v in found.items()))
        # Among several processes no one of them holds the parameters: use headway-generate on the directory.
        if config.samples.prompts and due(step, config.samples.every, last) and jax.process_count() == 1:
            for text in sample(self.plan, self.state, self.tokenizer, config, step, self.folder / SAMPLES):
                self.say(f'  sample: {text!r}')
        if self.clock is not None:
            self.clock = (self.clock[0] + time.perf_counter() - start, self.clock[1])


def due(step: int, every: int, last: int) -> bool:
    return step == last or bool(every) and step % every == 0


def _rest(state: TrainState) -> dict[str, Any]:
    return {'opt_state': state.opt_state, 'rng': state.rng, 'bad_steps': state.bad_steps}


def evaluate(plan: StepPlan, state: TrainState, rows: Any, target_bytes: np.ndarray, config: Any) -> dict[str, float]:
    """Means over eval.batches batches, by weight: the task's own metrics, perplexity and bits a byte of text."""
    params, sums, weight, size = plan.tree(state), {}, 0.0, 0
    for batch in data.eval_batches(rows, batch_size=config.data.batch_size, count=config.eval.batches):
        found = {k: float(v) for k, v in plan.evaluate(params, place_batch(batch, plan.batch, 0)).items()}
        mine = found.pop('weight')
        weight += mine
        sums = {k: sums.get(k, 0.0) + mine * v for k, v in found.items()}
        size += int(target_bytes[batch['targets'][batch['weights'] > 0]].sum())
    means = {k: v / max(weight, 1e-9) for k, v in sums.items()}
    if 'nll' in means:
        means['perplexity'] = math.exp(min(means['nll'], 700.0))
        means['bits_per_byte'] = means['nll'] * weight / math.log(2) / max(size, 1)
    return means


def sample(plan: StepPlan, state: TrainState, tokenizer: Any, config: Any, step: int, path: Path) -> list[str]:
    """Continuations of config.samples.prompts, appended to samples.jsonl."""
    prompts = [tokenizer.encode(text) for text in config.samples.prompts]
    sampling = Sampling(config.samples.temperature, 0, config.samples.top_p)
    result = decode.generate(plan.task.target, Autoregressive(), plan.tree(state), prompts,
                             max_new_tokens=config.samples.max_new_tokens, sampling=sampling, seed=step,
                             stop_tokens=tokenizer.eos_ids)
    texts = [tokenizer.decode(ids) for ids in result.tokens]
    with path.open('a') as sink:
        for prompt, text in zip(config.samples.prompts, texts, strict=True):
            sink.write(json.dumps({'step': step, 'prompt': prompt, 'text': text}) + '\n')
    return texts
