"""The typed objects that pass between the stages of a run. P prompts, B images or rows, T sampler steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flowbench.errors import RunError
from flowbench.stored import StoredRows, stored_rows, stored_steps


@dataclass(frozen=True)
class RolloutPlan:
    """What an algorithm asks of its rollouts, beside what its `needs` say.

    sampler: its name, or None for the run's own; shared_noise: the images of a prompt begin with the same noise;
    branch_step k: they also share the first k steps, and part in step k; keep_steps: the Gaussian of each step is kept,
    `Rollout.step_mean` and `step_std`.
    """

    sampler: str | None = None
    shared_noise: bool = False
    branch_step: int | None = None
    keep_steps: bool = False


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of B rows: the embeddings of P different prompts, and which one each row has.

    tensors: the family's own names to (P, ...), on which rows of one prompt share memory; index (B,) int64. Where
    prompts differ in length, shorter ones are padded and a tensor says which tokens are true.
    """

    tensors: Mapping[str, torch.Tensor]
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: torch.Tensor) -> Conditioning:
        """The conditioning of these rows; embeddings are shared, not copied."""
        return replace(self, index=self.index[rows])

    def rows(self) -> dict[str, torch.Tensor]:
        """The tensors of each row, (B, ...), copied."""
        return {name: tensor[self.index] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Rollout:
    """What one iteration generated.

    prompts: B texts; group (B,) int64, equal for images of one prompt; x0 (B, C, h, w); images (B, 3, H, W) in [0, 1];
    reward (B,) float32, raw; sigmas (T + 1,); states (B, T + 1, C, h, w) if the algorithm needs "states" or "log_prob",
    from noise to x0; log_prob (B, T), summed over latent dimensions, if it needs "log_prob"; step_mean (B, T, C, h, w)
    and step_std (B, T), the Gaussian of each step as the behaviour policy took it, if its plan keeps steps; components:
    name to raw scores (B,) of each reward that `reward` is made of.
    Beside a GPU, x0, images, states and step_mean lie in host memory: whatever of them is computed with is fetched to
    the device first (`flowbench.stored`), so take the rows you need before anything else.
    """

    iteration: int
    prompts: tuple[str, ...]
    group: torch.Tensor
    cond: Conditioning
    sigmas: torch.Tensor
    x0: torch.Tensor
    images: torch.Tensor
    reward: torch.Tensor
    states: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    step_mean: torch.Tensor | None = None
    step_std: torch.Tensor | None = None
    components: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def center(self, values: torch.Tensor) -> torch.Tensor:
        """values (B,) minus the mean over the images of the same prompt."""
        return centered_within(values, self.group)

    def normalized_advantage(self, bound: float) -> torch.Tensor:
        """(B,): (r - mean of the prompt's images) / (standard deviation of the iteration), clipped to +-bound."""
        return (self.center(self.reward) / (self.reward.std() + 1e-6)).clamp(-bound, bound)


def means_within(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """For each row the mean, in the values' dtype, of values (R,) or (R, F) over the rows of its group (R,) int64."""
    own = group.unique(return_inverse=True)[1]
    count = torch.bincount(own).to(values.dtype)
    sums = values.new_zeros(len(count), *values.shape[1:]).index_add_(0, own, values)
    return (sums / count.view(-1, *[1] * (values.ndim - 1)))[own]


def centered_within(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """values (R,) or (R, F) minus their `means_within` the rows' groups (R,) int64."""
    return values - means_within(values, group)


@dataclass(frozen=True)
class Batch:
    """Rows for the loss. A row is an image, or one transition of an image's sampling path.

    x0 (R, C, h, w); advantage (R,), what the algorithm made of the rewards (its own docstring says which quantity);
    prompts: R texts; group (R,) int64, rows that belong together and stay in one minibatch where they fit; for
    transitions x, x_next (R, C, h, w), sigma, sigma_next, log_prob_old (R,), and step_mean (R, C, h, w), step_std (R,)
    of a rollout that keeps steps; for pairs rival (R, C, h, w), the other image of the same prompt.
    In a minibatch each row also has its own noise (R, N, C, h, w) and noise_sigma (R,), as the algorithm's `draws`
    asks; and scalars, name to (R,): what `prepare` or `compare` says of each row.
    Rows of a rollout point at its tensors (`flowbench.stored`): neither making nor selecting rows copies latents. The
    rows that `measure` and `loss` are given have them in plain tensors on the device.
    """

    prompts: tuple[str, ...]
    cond: Conditioning
    x0: torch.Tensor
    advantage: torch.Tensor
    x: torch.Tensor | None = None
    x_next: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    sigma_next: torch.Tensor | None = None
    log_prob_old: torch.Tensor | None = None
    group: torch.Tensor | None = None
    rival: torch.Tensor | None = None
    step_mean: torch.Tensor | None = None
    step_std: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    noise_sigma: torch.Tensor | None = None
    scalars: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x (R, C, h, w) and sigma (R,) of rows made by `visited` or `transitions`.

        Raises RunError for rows that have none.
        """
        if self.x is None or self.sigma is None:
            raise RunError("these rows have no state; make them with visited() or transitions()")
        return self.x, self.sigma

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first noise (R, C, h, w) that each row was handed, and its noise_sigma (R,).

        Raises RunError for rows that have none.
        """
        if self.noise is None or self.noise_sigma is None:
            raise RunError("these rows have no noise; ask for it with draws()")
        return self.noise[:, 0], self.noise_sigma

    def transition(self) -> Transition:
        """The sampler steps of rows made by `transitions`.

        Raises RunError for rows that have none.
        """
        x, sigma = self.state()
        if self.x_next is None or self.sigma_next is None or self.log_prob_old is None:
            raise RunError("these rows are no transitions; make them with transitions()")
        return Transition(x, self.x_next, sigma, self.sigma_next, self.log_prob_old)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 of the better and of the worse image (R, C, h, w) of rows made by `pairs`.

        Raises RunError for rows that have none.
        """
        if self.rival is None:
            raise RunError("these rows are no pairs; make them with pairs()")
        return self.x0, self.rival

    def select(self, rows: torch.Tensor) -> Batch:
        """The batch of these rows, (K,) int64."""
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        scalars = {name: value[rows] for name, value in self.scalars.items()}
        prompts = tuple(self.prompts[i] for i in rows.tolist())
        return replace(self, prompts=prompts, cond=self.cond.select(rows), scalars=scalars, **chosen)

    def fetched(self) -> Batch:
        """The same rows with plain tensors, on the device."""
        stored: dict[str, Any] = {
            name: value.fetched() for name, value in vars(self).items() if isinstance(value, StoredRows)
        }
        return replace(self, **stored)


@dataclass(frozen=True)
class Transition:
    """R steps of a sampler: from x to x_next (R, C, h, w), from sigma to sigma_next (R,), with log_prob_old (R,)."""

    x: torch.Tensor
    x_next: torch.Tensor
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    log_prob_old: torch.Tensor


def endpoints(rollout: Rollout, advantage: torch.Tensor, copies: int = 1) -> Batch:
    """`copies` rows per image; rows of a prompt's images that are the same copy share a group."""
    image = torch.arange(len(rollout), device=rollout.group.device).repeat(copies)
    copy = torch.arange(copies, device=image.device).repeat_interleave(len(rollout))
    batch = Batch(rollout.prompts, rollout.cond, stored_rows(rollout.x0, image[: len(rollout)]), advantage)
    return replace(batch.select(image), group=rollout.group[image] * copies + copy)


def pairs(rollout: Rollout, copies: int = 1) -> Batch:
    """`copies` rows per prompt: the image with the highest reward, with that of the lowest as its rival.

    `advantage` is the difference of their rewards, 0 where all images of a prompt score the same.
    """
    groups = [(rollout.group == g).nonzero()[:, 0] for g in rollout.group.unique()]
    best = torch.stack([rows[rollout.reward[rows].argmax()] for rows in groups]).repeat(copies)
    worst = torch.stack([rows[rollout.reward[rows].argmin()] for rows in groups]).repeat(copies)
    batch = endpoints(rollout, rollout.reward).select(best)
    rival = stored_rows(rollout.x0, worst)
    return replace(batch, advantage=batch.advantage - rollout.reward[worst], rival=rival)


def visited(rollout: Rollout, advantage: torch.Tensor, step: torch.Tensor) -> Batch:
    """One row per image: the state x at that image's sampler step (B,) and its sigma."""
    assert rollout.states is not None
    image = torch.arange(len(rollout), device=step.device)
    x = stored_steps(rollout.states, image, step)
    return replace(endpoints(rollout, advantage), x=x, sigma=rollout.sigmas[step])


def idle_steps(sigmas: torch.Tensor) -> torch.Tensor:
    """(T,) bool: whether a sampler step changes nothing worth an update, for sigmas (T + 1,).

    That is a last step less than a quarter as long as the one before it: the grid of diffusers' Euler scheduler ends
    0.144, 0.001, 0 with eight steps, and 0.278, 0.009, 0 with ten and SD3's shift.
    """
    length = -sigmas.diff()
    idle = torch.zeros_like(length, dtype=torch.bool)
    if len(length) > 1:
        idle[-1] = length[-1] < length[-2] / 4
    return idle


def transitions(rollout: Rollout, advantage: torch.Tensor) -> Batch:
    """One row per image and sampler step, image by image; the rollout must have states and log_prob.

    advantage is one per image, (B,), or one per transition, (B, T). Steps without noise (the ODE part of a mixed
    sampler) have no density and are left out, and so is one that changes nothing (`idle_steps`).
    """
    assert rollout.states is not None
    assert rollout.log_prob is not None
    b, t = rollout.log_prob.shape
    image = torch.arange(b, device=rollout.log_prob.device).repeat_interleave(t)
    step = torch.arange(t, device=image.device).repeat(b)
    keep = rollout.log_prob[image, step].isfinite() & ~idle_steps(rollout.sigmas)[step]
    image, step = image[keep], step[keep]
    return Batch(
        prompts=tuple(rollout.prompts[i] for i in image.tolist()),
        cond=rollout.cond.select(image),
        x0=stored_rows(rollout.x0, image),
        advantage=advantage[image] if advantage.ndim == 1 else advantage[image, step],
        x=stored_steps(rollout.states, image, step),
        x_next=stored_steps(rollout.states, image, step + 1),
        sigma=rollout.sigmas[step],
        sigma_next=rollout.sigmas[step + 1],
        log_prob_old=rollout.log_prob[image, step],
        step_mean=None if rollout.step_mean is None else stored_steps(rollout.step_mean, image, step),
        step_std=None if rollout.step_std is None else rollout.step_std[image, step],
    )


@dataclass(frozen=True)
class Draws:
    """The randomness that each row of a minibatch is handed; the core draws it on the host, for all rows at once.

    noises: standard normal latents per row; sigma: whether it gets a noise level, as `training.sigma_distribution`
    says; shared: rows of one group get the same, unless `training.shared_noise` says otherwise; fixed: it may not say
    so, because the formula decides, or because rows of a group are copies of one image.
    """

    noises: int = 0
    sigma: bool = False
    shared: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Compared:
    """What an algorithm makes of the scalars of all rows of a minibatch.

    scalars: name to (R,), handed to each row; metrics: named statistics over the minibatch, for the log.
    """

    scalars: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metrics: Mapping[str, torch.Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """What an algorithm's loss returns.

    policy: (R,) unreduced loss of the model being tuned, or None for no policy update on this batch (warm-up);
    auxiliary: (R,) unreduced loss of the algorithm's own networks (a critic), which have their own optimizer;
    metrics: for the log, named values of the rows, (R,) or fewer where a row has none; the core takes their mean.
    """

    policy: torch.Tensor | None
    auxiliary: torch.Tensor | None = None
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
