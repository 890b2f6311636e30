"""The average of the trained weights that a run's evaluation sees."""

from __future__ import annotations

import pytest
import torch

from flowbench.training.average import WeightAverage


def average_of(decay: float, weights: list[float], start: float = 0.0) -> tuple[WeightAverage, torch.Tensor]:
    p = torch.tensor([start], dtype=torch.float64)
    average = WeightAverage([p], decay)
    for value in weights:
        p.fill_(value)
        average.step()
    return average, p


def test_its_decay_rises_to_the_largest_one_and_stays():
    average, _ = average_of(0.25, [3.0, -1.0, 5.0])
    first = 9 / 11 * 3.0
    second = 0.25 * first + 0.75 * -1.0  # 3 / 12 is as far as it goes
    assert average.weights[0].item() == pytest.approx(0.25 * second + 0.75 * 5.0)


@pytest.mark.parametrize(("steps", "share"), [(3, 0.014), (10, 6e-5), (18, 1.5e-6)])
def test_what_is_left_of_the_initial_weights_is_as_small_as_stated(steps: int, share: float):
    """Weights of 0 after a start of 1: the average is the initial weights' share. It was 0.987^18 = 0.79."""
    average, _ = average_of(0.987, [0.0] * steps, start=1.0)
    assert 0 < average.weights[0].item() <= share


def test_while_the_ramp_rises_it_remembers_the_last_ninth_of_the_steps():
    """Weights that grow by 1 per step: the average lags by its mean age, n / 10 + O(1)."""
    average, _ = average_of(0.9999, [float(n) for n in range(1, 401)])
    assert 400 - average.weights[0].item() == pytest.approx(40, abs=2)


def test_it_is_in_use_for_a_while_or_for_good():
    average, p = average_of(0.9, [1.0, 2.0])
    inside = average.weights[0].clone()
    with average.in_use():
        assert torch.equal(p, inside)
    assert p.item() == 2.0
    average.use()
    assert torch.equal(p, inside)


def test_without_a_decay_there_is_none():
    average, p = average_of(0.0, [1.0])
    average.use()
    assert not average.weights
    assert p.item() == 1.0
