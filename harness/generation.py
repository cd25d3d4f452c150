"""Text in, text out: a loaded model with a drafter, for the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from backbone import formats
from backbone.contract import Drafter
from backbone.errors import RequestError
from backbone.layout import pack
from backbone.model import PlainTarget
from backbone.sampling import Sampling
from backbone.tokenizer import Stream, Tokenizer
from harness import compilation, decode, drafters


def read_prompts(prompt: str | None, batch_file: str | None) -> list[str]:
    """The prompts of a request. Errors: RequestError for none, both, an unreadable or empty file, an empty prompt."""
    if (prompt is None) == (batch_file is None):
        raise RequestError('give either --prompt or --batch_file')
    if prompt is not None:
        texts = [prompt]
    else:
        try:
            texts = Path(batch_file).read_text(encoding='utf-8').splitlines()
        except OSError as error:
            raise RequestError(f'cannot read {batch_file}: {error.strerror}') from error
        except UnicodeDecodeError as error:
            raise RequestError(f'{batch_file} is not UTF-8 (byte {error.start})') from error
        if not texts:
            raise RequestError(f'{batch_file} holds no prompt')
    for row, text in enumerate(texts):
        if not text.strip():
            raise RequestError('the prompt is empty' if prompt is not None else f'{batch_file} line {row + 1} is empty')
    return texts


@dataclasses.dataclass(frozen=True)
class Session:
    """A model packed for decoding, with its drafter and tokenizer."""

    target: PlainTarget
    params: Any
    drafter: Drafter
    tokenizer: Tokenizer
    chat: bool = False

    @classmethod
    def load(cls, model: str, drafter: str, drafter_args: list[str], dtype: str, chat: bool = False) -> Session:
        compilation.use_cache()
        loaded = formats.load(model)
        if loaded.tokenizer is None:
            raise RequestError(f'{model} has no tokenizer')
        made = drafters.make(drafter, loaded.config, drafter_args)
        params = {'base': pack(loaded.params, dtype)} | made.init_params(jax.random.key(0))
        return cls(PlainTarget(loaded.config, dtype, stacked=False), params, made, loaded.tokenizer, chat)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.chat([{'role': 'user', 'content': text}]) if self.chat else self.tokenizer.encode(text)

    def run(self, texts: list[str], max_new_tokens: int, sampling: Sampling, seed: int = 0, stream: bool = True,
            out: str | None = None) -> decode.Generation:
        """Decodes and prints (or writes) the texts, then one line of figures on stderr."""
        if out is not None and not os.access(Path(out).resolve().parent, os.W_OK):
            raise RequestError(f'cannot write {out}')
        prompts = [self.encode(text) for text in texts]
        request = {'max_new_tokens': max_new_tokens, 'sampling': sampling, 'stop_tokens': self.tokenizer.eos_ids}
        compiled = decode.warm_up(self.target, self.drafter, self.params, prompts, stream=stream, **request)
        printer = Stream(self.tokenizer)
        show = None
        if stream:
            def show(row: int, ids: list[int]) -> None:
                for token in ids:
                    print(printer.push(token), end='', flush=True)
        result = decode.generate(self.target, self.drafter, self.params, prompts, seed=seed, on_tokens=show, **request)
        if stream:
            print(printer.flush(), flush=True)
        else:
            self._deliver(texts, result, out)
        print(summary(result, compiled), file=sys.stderr)
        return result

    def _deliver(self, texts: list[str], result: decode.Generation, out: str | None) -> None:
        rows = ''.join(json.dumps({'prompt': text, 'text': self.tokenizer.decode(ids), 'tokens': ids},
                                  ensure_ascii=False) + '\n' for text, ids in zip(texts, result.tokens, strict=True))
        if out is None:
            print(rows, end='')
            return
        try:
            with tempfile.NamedTemporaryFile('w', dir=Path(out).resolve().parent, prefix='.', delete=False,
                                             encoding='utf-8') as sink:
                sink.write(rows)
            os.replace(sink.name, out)
        except OSError as error:
            raise RequestError(f'cannot write {out}: {error.strerror}') from error


def summary(result: decode.Generation, compile_s: float) -> str:
    device = jax.devices()[0]
    return (f'{result.num_tokens} tokens, {result.tokens_per_s:.1f} tokens/s decoding, '
            f'{1e3 * result.prefill_s:.0f} ms prefill, {result.mean_accepted_tokens:.2f} accepted a round, '
            f'{compile_s:.1f} s compile, {device.platform}: {device.device_kind}')
