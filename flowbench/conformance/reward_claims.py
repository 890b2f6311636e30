"""What must hold of every reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from flowbench.conformance.verdict import Claim, Finding, Verdict, examine, failed, one_line, passed, skipped
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.evaluation.statistics import mean_ci95
from flowbench.models.presets import load_preset
from flowbench.prompts import as_prompt, load_split, spread
from flowbench.prompts.needs import lacking
from flowbench.registry import rewards
from flowbench.reward import Reward
from flowbench.seeding import generator_for

MODELS = {"images": "mini-sd3", "points": "gaussian"}  # whose presets configure rewards, by what they score
PAIRS = 32
BATCHING_TOLERANCE = 1e-3  # of the scores' standard deviation
GRADIENT_TOLERANCE = 0.05  # relative
GRADIENT_IMAGES = 4
STEPS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # Euclidean length of a finite difference in pixel space


def check_reward(name: str, model: str | None = None) -> Iterator[Finding]:
    """Try every claim on a reward as this model's preset configures it; yields as it goes.

    Raises UsageError for an unknown reward or model.
    """
    yield from examine("reward", name, CLAIMS, RewardBench(name, model))


class RewardBench:
    """A reward, loaded when it is first needed, and what it is tried on.

    Images are rendered scenes of the world of shapes, enlarged to the model's resolution, with their captions; points
    are standard normal.
    """

    def __init__(self, name: str, model: str | None) -> None:
        self.name, self.info = name, rewards.get(name).info
        self.preset = load_preset(model or MODELS[self.info.domain])
        self._made: Reward | str | None = None

    @property
    def reward(self) -> Reward | str:
        """The loaded reward, or in one line why it cannot be loaded."""
        if self._made is None:
            needs = next(filter(None, (lacking(self.info, as_prompt(p)) for p in self.prompts)), None)
            if needs:
                self._made = f"it needs {needs} of every prompt, which the prompts of this check have not"
                return self._made
            try:
                self._made = build_reward(self.name, self.preset, torch.device("cpu"))
            except (RunError, UsageError) as error:
                self._made = one_line(error)
        return self._made

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """PAIRS different prompts."""
        name = "shapes" if self.info.domain == "images" else self.preset.prompts
        chosen = spread(load_split(name, "test"), PAIRS)
        return (chosen * PAIRS)[:PAIRS]

    @cached_property
    def images(self) -> torch.Tensor:
        """What is right for each prompt in turn: images (PAIRS, 3, H, W), or points (PAIRS, 2, 1, 1)."""
        if self.info.domain == "points":
            return torch.randn(PAIRS, 2, 1, 1, generator=generator_for("check", "points"))
        from flowbench.testbeds.shapes.world import parse, render, sample_scenes

        scenes = sample_scenes([parse(p) for p in self.prompts], np.random.default_rng(0))
        small = torch.from_numpy(render(scenes)).float()
        size = (self.preset.height, self.preset.width)
        return torch.nn.functional.interpolate(small, size, mode="nearest")

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """The reward's own score, without the checks that a run puts around it."""
        assert isinstance(self.reward, Reward)
        return self.reward.score(images, prompts)

    @cached_property
    def scores(self) -> torch.Tensor:
        """Scores of the right images, one batch."""
        return self.score(self.images, self.prompts)


def metadata_is_complete(bench: RewardBench) -> Verdict:
    """Source, licence, summary, and bounds in their order."""
    info = bench.info
    missing = [name for name in ("source", "licence", "summary") if not getattr(info, name).strip()]
    if missing:
        return failed(f"missing: {', '.join(missing)}")
    low, high = info.range
    return passed() if low < high else failed(f"its range {low:g} to {high:g} is empty")


def it_loads(bench: RewardBench) -> Verdict:
    """Weights are where the model's preset says."""
    return skipped(f"cannot be loaded: {bench.reward}") if isinstance(bench.reward, str) else passed()


def scores_are_sound(bench: RewardBench) -> Verdict:
    """(B,), float32, finite, within the declared range."""
    if isinstance(bench.reward, str):
        return skipped("it is not loaded")
    scores = bench.scores
    if not isinstance(scores, torch.Tensor) or scores.shape != (PAIRS,):
        return failed(f"its score of {PAIRS} images has shape {tuple(np.shape(scores))}; expected ({PAIRS},)")
    if scores.dtype != torch.float32:
        return failed(f"its score is {str(scores.dtype).removeprefix('torch.')}; expected float32")
    if not scores.isfinite().all():
        return failed("its score is not finite")
    low, high = bench.info.range
    worst = scores[((low - scores).clamp_min(0) + (scores - high).clamp_min(0)).argmax()].item()
    slack = 1e-5 * max(1.0, abs(worst))
    inside = low - slack <= worst <= high + slack
    return passed() if inside else failed(f"it scored {worst:g}, outside of its range {low:g} to {high:g}")


def it_is_deterministic(bench: RewardBench) -> Verdict:
    """The same images and prompts get the same scores, whatever the global generators give."""
    if isinstance(bench.reward, str):
        return skipped("it is not loaded")
    first = bench.scores
    torch.rand(1), np.random.rand()
    again = bench.score(bench.images, bench.prompts)
    if torch.equal(first, again):
        return passed()
    return failed(f"the same images score up to {(first - again).abs().max():.3g} differently the second time")


def batches_do_not_matter(bench: RewardBench) -> Verdict:
    """An image's score does not depend on what else is in its batch."""
    if isinstance(bench.reward, str):
        return skipped("it is not loaded")
    together = bench.scores
    alone = torch.cat(
        [bench.score(image[None], (text,)) for image, text in zip(bench.images, bench.prompts, strict=True)]
    )
    gap, spread_ = (together - alone).abs().max().item(), together.std().item()
    if gap <= BATCHING_TOLERANCE * spread_ + 1e-6 * together.abs().max().item():
        return passed()
    return failed(f"scored alone, an image differs by {gap:.3g}; the standard deviation of its scores is {spread_:.3g}")


def prompts_matter(bench: RewardBench) -> Verdict:
    """A rendered scene scores above another prompt's scene; a reward that says it reads no prompt does not."""
    if isinstance(bench.reward, str):
        return skipped("it is not loaded")
    shifted = bench.prompts[1:] + bench.prompts[:1]
    blind = torch.equal(bench.score(bench.images, shifted), bench.scores)
    if not bench.info.reads_prompt:
        if blind:
            return skipped("it declares reads_prompt=False")
        return failed("it declares reads_prompt=False, but the prompt changes its score")
    if blind:
        return failed("the prompt does not change its score; declare reads_prompt=False if that is meant")
    if bench.info.domain != "images":
        return skipped(f"there is no truth about prompts for {bench.info.domain}")
    # The wrong scenes are the right ones in another order, so that what a reward thinks of the scenes cancels.
    wrong = bench.score(bench.images.roll(1, 0), bench.prompts)
    gain = (bench.scores - wrong).double().numpy()
    low, high = mean_ci95(gain) or (-math.inf, math.inf)
    text = f"a right scene scores {gain.mean():+.3g} [{low:+.3g}, {high:+.3g}] against a wrong one"
    return passed(text) if low > 0 else failed(text)


def the_gradient_is_right(bench: RewardBench) -> Verdict:
    """If it is declared, the gradient reaches the pixels and equals a finite difference along it."""
    if not bench.info.differentiable:
        return skipped("it declares differentiable=False")
    if isinstance(bench.reward, str):
        return skipped("it is not loaded")
    prompts, images = bench.prompts[:GRADIENT_IMAGES], bench.images[:GRADIENT_IMAGES]
    if bench.info.domain == "images":
        images = 0.25 + images / 2  # away from the bounds, where a reward may clamp
    _, gradient = _with_gradient(bench.reward, images, prompts)
    if gradient is None:
        return failed("it declares differentiable=True, but its gradient does not reach the pixels")
    norm = gradient.flatten(1).norm(dim=1)
    if not norm.isfinite().all() or not norm.any():
        return failed("its gradient is zero for every image" if norm.isfinite().all() else "its gradient is not finite")
    direction = (gradient / norm.clamp_min(1e-30).view(-1, 1, 1, 1)).to(images.dtype)
    errors = []
    for step in STEPS:
        ahead, _ = _with_gradient(bench.reward, images + step * direction, prompts)
        behind, _ = _with_gradient(bench.reward, images - step * direction, prompts)
        errors.append(((ahead - behind) / (2 * step) - norm).abs() / norm.max())
    # Long steps err by curvature and short ones by rounding, so that each image has its own best step.
    error = torch.stack(errors).min(0).values.max().item()
    if error <= GRADIENT_TOLERANCE:
        return passed(f"finite difference within {error:.1%}")
    return failed(f"its gradient differs from a finite difference by {error:.0%}")


def _with_gradient(
    reward: Reward, images: torch.Tensor, prompts: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores on the differentiable path, which may resize otherwise than the plain one, and their gradient."""
    x = images.detach().clone().requires_grad_()
    scores = reward.score(x, prompts)
    if not scores.requires_grad:
        return scores, None
    (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
    return scores.detach().double(), None if gradient is None else gradient.double()


CLAIMS: tuple[Claim[RewardBench], ...] = (
    Claim("metadata is complete", metadata_is_complete),
    Claim("it loads", it_loads),
    Claim("scores are sound", scores_are_sound),
    Claim("it is deterministic", it_is_deterministic),
    Claim("batches do not matter", batches_do_not_matter),
    Claim("prompts matter", prompts_matter),
    Claim("its gradient is right", the_gradient_is_right),
)
