"""A trained predictor of the zoo on text its base writes anew: what the card says holds, and by chance it would not."""

import dataclasses

import numpy as np
import pytest

from backbone.errors import HeadwayError
from backbone.sampling import Sampling
from harness import artefacts, decode, models, stepwise, zoo
from harness.baselines import Autoregressive
from sparsity import selectors

NAME, STEPS = 'sparsity_stories', 64
BEGINNINGS = ('Once upon a time there was a small red boat', 'Tom did not want to go to bed',
              'The old woman had a garden with a high wall', 'A bird sat on the roof and looked at the rain')


@pytest.mark.usefixtures('quick_compile')
def test_what_it_keeps_is_worth_what_the_card_says():
    try:
        loaded = models.load(NAME)
    except HeadwayError as error:
        pytest.skip(f'stories-15m: {error}')
    target, params = models.target(loaded)
    prompts = [loaded.tokenizer.encode(text)[:9] for text in BEGINNINGS]
    written = decode.generate(target.reference, Autoregressive(), params, prompts, max_new_tokens=STEPS + 1,
                              sampling=Sampling(1.0)).tokens
    text = np.array([prompt + tokens for prompt, tokens in zip(prompts, written, strict=True)], np.int32)

    def nll(target):
        starts = np.full(len(text), 10, np.int32)
        return -np.asarray(stepwise.forced(target, params, text, starts, 9, STEPS)[1], np.float64).mean(-1)

    dense = nll(target.reference)
    lost = lambda target: float(np.exp((nll(target) - dense).mean()))
    promised = zoo.read_card(NAME)['measured']['ratio']
    ours = lost(target)
    assert 1 < ours < 1.15 * promised, 'perplexity, the whole model\'s = 1'
    by_chance = dataclasses.replace(target, selector=selectors.Random(target.cfg, target.s))
    assert lost(by_chance) > 1.1 * ours


@pytest.mark.slow
def test_it_drafts_for_the_whole_model():
    try:
        loaded = models.load('stories-15m')
    except HeadwayError as error:
        pytest.skip(f'stories-15m: {error}')
    drafter, ready = artefacts.find(NAME, loaded.config, loaded.base_hash)
    target, params = models.target(loaded)
    prompts = [loaded.tokenizer.encode(text)[:9] for text in BEGINNINGS]
    run = lambda drafter, params: decode.generate(target, drafter, params, prompts, max_new_tokens=48)
    plain, drafted = run(Autoregressive(), params), run(drafter, params | ready(params['base'], 'float32'))
    assert drafted.tokens == plain.tokens
    assert drafted.rounds.mean() < 0.9 * plain.rounds.mean(), 'a good share of the drafts is kept'
