"""Sampling paths of a policy: rollouts, branches, completions, and single steps of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from flowbench.errors import UsageError
from flowbench.models.flow import SAMPLERS, Sampler, Step
from flowbench.models.presets import ModelPreset
from flowbench.rollout import Conditioning


@dataclass(frozen=True)
class Samples:
    """The result of a rollout; shapes as in `rollout.Rollout`.

    mean (B, T, C, h, w) and std (B, T): the Gaussian of each step as it was taken, std 0 for steps of the ODE.
    """

    x0: torch.Tensor
    sigmas: torch.Tensor
    states: torch.Tensor | None
    log_prob: torch.Tensor | None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None


@dataclass(frozen=True)
class StepNoise:
    """What the steps of a rollout of B rows add, on the host; a row's own is the same however the rows are cut.

    steps: per step (B, C, h, w), or None for a step of the ODE. Before `branch_step` it is (G, C, h, w), one for each
    group of rows that have not parted yet, and member (B,) says which; without branches that is 0, and member None.
    """

    steps: tuple[torch.Tensor | None, ...]
    branch_step: int = 0
    member: torch.Tensor | None = None

    def select(self, rows: slice) -> StepNoise:
        """That of these rows; groups must be whole."""
        if self.member is None:
            return StepNoise(tuple(None if noise is None else noise[rows] for noise in self.steps))
        groups, member = self.member[rows].unique(return_inverse=True)
        own = (groups if k < self.branch_step else rows for k in range(len(self.steps)))
        steps = tuple(None if noise is None else noise[i] for i, noise in zip(own, self.steps, strict=True))
        return replace(self, steps=steps, member=member)


class Sampling(ABC):
    """What can be sampled with, given a velocity. `Policy` says where the velocity comes from."""

    preset: ModelPreset
    sampler: Sampler
    eta: float
    device: torch.device

    @abstractmethod
    def guided_velocity(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
        guidance_scale: float | None = None,
        grad: bool = False,
    ) -> torch.Tensor:
        """The velocity that the sampler follows."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampler's sigmas (num_steps + 1,), from 1 to 0."""

    @abstractmethod
    def _randn(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, on the host."""

    def draw_step_noise(
        self,
        shape: torch.Size,
        sampler: Sampler,
        num_steps: int | None = None,
        window: range | None = None,
        group: torch.Tensor | None = None,
        branch_step: int | None = None,
    ) -> StepNoise:
        """What the steps of a rollout from noise of that shape (B, C, h, w) add, drawn step by step for all rows.

        The arguments are those of `rollout`. Raises UsageError for branches that never part, or without groups.
        """
        steps = num_steps or self.preset.num_steps
        member, before = None, shape
        if branch_step is not None:
            member, leaders = (part.cpu() for part in _branches(group, branch_step, sampler, steps))
            before = torch.Size((len(leaders), *shape[1:]))
        stochastic = [chosen(sampler, window, k).has_log_prob for k in range(steps)]
        noise = [
            self._randn(before if k < (branch_step or 0) else shape) if draws else None
            for k, draws in enumerate(stochastic)
        ]
        if self.device.type == "cuda":  # so that copying it does not wait for the step before
            noise = [None if part is None else part.pin_memory() for part in noise]
        return StepNoise(tuple(noise), branch_step or 0, member)

    @torch.no_grad()
    def rollout(
        self,
        cond: Conditioning,
        noise: torch.Tensor,
        *,
        sampler: Sampler = SAMPLERS["ode"],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        window: range | None = None,
        keep_states: bool = False,
        weights: str = "current",
        group: torch.Tensor | None = None,
        branch_step: int | None = None,
        keep_steps: bool = False,
        step_noise: StepNoise | None = None,
    ) -> Samples:
        """Sample from noise (B, C, h, w) to x0. A sampler with noise gives log_prob.

        num_steps and guidance_scale None are the preset's. Steps outside `window`, if there is one, are ODE steps; they
        have no density, and their log_prob is infinite. With `branch_step` k, rows of the same number in group (B,)
        begin with the noise of the first of them, share the first k steps, which are computed once, and part in step k.
        `keep_steps` keeps each step's mean and std. step_noise: as `draw_step_noise` gives it; drawn if there is none.

        Raises UsageError for branches that never part, or without groups.
        """
        sigmas = self.sigmas(num_steps or self.preset.num_steps)
        scale = self.preset.guidance_scale if guidance_scale is None else guidance_scale
        if step_noise is None:
            step_noise = self.draw_step_noise(noise.shape, sampler, num_steps, window, group, branch_step)
        noise, member = noise.to(self.device), None
        path = _Path(noise, keep_states, keep_steps)
        if branch_step is not None:
            member, leaders = _branches(group, branch_step, sampler, len(sigmas) - 1)
            path, everyone, cond = _Path(noise[leaders], keep_states, keep_steps), cond, cond.select(leaders)
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            if member is not None and k == branch_step:
                path.spread(member)
                cond = everyone
            x = path.x
            v = self.guided_velocity(x, sigma.expand(len(x)), cond, weights, scale)
            taken = chosen(sampler, window, k)
            step = taken.step(x, v, sigma, sigma_next, self.eta)
            x, added = step.mean, step_noise.steps[k]
            if added is not None:
                x = step.mean + step.std * added.to(x.device, non_blocking=x.is_cuda)
                path.log_probs.append(taken.log_prob(x, step))
            elif sampler.has_log_prob:
                path.log_probs.append(torch.full((len(x),), torch.inf, device=x.device))
            path.move(x, step)
        return path.samples(sigmas)

    def transition(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sigma_next: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
    ) -> Step:
        """The Gaussian of the training sampler's step from x (R, C, h, w) at sigma (R,) to sigma_next (R,)."""
        return self.sampler.step(x, self.guided_velocity(x, sigma, cond, weights), sigma, sigma_next, self.eta)

    def denoise(self, x: torch.Tensor, sigmas: torch.Tensor, cond: Conditioning, noise: torch.Tensor) -> torch.Tensor:
        """The image latents x0 that the training sampler reaches from x (R, C, h, w) along sigmas (K + 1,).

        Unlike `rollout` with gradient, through all K steps. noise (R, K, C, h, w) is that of a stochastic sampler.
        """
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            step = self.transition(x, sigma.expand(len(x)), sigma_next.expand(len(x)), cond)
            x = step.mean + step.std * noise[:, k] if self.sampler.has_log_prob else step.mean
        return x

    @torch.no_grad()
    def complete(
        self,
        x: torch.Tensor,
        step: torch.Tensor | int,
        sigmas: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """x0 (R, C, h, w) that the ODE reaches from states x (R, C, h, w), without gradient.

        Row r stands at sigmas[step[r]] of sigmas (T + 1,); step is (R,) int64, or one number for all rows. A row is
        computed from its own step on. guidance_scale None is that of training.
        """
        x = x.to(self.device, copy=True)
        at = torch.as_tensor(step, device=x.device).expand(len(x))
        for k in range(int(at.min()), len(sigmas) - 1):
            rows = (at <= k).nonzero()[:, 0]
            v = self.guided_velocity(x[rows], sigmas[k].expand(len(rows)), cond.select(rows), weights, guidance_scale)
            x[rows] = SAMPLERS["ode"].step(x[rows], v, sigmas[k], sigmas[k + 1], self.eta).mean
        return x


@dataclass
class _Path:
    """Where a rollout stands, and what is kept of its way."""

    x: torch.Tensor
    keep_states: bool
    keep_steps: bool
    log_probs: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    stds: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.keep_states:
            self.states.append(self.x)

    def move(self, x: torch.Tensor, step: Step) -> None:
        """Go to x, by a draw from this step."""
        self.x = x
        if self.keep_states:
            self.states.append(x)
        if self.keep_steps:
            self.means.append(step.mean)
            self.stds.append(step.std.expand(len(x)))

    def spread(self, member: torch.Tensor) -> None:
        """Give row member[b] of what was so far to each row b."""
        self.x = self.x[member]
        for kept in (self.log_probs, self.states, self.means, self.stds):
            kept[:] = [value[member] for value in kept]

    def samples(self, sigmas: torch.Tensor) -> Samples:
        """What the rollout returns."""
        kept = (self.states, self.log_probs, self.means, self.stds)
        return Samples(self.x, sigmas, *(torch.stack(values, dim=1) if values else None for values in kept))


def chosen(sampler: Sampler, window: range | None, k: int) -> Sampler:
    """The sampler of step k: the ODE's outside the window, if there is one."""
    return sampler if window is None or k in window else SAMPLERS["ode"]


def _branches(
    group: torch.Tensor | None, branch_step: int, sampler: Sampler, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row its group's place (B,), and for each group its first row (G,)."""
    if group is None:
        raise UsageError("branch_step needs the groups whose images share a path; give group")
    if not sampler.has_log_prob:
        raise UsageError("branches never part with the sampler 'ode'; use 'flow-sde'")
    if not 0 <= branch_step < steps:
        raise UsageError(f"branch_step is {branch_step}; it must be from 0 to {steps - 1}, for {steps} sampler steps")
    numbers, member = group.unique(return_inverse=True)
    rows = torch.arange(len(group), device=group.device)
    leaders = rows.new_full((len(numbers),), len(group)).scatter_reduce(0, member, rows, "amin")
    return member, leaders
