"""The drafter printed in docs/adding_a_method.md runs, and is lossless."""

import pathlib
import re

from harness.decode import generate
from tests.contract.conftest import NEW

DOC = pathlib.Path(__file__).parents[2] / 'docs' / 'adding_a_method.md'


def test_the_drafter_of_the_document(target, params, prompts, plain):
    source = re.search(r'```python\n(.*?)```', DOC.read_text(), re.S)[1]
    assert len(source.splitlines()) < 40
    namespace = {'__name__': 'echo'}
    exec(compile(source, str(DOC), 'exec'), namespace)
    got = generate(target, namespace['Echo'](block=3), params, prompts, max_new_tokens=NEW)
    assert got.tokens == plain
    assert got.drafted_hist[0] > 0 and got.drafted_hist[1:].sum() > 0  # it both abstains and drafts
    loop = generate(target, namespace['Echo'](block=3), params, [[5, 6, 7] * 8], max_new_tokens=4)
    assert loop.drafted_hist.sum() > 0
