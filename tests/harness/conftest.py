"""One small comparison that several tests look at."""

import pytest

from configs import compare as compare_config


@pytest.fixture(scope='session')
def tiny_config():
    """Makes configs/compare.py:tiny, with as little as still shows everything, and changes on top."""
    def make(**changes):
        config = compare_config.get_config('tiny')
        config.update({'repeats': 2, 'curve': (1, 2), 'identity_batch_sizes': (2,), 'max_new_tokens': 8,
                       'floor_buffer_bytes': 1 << 20} | changes)
        config.prompts.count = 2
        return config
    return make


@pytest.fixture(scope='session')
def tiny_results(tiny_config):
    from harness import compare
    return compare.run(tiny_config(), progress=False)
