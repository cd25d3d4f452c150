"""Text in, text out: a loaded model with a drafter, for the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax

from backbone.contract import Drafter, Target
from backbone.errors import RequestError
from backbone.sampling import Sampling
from backbone.tokenizer import Stream, Tokenizer
from harness import compilation, decode, drafters, models, prompts


def read_prompts(prompt: str | None, batch_file: str | None, limit: int = 0) -> list[str]:
    """The prompts of a request; batch_file: any source of `prompts.texts`. limit: at most so many, evenly spread.

    Errors: RequestError for none, both, an unreadable or empty file, an empty prompt, a limit below 0.
    """
    if limit < 0:
        raise RequestError(f'limit must be at least 0, got {limit}')
    if (prompt is None) == (batch_file is None):
        raise RequestError('give either --prompt or --batch_file')
    if prompt is None:
        found = prompts.texts(batch_file)
        return [found[i * len(found) // limit] for i in range(limit)] if 0 < limit < len(found) else found
    if not prompt.strip():
        raise RequestError('the prompt is empty')
    return [prompt]


@dataclasses.dataclass(frozen=True)
class Session:
    """A model packed for decoding, with its drafter and tokenizer. base_hash: of the unpacked parameters."""

    target: Target
    params: Any
    drafter: Drafter
    tokenizer: Tokenizer
    chat: bool = False
    name: str = ''
    base_hash: str = ''

    @classmethod
    def load(cls, model: str, drafter: str, drafter_args: list[str], dtype: str, chat: bool = False) -> Session:
        compilation.use_cache()
        loaded = models.load(model)
        if loaded.tokenizer is None:
            raise RequestError(f'{model} has no tokenizer')
        made, ready = drafters.load(drafter, loaded, drafter_args)
        target, params = models.target(loaded, dtype)
        params |= ready(params['base'], dtype)
        return cls(target, params, made, loaded.tokenizer, chat, loaded.name, loaded.base_hash)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.chat([{'role': 'user', 'content': text}]) if self.chat else self.tokenizer.encode(text)

    def run(self, texts: list[str], max_new_tokens: int, sampling: Sampling, seed: int = 0,
            stream: bool = True) -> decode.Generation:
        """Decodes and prints the texts (as JSON lines where not streamed), then one line of figures on stderr."""
        ids = [self.encode(text) for text in texts]
        request = {'max_new_tokens': max_new_tokens, 'sampling': sampling, 'stop_tokens': self.tokenizer.eos_ids}
        compiled = decode.warm_up(self.target, self.drafter, self.params, ids, stream=stream, **request)
        printer = Stream(self.tokenizer)
        show = None
        if stream:
            def show(row: int, new: list[int]) -> None:
                for token in new:
                    print(printer.push(token), end='', flush=True)
        result = decode.generate(self.target, self.drafter, self.params, ids, seed=seed, on_tokens=show, **request)
        if stream:
            print(printer.flush(), flush=True)
        else:
            for text, new in zip(texts, result.tokens, strict=True):
                print(json.dumps({'prompt': text, 'text': self.tokenizer.decode(new), 'tokens': new},
                                 ensure_ascii=False))
        print(summary(result, compiled), file=sys.stderr)
        return result


def summary(result: decode.Generation, compile_s: float) -> str:
    device = jax.devices()[0]
    return (f'{result.num_tokens} tokens, {result.tokens_per_s:.1f} tokens/s decoding, '
            f'{1e3 * result.prefill_s:.0f} ms prefill, {result.mean_accepted_tokens:.2f} accepted a round, '
            f'{compile_s:.1f} s compile, {device.platform}: {device.device_kind}')
