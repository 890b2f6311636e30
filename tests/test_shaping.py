from __future__ import annotations

from typing import get_args

import pytest
import torch

from flowbench.rollout import Conditioning, Rollout
from flowbench.toolkit.shaping import Kind, RewardShaping


def rollout(reward: torch.Tensor, group: torch.Tensor) -> Rollout:
    n, points = len(reward), torch.zeros(len(reward), 1, 1, 1)
    cond = Conditioning({}, torch.zeros(n, dtype=torch.long))
    return Rollout(0, ("a",) * n, group, cond, torch.tensor([1.0, 0.0]), points, points, reward)


REWARD, GROUP = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])


def test_each_kind_does_what_it_says_on_a_first_rollout():
    centered, scale = torch.tensor([-1.0, 1.0, -2.0, 2.0]), (10.0 / 3) ** 0.5
    expected = {
        "none": REWARD,
        "center": centered,
        "normalize": centered / scale,
        "squash": torch.tanh(centered / scale),
        "standardize": (REWARD - 7) / REWARD.std(),
    }
    assert set(expected) == set(get_args(Kind))
    for kind, values in expected.items():
        torch.testing.assert_close(RewardShaping(kind)(rollout(REWARD, GROUP)), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["normalize", "standardize"])
def test_running_statistics_move_slowly_and_can_be_restored(kind: Kind):
    first = RewardShaping(kind)
    first(rollout(REWARD, GROUP))
    second = RewardShaping(kind)
    second.running = dict(first.running)
    louder = rollout(10 * REWARD, GROUP)
    shaped = first(louder)
    assert torch.equal(shaped, second(louder))
    assert shaped.std() > 3  # the scale is still mostly that of the first rollout


def test_normalised_rewards_do_not_depend_on_the_rewards_unit():
    a, b = RewardShaping("normalize"), RewardShaping("normalize")
    torch.testing.assert_close(a(rollout(REWARD, GROUP)), b(rollout(100 * REWARD - 7, GROUP)), rtol=1e-5, atol=1e-5)
