"""Early exit on a trained model with trained accelerators and gates: what the card promises, on text it never saw."""

import numpy as np
import pytest

from backbone.errors import HeadwayError
from harness import decode, models, stepwise
from harness.baselines import Autoregressive
from m2r2.early_exit import mean_layers

NAME, STEPS = 'm2r2_stories_early_exit', 48
BEGINNINGS = ('Once upon a time there was a small red boat', 'Tom did not want to go to bed',
              'The old woman had a garden with a high wall', 'A bird sat on the roof and looked at the rain')


@pytest.mark.usefixtures('quick_compile')
def test_it_leaves_early_and_mostly_says_what_the_whole_model_says():
    try:
        loaded = models.load(NAME)
    except HeadwayError as error:
        pytest.skip(f'stories-15m: {error}')
    target, params = models.target(loaded)
    promised = loaded.decodes['kwargs']['thresholds']
    prompts = [loaded.tokenizer.encode(text)[:9] for text in BEGINNINGS]
    plain = decode.generate(target.reference, Autoregressive(), params, prompts, max_new_tokens=STEPS + 1).tokens
    text = np.array([prompt + tokens for prompt, tokens in zip(prompts, plain, strict=True)], np.int32)

    def follow(thresholds):
        """(share of the whole model's tokens that are chosen, given those before; mean layers)."""
        given = params | {'thresholds': np.array(thresholds, np.float32)}
        cache, _, choices = stepwise.forced(target, given, text, np.full(len(text), 10), 9, text.shape[1] - 10)
        return float(np.mean(np.asarray(choices) == text[:, 10:])), mean_layers(target, cache)

    agreement, layers = follow(promised)
    assert agreement >= 0.9 and layers < 5.7, (agreement, layers)
    everything, depth = follow([2.0, 2.0])
    assert everything == 1 and depth == 6
    careless, shallow = follow([0.0, 0.0])  # the control: without gates it is fast and wrong
    assert careless < 0.75 and shallow == 3  # of four tokens the fourth goes through: three may be pending
