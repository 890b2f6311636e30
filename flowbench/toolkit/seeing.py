"""Critics that see what the model sees in a state: its one-step estimate x0_hat = x_sigma - sigma v of the image.

Neither has a gradient. Both learn in closed form once per iteration, from the states that they judged in it: least
squares, because a run has a few thousand rewards, and a network of the same inputs fitted them and predicted nothing
(docs/algorithms/acflow.md). So a row is always judged before its reward is learned from.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import torch

from flowbench.algorithm import RewardFunction
from flowbench.models.flow import predict_x0
from flowbench.models.policy import Policy
from flowbench.models.processes import ALONE, Processes
from flowbench.rollout import centered_within
from flowbench.toolkit.critic import Critic, NetworkCritic, Sight

RANDOM_FEATURES = 1024  # 512: an eighth less explained; 2,048: no more
SHARE_LINEAR = 0.3  # of the features' squared length: the summaries themselves; the rest are the random ones
RIDGE = 0.3  # beside a sum over rows of features of length 1
SUMMARY_SCALE, TEXT_SCALE, SIGMA_SCALE = 0.5, 0.7, 0.2  # how fast the random features vary with each
BOUND = 5.0  # of a standardised summary; the first rows, which set the scale, may be few
BINS = 20  # of sigma, each with a slope of its own


class LeastSquaresCritic(Critic):
    """V = w . phi(x0_hat, h, sigma, c), with w by ridge regression over all rows of the run.

    h are the hidden states of the transformer's last layer, where the model has them; phi are summaries of x0_hat and
    h, and random Fourier features (Rahimi and Recht, 2007) of summaries, text and sigma. `center`: targets have their
    prompt's mean taken out, so that features and V have it too.
    """

    def __init__(self, device: torch.device, center: bool) -> None:
        self.device, self.center = device, center
        self.learned: dict[str, torch.Tensor] = {}
        self._seen: list[tuple[torch.Tensor, ...]] = []

    def measure(self, policy: Policy, rows: Sight, score: RewardFunction) -> torch.Tensor:
        """w . phi (R,), 0 before anything was learned."""
        with policy.anchored(False):  # a moving anchor's features would drift
            v, hidden = policy.velocity_and_hidden(rows.x, rows.sigma, rows.cond, weights="reference")
        summary, text = summaries(rows.x, predict_x0(rows.x, v, rows.sigma), hidden), policy.text_summary(rows.cond)
        sigma, target = rows.sigma.to(summary), rows.target.to(summary)
        self._seen.append((summary, text.to(summary), sigma, target, rows.group))
        if not self.learned:
            return torch.zeros_like(rows.target)
        return (self._features(summary, text, sigma) @ self.learned["w"].to(summary)).to(rows.target)

    def judge(self, measured: torch.Tensor, sigma: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """V, with the prompt's mean taken out if `center`."""
        return centered_within(measured, group) if self.center else measured

    def learn(self, processes: Processes = ALONE) -> None:
        """Solve for w again; the first rows also set the scale of the features."""
        seen, self._seen = _gathered(self._seen, processes), []
        if not seen:
            return
        summary, text, sigma, target, group = seen
        if not self.learned:
            self._begin(summary, text, sigma)
        phi = self._features(summary, text, sigma)
        phi, target = (centered_within(part, group) for part in (phi, target)) if self.center else (phi, target)
        self.learned["gram"] += (phi.T @ phi).double()
        self.learned["moment"] += (phi.T @ target).double()
        ridge = RIDGE * torch.eye(len(self.learned["gram"]), dtype=torch.float64, device=phi.device)
        factor = torch.linalg.cholesky(self.learned["gram"] + ridge)
        self.learned["w"] = torch.cholesky_solve(self.learned["moment"][:, None], factor)[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """The sums over rows, w, and the scale of the features."""
        return dict(self.learned)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.learned = {name: value.to(self.device) for name, value in state.items()}

    def _begin(self, summary: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> None:
        for name, part in (("summary", summary), ("text", text), ("sigma", sigma[:, None])):
            self.learned[f"{name}_mean"], self.learned[f"{name}_std"] = part.mean(0), part.std(0) + 1e-6
        size = 1 + summary.shape[1] + RANDOM_FEATURES
        self.learned["gram"] = summary.new_zeros(size, size, dtype=torch.float64)
        self.learned["moment"] = summary.new_zeros(size, dtype=torch.float64)

    def _features(self, summary: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """phi (R, F), of squared length about 1 beside its constant."""
        summary = self._standardized("summary", summary) / summary.shape[1] ** 0.5
        text = torch.nn.functional.normalize(text.to(summary) - self.learned["text_mean"].to(summary), eps=1e-4)
        sigma = self._standardized("sigma", sigma[:, None].to(summary))
        point = torch.cat([SUMMARY_SCALE * summary, TEXT_SCALE * text, SIGMA_SCALE * sigma], 1)
        frequency, phase = (part.to(point) for part in _waves(point.shape[1]))
        random = (2 / RANDOM_FEATURES) ** 0.5 * torch.cos(point @ frequency + phase)
        one = torch.ones_like(sigma)
        return torch.cat([one, SHARE_LINEAR**0.5 * summary, (1 - SHARE_LINEAR) ** 0.5 * random], 1)

    def _standardized(self, name: str, values: torch.Tensor) -> torch.Tensor:
        mean, std = self.learned[f"{name}_mean"].to(values), self.learned[f"{name}_std"].to(values)
        return ((values - mean) / std).clamp(-BOUND, BOUND)


def _gathered(seen: list[tuple[torch.Tensor, ...]], processes: Processes) -> list[torch.Tensor]:
    """Each quantity of the rows that all processes saw, from those of this one; nothing if there were none."""
    own = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    told = [part for part in processes.objects([part[:0].cpu() for part in own], "seen") if part]  # one may have none
    if not told:
        return []
    return [processes.gather(part) for part in own or [part.to(processes.device) for part in told[0]]]


@functools.cache
def _waves(inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies (inputs, RANDOM_FEATURES) and phases of the random features, the same for every run and device."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.randn(inputs, RANDOM_FEATURES, generator=generator)
    return frequency, 2 * torch.pi * torch.rand(RANDOM_FEATURES, generator=generator)


def summaries(x: torch.Tensor, x0_hat: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """What is kept of a state and its estimate (R, C, h, w) and of hidden states (R, L, D), (R, F); of no place in it.

    Channel means of both, second moments of the estimate's channels, means and mean squares of hidden states.
    """
    pixels = x0_hat.flatten(2)
    moments = pixels @ pixels.transpose(1, 2) / pixels.shape[2]
    upper = torch.triu_indices(*moments.shape[1:], device=moments.device)
    kept = [x.flatten(2).mean(2), pixels.mean(2), moments[:, upper[0], upper[1]]]
    if hidden is not None:
        kept += [hidden.mean(1), hidden.square().mean(1)]
    return torch.cat([part.to(x0_hat) for part in kept], 1)


class PreviewCritic(Critic):
    """V = slope(sigma) r(decode(x0_hat)), the mean over the prompt's images taken out: the reward itself as a control.

    Each row costs a reward call. Slopes are those of least squares over all rows of the run, one per range of sigma,
    and 0 before anything was learned.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, BINS, dtype=torch.float64)  # of preview times target, of preview squared
        self._seen: list[tuple[torch.Tensor, ...]] = []

    def measure(self, policy: Policy, rows: Sight, score: RewardFunction) -> torch.Tensor:
        """r(decode(x0_hat)) (R,), the raw reward."""
        x0_hat = predict_x0(rows.x, policy.velocity(rows.x, rows.sigma, rows.cond), rows.sigma)
        preview = score(policy.decode(x0_hat), rows.prompts).to(rows.target)
        self._seen.append((preview, rows.target, rows.sigma, rows.group))
        return preview

    def judge(self, measured: torch.Tensor, sigma: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """V of each row."""
        product, square = self.sums.to(measured)
        slope = product / square.clamp_min(1e-12)
        return slope[_bin(sigma)] * centered_within(measured, group)

    def learn(self, processes: Processes = ALONE) -> None:
        """Add the rows to the sums."""
        seen, self._seen = _gathered(self._seen, processes), []
        if not seen:
            return
        preview, target, sigma, group = seen
        preview, target = (centered_within(part.double(), group) for part in (preview, target))
        for sums, values in zip(self.sums, (preview * target, preview.square()), strict=True):
            sums.index_add_(0, _bin(sigma).cpu(), values.cpu())

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.sums = state["sums"]


def _bin(sigma: torch.Tensor) -> torch.Tensor:
    return (sigma * BINS).long().clamp(0, BINS - 1)


CriticKind: TypeAlias = Literal["shaped", "direct", "none", "sees", "preview"]


def make_critic(kind: CriticKind, policy: Policy, width: int, center: bool) -> Critic:
    """The critic of that kind; width is that of a network, center as in `LeastSquaresCritic`."""
    if kind in ("shaped", "direct"):
        return NetworkCritic(policy, width)
    if kind == "sees":
        return LeastSquaresCritic(policy.device, center)
    return PreviewCritic() if kind == "preview" else Critic()
