"""Counting accepted drafts: what the loop's own counters say, prompt by prompt."""

import jax
import numpy as np
import pytest

from backbone import tokenizer
from backbone.formats.tensors import Loaded
from backbone.layout import pack
from backbone.model import PlainTarget
from harness import acceptance, decode
from harness.baselines import PromptLookup
from harness.prompts import Prompt
from tests.conftest import lively, tiny_config


def test_counts_are_those_of_the_prompts_decoded_alone(monkeypatch):
    cfg = tiny_config(vocab=257, layers=1)
    params = jax.tree.map(np.asarray, lively(cfg, 4))
    loaded = Loaded(cfg, params, tokenizer.of_bytes(), 'small', 'hash')
    prompts = [Prompt(str(i), tuple(b'abcabc'[:3 + i])) for i in range(3)]
    monkeypatch.setattr(acceptance, 'questions', lambda *_, **__: prompts)
    rows = acceptance.measure(loaded, ['prompt_lookup:block=2', 'none'], 'mt_bench', count=3, max_new_tokens=16,
                              batch_size=2, say=lambda *_: None)
    target, packed = PlainTarget(cfg, stacked=False), {'base': pack(params)}
    alone = [decode.generate(target, PromptLookup(2), packed, [p.ids], max_new_tokens=16, stop_tokens=(256,))
             for p in prompts]
    tokens, rounds = sum(out.num_tokens - 1 for out in alone), sum(int(out.rounds[0]) for out in alone)
    assert rows[0]['tokens'] == tokens and rows[0]['calls_per_token'] == rounds / tokens
    assert rows[0]['accepted'] == pytest.approx((tokens - rounds) / rounds) and rows[0]['accepted'] > 0.05
    each = [(out.num_tokens - 1 - out.rounds[0]) / out.rounds[0] for out in alone]
    assert rows[0]['accepted_stderr'] == pytest.approx(np.std(each, ddof=1) / 3 ** 0.5)
    assert rows[1]['accepted'] == 0 and rows[1]['calls_per_token'] == 1 and rows[1]['by_position'] == []
