"""What is read from inner products of noisy directions, on vectors whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowbench.errors import RunError
from flowbench.evaluation.directions import inner_products, squared_length, worth

WIDTH = 4000


def unit(*coordinates: float) -> torch.Tensor:
    vector = torch.zeros(WIDTH)
    vector[: len(coordinates)] = torch.tensor(coordinates)
    return vector / vector.norm()


def noisy(signal: torch.Tensor, noise: float, n: int, seed: int) -> list[torch.Tensor]:
    """n vectors with this mean, whose deviations from it have a length of about `noise`."""
    draws = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))
    return list(signal + noise / math.sqrt(WIDTH) * draws)


@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0, -0.8])
def test_the_cosine_is_corrected_for_the_noise_of_both_sides(cosine: float):
    truth, update = unit(1.0), unit(cosine, math.sqrt(1 - cosine**2))
    updates, parts = noisy(3 * update, 15.0, 24, 0), noisy(truth, 4.0, 24, 1)
    found = worth(updates, None, parts, images=32)
    assert found.cosine.value == pytest.approx(cosine, abs=0.15)
    assert found.cosine.low <= cosine <= found.cosine.high
    assert found.bias.value == pytest.approx(1 - found.cosine.value**2)
    raw = torch.cosine_similarity(torch.stack(updates).mean(0), torch.stack(parts).mean(0), dim=0).item()
    assert abs(raw) < 0.75 * abs(cosine) + 0.05  # noise makes directions look more different than they are


def test_the_projection_is_that_of_one_batch_with_its_noise_and_does_not_know_the_losses_scale():
    truth, update = unit(1.0), unit(0.6, 0.8)
    for scale in (1.0, 100.0):
        updates = [scale * u for u in noisy(update, 3.0, 40, 0)]
        found = worth(updates, None, noisy(truth, 2.0, 16, 1), images=64)
        assert found.projection.value == pytest.approx(0.6 / math.sqrt(10), abs=0.04)
        assert found.projection_per_image == found.projection.value / 64
        assert found.noise.value == pytest.approx(64 * 9, rel=0.15)  # variance 9 times the squared signal
        assert found.noise.low < 64 * 9 < found.noise.high


def test_what_shuffled_rewards_leave_is_drift():
    """Reward part and drift of lengths 1 and 2, at right angles: the drift is 4 of 5 in squares."""
    truth, drift = unit(1.0), 2 * unit(0.0, 1.0)
    remains = noisy(drift, 6.0, 24, 0)
    updates = [s + a for s, a in zip(remains, noisy(truth, 4.0, 24, 1), strict=True)]
    found = worth(updates, remains, [truth], images=8)
    assert found.drift.value == pytest.approx(0.8, abs=0.1)
    assert found.cosine.value == pytest.approx(1 / math.sqrt(5), abs=0.15)
    assert found.cosine_without_drift.value == pytest.approx(1.0, abs=0.15)
    nothing = worth(noisy(truth, 4.0, 24, 1), noisy(0 * truth, 4.0, 24, 2), [truth], images=8)
    assert nothing.drift.low == 0
    assert nothing.drift.value < 0.15
    assert worth(updates, None, [truth], images=8).drift is None


def test_an_update_without_a_signal_has_an_interval_that_admits_any_angle():
    undetermined = 0
    for seed in range(4):
        found = worth(noisy(unit(1.0) * 0, 5.0, 8, seed), None, [unit(1.0)], images=8)
        assert (found.cosine.high - found.cosine.low) > 1
        assert found.bias.high == 1
        assert found.noise.high is None
        assert (found.cosine.value is None) == (found.noise.value is None) == (found.bias.value is None)
        undetermined += found.cosine.value is None
    assert undetermined  # about half of the squared lengths of nothing are negative


def test_a_true_gradient_that_is_only_noise_is_refused_with_the_remedy():
    parts = [unit(1.0), -unit(1.0), unit(0.0, 1.0), -unit(0.0, 1.0)]
    with pytest.raises(RunError, match="raise --images"):
        worth(noisy(unit(1.0), 1.0, 4, 0), None, parts, images=8)


def test_lengths_come_from_pairs_of_different_batches_also_in_a_resample():
    vectors = noisy(unit(1.0), 1.0, 3, 0)
    products = inner_products(vectors, vectors)
    assert products.shape == (3, 3)
    assert squared_length(products, np.array([2, 0, 1])) == pytest.approx(products[0, 2])
    assert math.isnan(squared_length(products, np.array([0, 3, 0])))
    assert products[0, 1] == pytest.approx((vectors[0].double() @ vectors[1].double()).item())
