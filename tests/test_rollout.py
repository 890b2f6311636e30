"""The objects between the stages: rows of transitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flowbench.rollout import Conditioning, Rollout, idle_steps, transitions

B, T, SHAPE = 3, 4, (2, 1, 1)


@pytest.fixture
def rollout() -> Rollout:
    """With the third step an ODE step, which has no density."""
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(B, T, generator=generator)
    log_prob[:, 2] = torch.inf
    return Rollout(
        iteration=0,
        prompts=("a", "b", "c"),
        group=torch.arange(B),
        cond=Conditioning({"tokens": torch.arange(6.0).view(2, 3)}, torch.tensor([1, 0, 1])),
        sigmas=torch.linspace(1, 0, T + 1),
        x0=torch.zeros(B, *SHAPE),
        images=torch.zeros(B, 3, 1, 1),
        reward=torch.arange(3.0),
        states=torch.randn(B, T + 1, *SHAPE, generator=generator),
        log_prob=log_prob,
        step_mean=torch.randn(B, T, *SHAPE, generator=generator),
        step_std=torch.rand(B, T, generator=generator),
    )


def test_each_row_has_the_gaussian_and_the_advantage_of_its_own_transition(rollout: Rollout):
    advantage = torch.arange(12.0).view(B, T)
    batch = transitions(rollout, advantage)
    assert batch.advantage.tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    assert torch.equal(batch.step_mean, rollout.step_mean[:, [0, 1, 3]].flatten(0, 1))
    assert torch.equal(batch.step_std, rollout.step_std[:, [0, 1, 3]].flatten())
    rows = torch.tensor([7, 0])
    chosen = batch.select(rows)
    assert torch.equal(chosen.step_mean, batch.step_mean[rows])
    assert torch.equal(chosen.step_std, rollout.step_std[[2, 0], [1, 0]])
    assert torch.equal(chosen.advantage, torch.tensor([9.0, 0.0]))


def test_one_advantage_per_image_is_that_of_all_its_transitions(rollout: Rollout):
    assert transitions(rollout, torch.arange(3.0)).advantage.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("sigmas", "idle"),
    [
        ([1.0, 0.8573, 0.7146, 0.1437, 0.001, 0.0], True),  # the scheduler's own grid
        ([1.0, 0.9600, 0.8, 0.278, 0.0089, 0.0], True),  # with SD3's shift
        ([1.0, 0.75, 0.5, 0.25, 0.0], False),
        ([1.0, 0.9231, 0.8, 0.6667, 0.25, 0.0], False),
        ([1.0, 0.0], False),
    ],
)
def test_a_last_step_that_changes_nothing_is_idle_and_no_other_is(sigmas: list[float], idle: bool):
    assert idle_steps(torch.tensor(sigmas)).tolist() == [False] * (len(sigmas) - 2) + [idle]


def test_no_row_belongs_to_a_step_that_changes_nothing(rollout: Rollout):
    short = dataclasses.replace(rollout, sigmas=torch.tensor([1.0, 0.6, 0.3, 0.001, 0.0]))
    rows = transitions(short, torch.arange(12.0).view(B, T))
    assert rows.advantage.tolist() == [0, 1, 4, 5, 8, 9]
    assert rows.sigma.tolist() == pytest.approx(3 * [1.0, 0.6])


def test_a_rollout_that_keeps_no_steps_gives_rows_without_them(rollout: Rollout):
    batch = transitions(dataclasses.replace(rollout, step_mean=None, step_std=None), torch.arange(3.0))
    assert batch.step_mean is None
    assert batch.step_std is None


def test_rows_of_one_prompt_share_its_embedding(rollout: Rollout):
    chosen = rollout.cond.select(torch.tensor([2, 2, 1]))
    assert chosen.tensors["tokens"] is rollout.cond.tensors["tokens"]
    assert chosen.rows()["tokens"].tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert len(chosen) == 3
