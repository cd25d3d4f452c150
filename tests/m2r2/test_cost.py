"""The cost formula against figures that can be worked out by hand."""

import pytest

from backbone.config import AttentionConfig, MlpConfig, ModelConfig
from m2r2 import cost
from m2r2.config import M2R2Config


@pytest.mark.parametrize('k, block, alpha, want', [(3, 4, 0.8, 1.90), (3, 4, 0.9, 2.32), (2, 5, 0.95, 2.96)])
def test_speed_up_at_a_known_shape(k, block, alpha, want):
    """28 layers, a head of 9.2 % that every draft reads whole, 2 % more in a layer of both streams."""
    assert cost.speed_up(alpha, cost.Shares(k / 28, 0.02, 0.092, 0.092), block) == pytest.approx(want, abs=0.01)


def test_shares_count_what_a_draft_reads():
    cfg = ModelConfig('llama', 1000, 64, 10, 128, AttentionConfig(4, 2, 16), MlpConfig(128))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    got = cost.shares(cfg, M2R2Config(64, 10, 1000, (2,), rank=8, draft_vocab=100))
    assert got.early == 0.2 and got.fast == pytest.approx(2 * 64 * 8 / layer)
    assert got.head == pytest.approx(64_000 / (64_000 + 10 * layer))
    assert got.draft_head == pytest.approx(got.head / 10)
    assert cost.round_cost(cost.Shares(0, 0, got.head, 0), 0) == pytest.approx(1), 'no draft: plain decoding'
    assert cost.round_cost(got, 3, wide=1.5) > cost.round_cost(got, 3) > cost.round_cost(got, 2)


def test_alpha_from_what_was_kept():
    """A constant chance of 0.7 a draft comes back from the drafts it keeps a round."""
    assert cost.alpha_of(0.7 + 0.49 + 0.343, 3) == pytest.approx(0.7)
    assert cost.alpha_of(0.0, 2) == pytest.approx(0, abs=1e-9)
    assert cost.tokens_per_round(0.9, 4) == pytest.approx((1 - 0.9**5) / 0.1)
