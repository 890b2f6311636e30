"""DDPO, DPOK and Flow-GRPO against their reference implementations' numbers, and against each other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import minibatch_loss

from flowbench.algorithm import Algorithm
from flowbench.algorithms.ddpo import Ddpo
from flowbench.algorithms.dpok import Dpok
from flowbench.algorithms.flow_grpo import FlowGrpo
from flowbench.models.flow import SAMPLERS, Step, gaussian_kl
from flowbench.rollout import Conditioning, Rollout, transitions
from flowbench.toolkit.policy_gradient import StepConfig, StepPolicyGradient

# Written by references/policy_gradients.py, which names the files and commits of the reference implementations.
TABLE = json.loads((Path(__file__).parents[1] / "references" / "policy_gradients.json").read_text(encoding="utf-8"))
PATHS, SETTINGS = TABLE["methods"], TABLE["settings"]
STOCHASTIC = ("flow-sde", "cps", "dance-sde")
WITH_BETA = {"clip_range": SETTINGS["clip_range"], "beta": SETTINGS["beta"]}


def latents(name: str) -> torch.Tensor:
    """A table's latents, whose four dimensions are (1, 2, 2)."""
    return torch.tensor(PATHS[name], dtype=torch.float64).unflatten(-1, (1, 2, 2))


class TabledPolicy:
    """The velocities of the table for each of its images and steps; those of "current" are parameters."""

    latent_shape, text_width, num_steps = (1, 2, 2), 3, 2

    def __init__(self, sampler: str) -> None:
        self.sampler = SAMPLERS[sampler]
        self.sigmas = torch.tensor(PATHS["sigmas"], dtype=torch.float64)
        views = {"current": "v", "old": "v_old", "reference": "v_ref"}
        self.velocities = {view: latents(name) for view, name in views.items()}
        self.v = self.velocities["current"].requires_grad_()

    def transition(
        self, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, cond: Any, weights: str = "current"
    ) -> Step:
        step = (sigma[:, None] == self.sigmas).int().argmax(1)
        v = self.velocities[weights][cond.index, step]
        return self.sampler.step(x, v, sigma, sigma_next, SETTINGS["eta"])

    def text_summary(self, cond: Conditioning) -> torch.Tensor:
        return torch.zeros(len(cond), 3, dtype=torch.float64)

    def rollout(self, iteration: int = 0) -> Rollout:
        """The table's paths, as the old velocities made them, with the rewards of this iteration."""
        x, group = latents("x"), torch.tensor(PATHS["prompts"])
        cond = Conditioning({}, torch.arange(6))
        log_probs = []
        for k in range(2):
            sigma, sigma_next = (self.sigmas[j].expand(6) for j in (k, k + 1))
            log_probs.append(
                self.sampler.log_prob(x[:, k + 1], self.transition(x[:, k], sigma, sigma_next, cond, "old"))
            )
        prompts = tuple(f"prompt {g}" for g in group.tolist())
        reward = torch.tensor(PATHS["rewards"][iteration], dtype=torch.float64)
        paths = {"states": x, "log_prob": torch.stack(log_probs, 1)}
        return Rollout(iteration, prompts, group, cond, self.sigmas, x[:, -1], x[:, -1], reward, **paths)


class TabledValue(torch.nn.Module):
    """The values of the table's states."""

    def forward(self, x: torch.Tensor, summary: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        same = (x[:, None, None] == latents("x")[None, :, :2]).flatten(3).all(3)
        image, at = same.nonzero()[:, 1:].unbind(1)
        assert torch.equal(at, step.long())
        return torch.tensor(PATHS["values"], dtype=torch.float64)[image, at]


def ddpo(policy: TabledPolicy) -> Algorithm:
    sizes = {name: SETTINGS[name] for name in ("clip_range", "buffer_size", "min_count")}
    algorithm = Ddpo(Ddpo.Config(**sizes))
    algorithm.setup(policy)
    return algorithm


def dpok(policy: TabledPolicy) -> Algorithm:
    algorithm = Dpok(Dpok.Config(**WITH_BETA))
    algorithm.setup(policy)
    algorithm.critic = TabledValue()
    return algorithm


def flow_grpo(policy: TabledPolicy, **config: Any) -> Algorithm:
    algorithm = FlowGrpo(FlowGrpo.Config(**WITH_BETA, **config))
    algorithm.setup(policy)
    return algorithm


METHODS: dict[str, Callable[[TabledPolicy], Algorithm]] = {
    "dpok": dpok,
    "flow-grpo": flow_grpo,
    "flow-grpo, kl_over_step": lambda policy: flow_grpo(policy, kl_over_step=True),
    "flow-grpo, own deviation": lambda policy: flow_grpo(policy, global_std=False),
}


def relative(found: torch.Tensor, expected: Any) -> float:
    expected = torch.as_tensor(expected, dtype=torch.float64).view_as(found)
    return ((found - expected).norm() / expected.norm()).item()


def check(policy: TabledPolicy, algorithm: Algorithm, rollout: Rollout, method: str, sampler: str) -> None:
    expected = PATHS["cases"][sampler][method]
    loss = minibatch_loss(algorithm, policy, algorithm.prepare(rollout)).policy.mean()
    assert relative(loss.detach(), expected["loss"]) < 1e-5
    assert relative(torch.autograd.grad(loss, policy.v)[0], expected["gradient"]) < 1e-5
    assert 0 < expected["inside"] < 1  # some rows are clipped and some are not


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_samplers_step_log_prob_and_divergence_are_those_of_its_reference(sampler: str):
    table, chosen = TABLE["samplers"], SAMPLERS[sampler]
    x, x_next, v, v_ref, sigma, sigma_next = (
        torch.tensor(table[name], dtype=torch.float64) for name in ("x", "x_next", "v", "v_ref", "sigma", "sigma_next")
    )
    step, reference = (chosen.step(x, u, sigma, sigma_next, SETTINGS["eta"]) for u in (v, v_ref))
    divergence = chosen.divergence(step, reference) / 4
    found = {
        "mean": step.mean,
        "std": step.std.flatten(),
        "log_prob_mean": chosen.log_prob(x_next, step) / 4,
        "divergence_mean": divergence,
        "code_kl": divergence * chosen.code_factor(sigma, sigma_next),
    }
    for name, values in found.items():
        assert relative(values, table[sampler][name]) < 1e-5, name


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_the_reference(method: str, sampler: str):
    policy = TabledPolicy(sampler)
    check(policy, METHODS[method](policy), policy.rollout(), method, sampler)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_ddpos_loss_and_gradient_are_those_of_the_reference_once_its_buffer_is_full(sampler: str):
    policy = TabledPolicy(sampler)
    algorithm = ddpo(policy)
    first = algorithm.prepare(policy.rollout(0)).advantage.view(6, 2)[:, 0]
    assert relative(first, PATHS["ddpo_advantages"][0]) < 1e-5
    check(policy, algorithm, policy.rollout(1), "ddpo", sampler)


def test_dpoks_value_is_fitted_as_in_the_reference():
    policy = TabledPolicy("flow-sde")
    algorithm = dpok(policy)
    loss = minibatch_loss(algorithm, policy, algorithm.prepare(policy.rollout()))
    assert relative(loss.auxiliary.mean(), PATHS["value_loss"]) < 1e-5


def test_at_equal_beta_and_on_the_same_rollout_the_three_have_different_gradients():
    """Not even the direction is the same. The ratio is 1 (new weights are the old ones), so that nothing is clipped."""
    directions = {}
    for name, make in {"ddpo": ddpo, "dpok": dpok, "flow-grpo": flow_grpo}.items():
        policy = TabledPolicy("flow-sde")
        policy.velocities["current"] = policy.v = latents("v_old").requires_grad_()
        algorithm = make(policy)
        algorithm.cfg = algorithm.cfg.model_copy(update={"beta": 0.0})
        algorithm.prepare(policy.rollout(0))
        loss = minibatch_loss(algorithm, policy, algorithm.prepare(policy.rollout(1))).policy.mean()
        gradient = torch.autograd.grad(loss, policy.v)[0]
        directions[name] = (gradient / gradient.norm()).flatten()
    for a, b in itertools.combinations(directions, 2):
        assert torch.dot(directions[a], directions[b]) < 0.99, (a, b)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_the_ratio_at_unchanged_weights_is_exactly_one(sampler: str, make_policy: Any):
    """By every step of the embedded model's path that has noise, in the rows of which the sampler drew it."""
    policy = make_policy(sampler=sampler, eta=0.7)
    cond = policy.encode(("a red circle", "two crosses"))
    s = policy.rollout(cond, policy.draw_noise(2), sampler=policy.sampler, keep_states=True)
    rollout = Rollout(
        0, ("a", "b"), torch.arange(2), cond, s.sigmas, s.x0, s.x0, torch.arange(2.0), s.states, s.log_prob
    )
    algorithm = StepPolicyGradient(StepConfig())
    algorithm.setup(policy)
    batch = transitions(rollout, rollout.reward)
    assert len(batch) == 2 * (3 if sampler == "cps" else 4)  # a step of CPS to sigma 0 has no noise
    for sigma in batch.sigma.unique():
        with torch.no_grad():
            _, log_ratio = algorithm.replay(policy, batch.select((batch.sigma == sigma).nonzero()[:, 0]))
        assert log_ratio.exp().tolist() == [1.0, 1.0]


def test_no_step_of_cps_outweighs_the_others():
    """A unit change of the velocity moves no step by more than a step's size. By the exact KL, which divides by the
    noise's square, the step to sigma 0.001 would weigh 1,000 times as much as any other."""
    grid = torch.tensor([1.0, 0.78, 0.56, 0.33, 0.144, 0.001], dtype=torch.float64)
    x, cps = torch.zeros(5, 1, 2, 2, dtype=torch.float64), SAMPLERS["cps"]
    steps = [cps.step(x, x + v, grid[:-1], grid[1:], 0.7) for v in (0.0, 1.0)]
    assert (cps.divergence(*steps) / 4).max() < 0.1
    exact = gaussian_kl(*steps) / 4
    assert exact[-1] > 1e3 * exact[:-1].max()
