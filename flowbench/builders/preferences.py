"""Pictures and simulated annotators: what the embedded preference models are trained on.

For each of many captions there are several pictures: a scene of it, a scene of a caption that is wrong in one
attribute, and samples of the base model, some of them slightly damaged. Annotators see what the oracle sees. They
prefer what fits the caption and what is cleanly drawn, but each has a taste of its own besides, and errs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from flowbench.builders.data import draw_captions, draw_images
from flowbench.builders.fit import Progress
from flowbench.evaluation.protocol import Progress as Count
from flowbench.models.policy import Policy
from flowbench.prompts import PromptSplit
from flowbench.seeding import generator_for
from flowbench.testbeds.shapes.oracle import View, judge, see
from flowbench.testbeds.shapes.world import SIZE_BOUNDARY, Caption, mutate, parse
from flowbench.training.state import load_state, save_state

PROMPTS, PER_PROMPT = 2000, 6
DRAWN = 2  # of a prompt's pictures: a scene of the caption, and one of a wrong caption; the others are samples
DAMAGED = 0.3  # share of the pictures that are blurred, noisy or partly erased
WARM = ("red", "yellow", "orange")
TRAITS = ("warm", "round", "large", "few", "light")
# Weights of truth and of cleanness, both in [0, 1], of a population's taste, and the deviation of one annotator's from
# it, all against a logistic error of scale 1. Pictures that differ by less than TIE are passed over, as a tie.
CARE, POLISH, TASTE, SPREAD = 14.0, 6.0, 2.7, 0.5
TIE = 1.25
AESTHETIC_POLISH, AESTHETIC_TASTE = 8.0, 6.0  # of those who see no caption


@dataclass(frozen=True)
class Pictures:
    """P captions with K pictures each, and what annotators see in them.

    images (P, K, 3, 32, 32) uint8; truth (P, K), mean of the oracle's verdicts, and clean (P, K), both in [0, 1];
    traits (P, K, len(TRAITS)) in [-1, 1].
    """

    captions: tuple[str, ...]
    images: torch.Tensor
    truth: torch.Tensor
    clean: torch.Tensor
    traits: torch.Tensor


@dataclass(frozen=True)
class Annotators:
    """A population: tastes, weights of TRAITS, normal around `taste` (len(TRAITS),) with deviation `spread`."""

    taste: torch.Tensor
    care: float = CARE
    polish: float = POLISH
    spread: float = SPREAD

    def utilities(self, pictures: Pictures, individual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(N, K) of the pictures of captions `rows` (N,), for annotators who differ from `taste` by `individual`.

        individual (N, 1, len(TRAITS)), standard normal.
        """
        liking = ((self.taste + self.spread * individual) * pictures.traits[rows]).sum(-1)
        return self.care * pictures.truth[rows] + self.polish * pictures.clean[rows] + liking


def population(name: str, seed: int) -> Annotators:
    """The annotators that one reward model learns from; each name has its tastes, and "aesthetic" sees no caption."""
    taste = F.normalize(torch.randn(len(TRAITS), generator=generator_for(seed, "taste", name)), dim=0)
    return (
        Annotators(AESTHETIC_TASTE * taste, 0.0, AESTHETIC_POLISH) if name == "aesthetic" else Annotators(TASTE * taste)
    )


@dataclass(frozen=True)
class Choices:
    """Pairs of pictures of one caption, and which one an annotator preferred.

    row (N,) index of the caption; first, second (N,) indices of its pictures; chosen (N,) 1.0 where an annotator chose
    the first, else 0.0.
    """

    row: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    chosen: torch.Tensor


def draw_choices(pictures: Pictures, annotators: Annotators, n: int, generator: torch.Generator) -> Choices:
    """n choices by fresh annotators, who choose by Bradley and Terry's model of their utilities, and pass over ties.

    Ties make up the number where too few pairs differ.
    """
    asked = 3 * n
    rows = torch.randint(len(pictures.captions), (asked,), generator=generator)
    order = torch.rand(asked, pictures.images.shape[1], generator=generator).argsort(1)
    individual = torch.randn(asked, 1, len(TRAITS), generator=generator)
    u = annotators.utilities(pictures, individual, rows).gather(1, order[:, :2])
    difference = u[:, 0] - u[:, 1]
    chosen = torch.rand(asked, generator=generator) < torch.sigmoid(difference)
    kept = (difference.abs() < TIE).int().argsort(stable=True)[:n]
    return Choices(rows[kept], order[kept, 0], order[kept, 1], chosen[kept].float())


def make_pictures(policy: Policy, captions: list[Caption], rng: np.random.Generator, progress: Count) -> Pictures:
    """PER_PROMPT pictures of each caption, drawn and sampled, with what the oracle sees in them."""
    wrong = [mutate(c, rng) for c in captions]
    kinds = [draw_images(captions, rng), draw_images(wrong, rng)]
    for k in range(DRAWN, PER_PROMPT):
        # A quarter of the samples are of the wrong caption, so that captions matter.
        texts = [(w if k == DRAWN else c).text for c, w in zip(captions, wrong, strict=True)]
        kinds.append(_sample(policy, texts, rng, progress))
    images = torch.stack(kinds, dim=1)
    flat = _damage(images.flatten(0, 1), rng).clamp(0, 1)
    pixels = (flat * 255).round().byte()
    views = see((pixels.float() / 255).numpy())
    asked = [c for c in captions for _ in range(PER_PROMPT)]
    verdicts = [judge(view, caption) for view, caption in zip(views, asked, strict=True)]
    shape = images.shape[:2]
    backgrounds = flat[:, :, 0, 0].mean(1).tolist()
    return Pictures(
        captions=tuple(c.text for c in captions),
        images=pixels.view(images.shape),
        truth=torch.tensor([(v.soft + v.exact) / 2 for v in verdicts]).view(shape),
        clean=torch.tensor([_cleanness(v) for v in views]).view(shape),
        traits=torch.tensor([_traits(v, b) for v, b in zip(views, backgrounds, strict=True)]).view(*shape, -1),
    )


@torch.no_grad()
def _sample(policy: Policy, texts: list[str], rng: np.random.Generator, progress: Count) -> torch.Tensor:
    policy.generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    parts = []
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        parts.append(policy.decode(policy.rollout(policy.encode(part), policy.draw_noise(len(part))).x0).cpu())
        progress(len(part))
    return torch.cat(parts)


def _damage(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur, add noise to, or erase a patch of some of the images (N, 3, 32, 32)."""
    damaged = images.clone()
    for i in np.flatnonzero(rng.random(len(images)) < DAMAGED):
        kind = rng.integers(3)
        if kind == 0:
            damaged[i] = gaussian_blur(images[i], [5, 5], [float(rng.uniform(0.5, 1.5))])
        elif kind == 1:
            noise = rng.normal(0, rng.uniform(0.02, 0.12), images[i].shape)
            damaged[i] = images[i] + torch.from_numpy(noise.astype(np.float32))
        else:
            x, y = rng.integers(0, 24, 2)
            damaged[i, :, y : y + 8, x : x + 8] = images[i, :, :1, :1]
    return damaged


def _cleanness(view: View) -> float:
    """How cleanly the objects are drawn, in [0, 1]; 0 without any."""
    if not view.objects:
        return 0.0
    drawn = float(np.mean([max(o.fit) * o.purity for o in view.objects]))
    return max(0.0, drawn - min(view.stray / 20.0, 1.0))


def _traits(view: View, background: float) -> tuple[float, ...]:
    """What tastes differ about, each in [-1, 1], in the order of TRAITS."""
    light = 2 * background - 1
    if not view.objects:
        return (0.0, 0.0, 0.0, 1.0, light)
    warm = np.mean([1.0 if o.color in WARM else -1.0 for o in view.objects])
    round_ = np.mean([1.0 if o.shape == "circle" else -1.0 for o in view.objects])
    large = np.clip(np.mean([(o.radius - SIZE_BOUNDARY) / 1.5 for o in view.objects]), -1, 1)
    few = np.clip((2 - len(view.objects)) / 2, -1, 1)
    return (float(warm), float(round_), float(large), float(few), light)


def training_pictures(policy: Policy, work: Path, seed: int, progress: Progress, prompts: int = PROMPTS) -> Pictures:
    """Pictures of random training captions; made once, afterwards read from the work folder."""
    rng = np.random.default_rng([seed, 6])
    return _stored(policy, work / "pictures.safetensors", draw_captions(prompts, rng), rng, progress)


def fresh_pictures(policy: Policy, split: PromptSplit, work: Path, seed: int, progress: Progress) -> Pictures:
    """Pictures of captions that no reward model was trained on, to measure it with."""
    rng = np.random.default_rng([seed, 7])
    captions = [parse(p.text) for p in split.prompts]
    return _stored(policy, work / f"pictures-{split.name}.safetensors", captions, rng, progress)


def _stored(
    policy: Policy, path: Path, captions: list[Caption], rng: np.random.Generator, progress: Progress
) -> Pictures:
    if not path.exists():
        total, done = len(captions) * (PER_PROMPT - DRAWN), 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            progress(path.stem, done, total, 0.0)

        save_state(path, vars(make_pictures(policy, captions, rng, count)))
    state = load_state(path)
    return Pictures(**{**state, "captions": tuple(state["captions"])})
