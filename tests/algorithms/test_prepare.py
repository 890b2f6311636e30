"""`prepare` end to end: from a rollout to rows, against numbers worked out by hand.

Five images of two prompts, of unequal size and far from centred: rewards 2, 4 (mean 3) and 10, 30, 14 (mean 18); over
all of them mean 12 and deviation sqrt(124) = 11.1355.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.algorithms.adrpo import Adrpo
from flowbench.algorithms.awm import Awm
from flowbench.algorithms.draft import Draft
from flowbench.algorithms.nft import Nft
from flowbench.algorithms.online_dpo import OnlineDpo
from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2
from flowbench.algorithms.raft import Raft
from flowbench.algorithms.refl import Refl
from flowbench.models.flow import SAMPLERS
from flowbench.rollout import Batch, Rollout

REWARD, GROUP = torch.tensor([2.0, 4.0, 10.0, 30.0, 14.0]), torch.tensor([0, 0, 1, 1, 1])
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])


def rollout(toys: Any, reward: torch.Tensor = REWARD) -> Rollout:
    """Image i is the number i; its state before step k is 10 i + k."""
    images = torch.arange(5.0).view(5, 1, 1, 1)
    states = (10 * images[:, None] + torch.arange(5.0).view(1, 5, 1, 1, 1)).contiguous()
    return toys.make_rollout(images, reward, GROUP, sigmas=SIGMAS, states=states)


def prepared(algorithm: Any, given: Rollout) -> Batch:
    policy = SimpleNamespace(
        num_steps=4,
        sampler=SAMPLERS["ode"],
        add_view=lambda name: None,
        update_view=lambda name, decay: None,
        draw_integers=lambda high, n: torch.arange(n) % high,
    )
    algorithm.setup(policy)
    return algorithm.prepare(given)


def numbers(values: torch.Tensor) -> list[float]:
    return values.flatten().tolist()


def test_orws_weights_are_the_exponentials_of_the_rewards_over_their_mean(toys: Any):
    """r = 2 log k at tau 1/2 weighs k, whose mean over the iteration is 3."""
    given = rollout(toys, 2 * torch.arange(1.0, 6.0).log())
    plain = prepared(OrwCfmW2(OrwCfmW2.Config(tau=0.5, normalize="none")), given)
    assert numbers((0.5 * plain.advantage).exp()) == pytest.approx([1, 2, 3, 4, 5])
    ours = prepared(OrwCfmW2(OrwCfmW2.Config(tau=0.5)), given)
    assert numbers((0.5 * ours.advantage).exp()) == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert numbers(ours.x0) == [0, 1, 2, 3, 4]


def test_orws_normalised_weights_do_not_overflow_where_plain_ones_do(toys: Any):
    ours = prepared(OrwCfmW2(OrwCfmW2.Config(tau=1.0)), rollout(toys, 1000 * torch.arange(5.0)))
    assert numbers(ours.advantage.exp()) == pytest.approx([0, 0, 0, 0, 5], abs=1e-2)


def test_adrpos_advantages_are_in_the_rewards_unit(toys: Any):
    assert numbers(prepared(Adrpo(Adrpo.Config()), rollout(toys)).advantage) == pytest.approx([-1, 1, -8, 12, -4])


def test_nfts_advantages_are_in_deviations_of_the_iteration_and_bounded(toys: Any):
    batch = prepared(Nft(Nft.Config(advantage_clip=1.0, states_per_image=2)), rollout(toys))
    expected = [-0.0898, 0.0898, -0.7184, 1.0, -0.3592]  # 12 / 11.1355 = 1.0776 is cut
    assert numbers(batch.advantage) == pytest.approx(expected * 2, abs=1e-4)
    assert numbers(batch.x0) == [0, 1, 2, 3, 4] * 2
    assert numbers(batch.group) == [0, 0, 2, 2, 2, 1, 1, 3, 3, 3]  # those of a prompt that are the same copy


def test_awms_advantages_are_bounded_and_then_scaled_to_one(toys: Any):
    batch = prepared(Awm(Awm.Config(advantage_clip=0.5)), rollout(toys))
    assert numbers(batch.advantage) == pytest.approx([-0.1796, 0.1796, -1.0, 1.0, -0.7184], abs=1e-4)


def test_raft_keeps_the_best_of_each_prompt_with_their_margin(toys: Any):
    batch = prepared(Raft(Raft.Config(share=0.5, states_per_image=2)), rollout(toys))
    assert numbers(batch.x0) == [1, 3, 4] * 2  # one of two, two of three
    assert numbers(batch.advantage) == pytest.approx([1, 12, -4] * 2)


def test_online_dpo_pairs_the_best_with_the_worst(toys: Any):
    batch = prepared(OnlineDpo(OnlineDpo.Config()), rollout(toys))
    assert [numbers(x) for x in batch.pair()] == [[1, 3], [0, 2]]
    assert numbers(batch.advantage) == [2, 20]


def test_refls_rows_are_late_states_at_their_own_sigmas(toys: Any):
    x, sigma = prepared(Refl(Refl.Config(late=0.5)), rollout(toys)).state()
    assert numbers(x) == [2, 13, 22, 33, 42]  # steps 2 and 3 of 4, in turn
    assert numbers(sigma) == pytest.approx([0.6, 0.2, 0.6, 0.2, 0.6])
    x, _ = prepared(Refl(Refl.Config()), rollout(toys)).state()
    assert numbers(x) == [3, 13, 23, 33, 43]  # a quarter of 4 steps is the last one


def test_drafts_rows_are_the_states_before_its_last_steps(toys: Any):
    draft = Draft(Draft.Config(steps=3))
    x, sigma = prepared(draft, rollout(toys)).state()
    assert numbers(x) == [1, 11, 21, 31, 41]
    assert numbers(sigma) == pytest.approx([0.9] * 5)
    assert numbers(draft.sigmas) == pytest.approx([0.9, 0.6, 0.2, 0.0])


def test_the_deviation_above_is_that_of_the_rewards():
    assert REWARD.std().item() == pytest.approx(math.sqrt(124))
