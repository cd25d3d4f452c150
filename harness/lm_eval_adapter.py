"""lm-eval on a Headway model (extra `[eval]`): registered there as `headway`.

    from harness import lm_eval_adapter
    lm_eval.simple_evaluate(lm_eval_adapter.HeadwayLM(model='smollm2-135m'), tasks=['lambada_openai'])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from backbone.errors import RequestError
from harness.models import load
from harness.scoring import Row, Scorer

MAX_LENGTH = 2048  # attention over longer rows takes gigabytes; pass max_length where the task needs it


@register_model('headway')
class HeadwayLM(LM):
    """Likelihoods and greedy continuations; sampling is refused.

    model: what `harness.models.load` takes; or a ready `scorer`.
    """

    def __init__(self, model: str = 'smollm2-135m', batch_size: int | str = 16, max_length: int | None = None,
                 scorer: Scorer | None = None, max_gen_toks: int = 256, **_: Any):
        super().__init__()
        if scorer is None:
            loaded = load(model)
            limit = min(int(max_length or MAX_LENGTH), loaded.config.max_seq_len)
            scorer = Scorer.of(dataclasses.replace(loaded, config=loaded.config.replace(max_seq_len=limit)),
                               int(batch_size))
        self.scorer, self.name, self.max_gen_toks = scorer, model, int(max_gen_toks)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        scores = self.scorer.score([self.scorer.pair(*request.args) for request in requests], 'loglikelihood')
        return [(score.total, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Each text whole: every token is scored once, the first after the prefix."""
        rows = [list(self._windows(self.scorer.tokenizer.encode(request.args[0], add_special=False)))
                for request in requests]
        scores = iter(self.scorer.score([row for text in rows for row in text], 'loglikelihood_rolling'))
        return [sum(next(scores).total for _ in text) for text in rows]

    def _windows(self, ids: Sequence[int]) -> Iterator[Row]:
        """Rows of at most the context; the last one looks as far back as it can."""
        ids, size = (*self.scorer.prefix, *ids), self.scorer.max_length
        start = 1
        while start < len(ids):
            end = min(start + size - 1, len(ids))
            begin = max(end - size, 0)
            yield Row(ids[begin:end], start - begin)
            start = end

    def generate_until(self, requests) -> list[str]:
        """Greedy; requests with the same stop strings and length are decoded together. Errors: RequestError."""
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            options = dict(request.args[1])
            if options.get('do_sample') and options.get('temperature', 1.0) > 0:
                raise RequestError('the adapter decodes greedily; the task asks for sampling')
            until = options.get('until') or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            length = int(options.get('max_gen_toks') or options.get('max_new_tokens') or self.max_gen_toks)
            groups.setdefault((until, length), []).append(i)
        texts = [''] * len(requests)
        for (until, length), members in groups.items():
            made = self.scorer.generate([requests[i].args[0] for i in members], max_new_tokens=length, until=until)
            for i, text in zip(members, made, strict=True):
                texts[i] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.scorer.tokenizer.chat_template or '' if chat_template else ''

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.scorer.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
