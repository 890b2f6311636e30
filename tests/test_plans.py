"""Small algorithms of the next wave, each of which needs one thing that a plan or a policy gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Draws,
    Loss,
    Rollout,
    RolloutPlan,
    endpoints,
    transitions,
)
from flowbench.config import RunConfig
from flowbench.models.flow import SAMPLERS, expand, predict_x0, velocity_error
from flowbench.models.policy import Policy
from flowbench.toolkit.matching import renoised
from flowbench.toolkit.policy_gradient import StepConfig, StepPolicyGradient, clipped_surrogate
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
Run = Callable[..., tuple[Trainer, list[Rollout]]]


def information(name: str, *needs: str) -> Any:
    return type("Info", (), {"name": name, "needs": frozenset(needs)})


@pytest.fixture
def run(tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer, clip: Any) -> Run:
    """Trains with an algorithm for one iteration of three prompts and four images; returns what it was given."""

    def start(
        kind: Any, base: str = "orw-cfm-w2", config: Any = None, **overrides: Any
    ) -> tuple[Trainer, list[Rollout]]:
        sizes = {"training.prompts_per_iteration": 3, "training.images_per_prompt": 4, "training.images": 12}
        trainer = make_trainer(tiny_config(base, "clip", overrides={**sizes, **overrides}), tmp_path, clip)
        algorithm = kind(config or kind.Config(), trainer.algorithm.score)
        other = Trainer(trainer.config, trainer.policy, algorithm, clip, trainer.prompts, tmp_path)
        seen: list[Rollout] = []
        prepare = algorithm.prepare
        algorithm.prepare = lambda rollout: (seen.append(rollout), prepare(rollout))[1]
        before = [p.detach().clone() for p in other.updater.parameters]
        other.run()
        assert any(not torch.equal(p, q) for p, q in zip(other.updater.parameters, before, strict=True))
        return other, seen

    return start


class SharedStart(StepPolicyGradient[StepConfig]):
    """DanceGRPO's (2505.07818): the images of a prompt begin with the same noise, and its own sampler parts them."""

    Config = StepConfig
    info = information("shared-start", "states", "log_prob")

    def plan(self) -> RolloutPlan:
        return RolloutPlan(sampler="dance-sde", shared_noise=True)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        surrogate, metrics = clipped_surrogate(batch.advantage, self.replay(policy, batch)[1], self.cfg.clip_range)
        return Loss(surrogate, metrics=metrics)


def test_an_algorithm_chooses_its_sampler_and_one_first_noise_per_prompt(run: Run):
    trainer, (rollout,) = run(SharedStart, base="ddpo", **{"training.sampler": "flow-sde"})
    assert trainer.policy.sampler is SAMPLERS["dance-sde"]
    first = rollout.states[:, 0]
    for g in range(3):
        assert len({tuple(x.flatten().tolist()) for x in first[rollout.group == g]}) == 1
    assert len({tuple(x.flatten().tolist()) for x in first}) == 3
    assert len({tuple(x.flatten().tolist()) for x in rollout.x0}) == 12


class Branches(SharedStart):
    """BranchGRPO's: the images of a prompt part at step 2, and only steps from there on say which one is better."""

    info = information("branches", "states", "log_prob")

    def plan(self) -> RolloutPlan:
        return RolloutPlan(branch_step=2)

    def prepare(self, rollout: Rollout) -> Batch:
        advantage = rollout.normalized_advantage(5.0)[:, None].repeat(1, len(rollout.sigmas) - 1)
        advantage[:, :2] = 0.0
        return transitions(rollout, advantage)


def test_images_of_a_prompt_part_where_an_algorithm_says_and_each_transition_has_its_own_advantage(run: Run):
    trainer, (rollout,) = run(Branches, base="ddpo")
    group = rollout.states[rollout.group == 1]
    for step in (0, 1, 2):
        assert torch.equal(group[:, step], group[:1, step].expand_as(group[:, step]))
    assert len({tuple(x.flatten().tolist()) for x in group[:, 3]}) == 4
    batch = trainer.algorithm.prepare(rollout).advantage.view(12, -1)
    assert (batch[:, :2] == 0).all()
    assert (batch[:, 2:] != 0).any(1).all()


class Guarded(SharedStart):
    """GRPO-Guard's (2510.22319): the ratio is corrected by the distance of the two means, over the behaviour's std."""

    info = information("guarded", "states", "log_prob")

    def plan(self) -> RolloutPlan:
        return RolloutPlan(keep_steps=True)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        step, log_ratio = self.replay(policy, batch)
        std = expand(batch.step_std, step.mean)
        shift = ((step.mean - batch.step_mean) / std).square().flatten(1).mean(1) / 2
        surrogate, metrics = clipped_surrogate(batch.advantage, log_ratio + shift, self.cfg.clip_range)
        return Loss(surrogate, metrics={**metrics, "shift": shift})


def test_the_behaviours_mean_and_deviation_of_each_step_are_kept_on_request(run: Run):
    trainer, (rollout,) = run(Guarded, base="ddpo")
    steps = len(rollout.sigmas) - 1
    assert rollout.step_mean.shape == (12, steps, *trainer.policy.latent_shape)
    standardized = (rollout.states[:, 1:] - rollout.step_mean) / rollout.step_std[:, :, None, None, None]
    assert standardized.std().item() == pytest.approx(1.0, abs=0.05)
    batch = trainer.algorithm.prepare(rollout)
    assert torch.equal(batch.step_mean[steps + 1], rollout.step_mean[1, 1])


class Dense(SharedStart):
    """DenseGRPO's (2601.20218): a step's advantage is what it adds to the reward of the ODE's completion."""

    info = information("dense", "states", "log_prob", "reward_grad")

    def plan(self) -> RolloutPlan:
        return RolloutPlan()

    def prepare(self, rollout: Rollout) -> Batch:
        gains = []
        with torch.no_grad():
            for step in range(len(rollout.sigmas)):
                x0 = self.policy.complete(rollout.states[:, step], step, rollout.sigmas, rollout.cond)
                gains.append(self.score(self.policy.decode(x0), rollout.prompts))
        self.values = torch.stack(gains, 1)
        return transitions(rollout, self.values.diff(dim=1))


def test_states_are_completed_by_the_ode_and_the_rewards_of_completions_are_counted(run: Run):
    trainer, (rollout,) = run(Dense, base="ddpo")
    steps = len(rollout.sigmas) - 1
    assert trainer.budget.reward_calls == 12 + 12 * (steps + 1)
    assert torch.allclose(trainer.algorithm.values[:, -1], rollout.reward, atol=1e-5)
    total = trainer.algorithm.prepare(rollout).advantage.view(12, steps).sum(1)
    assert torch.allclose(total, rollout.reward - trainer.algorithm.values[:, 0], atol=1e-4)


class ValueGradient(Algorithm[AlgorithmConfig]):
    """VGG-Flow's kind (2512.05116): the reference's velocity, moved by the reward's gradient in the state."""

    info = information("value-gradient", "endpoint", "reward_grad")

    def draws(self) -> Draws:
        return Draws(noises=1, sigma=True)

    def prepare(self, rollout: Rollout) -> Batch:
        return endpoints(rollout, rollout.reward)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        with torch.enable_grad():
            x = noisy.x.detach().requires_grad_()
            v_ref = policy.velocity(x, noisy.sigma, batch.cond, weights="reference", grad=True)
            reward = self.score(policy.decode(predict_x0(x, v_ref, noisy.sigma)), batch.prompts)
            (slope,) = torch.autograd.grad(reward.sum(), x)
        assert slope.abs().max() > 0
        target = (v_ref - expand(noisy.sigma, x) * slope).detach()
        return Loss(velocity_error(policy.velocity(noisy.x, noisy.sigma, batch.cond), target))


def test_the_references_velocity_gives_a_gradient_in_the_state(run: Run):
    trainer, _ = run(ValueGradient, config=AlgorithmConfig())
    assert all(p.grad is None for p in trainer.policy.views.modules()[-1].parameters())


class Sigmoid(Algorithm[AlgorithmConfig]):
    """DGPO's (2510.08425): a group's whole preference weighs its rows, compared within `loss`."""

    info = information("sigmoid", "endpoint")
    whole_groups = True

    def draws(self) -> Draws:
        return Draws(noises=1, sigma=True, shared=True)

    def prepare(self, rollout: Rollout) -> Batch:
        return endpoints(rollout, rollout.center(rollout.reward))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        assert all((batch.group == g).sum() == 4 for g in batch.group)
        error = velocity_error(policy.velocity(noisy.x, noisy.sigma, batch.cond), noisy.u)
        reference = policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="reference")
        gained = batch.advantage * (error - velocity_error(reference, noisy.u)).detach()
        same = (batch.group[:, None] == batch.group).float()
        return Loss(torch.sigmoid(same @ gained / same.sum(1)) * batch.advantage * error)


@pytest.mark.parametrize("microbatch", [None, 5, 1])
def test_groups_that_are_declared_whole_are_whole_in_every_loss(run: Run, microbatch: int | None):
    run(Sigmoid, config=AlgorithmConfig(), **{"training.microbatch": microbatch, "training.minibatch": 6})


def test_a_row_of_a_batch_keeps_the_gaussian_of_its_step(run: Run):
    trainer, (rollout,) = run(Guarded, base="ddpo")
    batch = trainer.algorithm.prepare(rollout)
    part = batch.select(torch.tensor([3, 1]))
    assert torch.equal(part.step_std, batch.step_std[[3, 1]])
    assert torch.equal(replace(part).step_mean, batch.step_mean[[3, 1]])
