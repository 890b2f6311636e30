"""The objects between the stages: rows of transitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flowbench.rollout import Conditioning, Rollout, transitions

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


def test_a_rollout_that_keeps_no_steps_gives_rows_without_them(rollout: Rollout):
    batch = transitions(dataclasses.replace(rollout, step_mean=None, step_std=None), torch.arange(3.0))
    assert batch.step_mean is None
    assert batch.step_std is None


def test_rows_of_one_prompt_share_its_embedding(rollout: Rollout):
    chosen = rollout.cond.select(torch.tensor([2, 2, 1]))
    assert chosen.tensors["tokens"] is rollout.cond.tensors["tokens"]
    assert chosen.rows()["tokens"].tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert len(chosen) == 3
