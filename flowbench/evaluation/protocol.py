"""Scores a model on fixed prompts and fixed noise, so that two models differ by their weights alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from flowbench.config import EvaluationConfig, hashable, undivided
from flowbench.evaluation.album import Keep, Page
from flowbench.evaluation.judging import Judges, Lot, Progress, score_images
from flowbench.models.flow import interpolate, velocity_error
from flowbench.models.memory import Portion
from flowbench.models.policy import Policy
from flowbench.models.presets import OWN_SPACING
from flowbench.prompts import Prompt, PromptSplit, spread
from flowbench.record import VERSION
from flowbench.rollout import Conditioning
from flowbench.seeding import generator_for
from flowbench.terms import UNGUIDED

W2_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
GRID_PROMPTS, GRID_IMAGES = 12, 4
GRID_PIXELS = 2**20  # of small images there are more prompts, as many as have so many pixels together


@dataclass(frozen=True)
class SplitScores:
    """Per-prompt scores of one model on one split.

    prompts: P prompts; scores: metric name to (P,) means over a prompt's images; grid: images (p, n, 3, H, W) of the
    first prompts, for a picture; each: the scores of these images, (p, n), by the metrics that score images.
    """

    prompts: tuple[Prompt, ...]
    scores: dict[str, np.ndarray]
    grid: torch.Tensor
    each: dict[str, np.ndarray] = field(default_factory=dict)


def protocol_hash(
    config: EvaluationConfig, splits: list[PromptSplit], spacing: str = OWN_SPACING, version: int = VERSION
) -> str:
    """Ten hex digits over the protocol, its prompt files and the model's `sigma_spacing`; version: of the record."""
    content: dict[str, Any] = {"config": hashable(undivided(config)), "splits": {s.name: s.sha256 for s in splits}}
    if version > 1:  # in the first, all seeds had the same noise
        content["noise"] = "a block for each seed"
    if spacing != OWN_SPACING:  # all that there was, once
        content["sigma_spacing"] = spacing
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def guidance_scales(policy: Policy, config: EvaluationConfig) -> dict[str, float]:
    """The scales that the images of an evaluation are sampled at, by the ending of their metrics' names.

    The model's own or the configured scale, with no ending; and where it is above 1, 1, which is none.
    """
    scale = policy.preset.guidance_scale if config.guidance_scale is None else config.guidance_scale
    return {"": scale, UNGUIDED: 1.0} if config.unguided and scale > 1 else {"": scale}


def count_images(policy: Policy, splits: list[PromptSplit], config: EvaluationConfig) -> int:
    """How many images of one model an evaluation generates."""
    prompts = sum(min(len(split.prompts), config.prompts) for split in splits)
    return prompts * config.images_per_prompt * len(guidance_scales(policy, config))


MEGAPIXEL = 2**20


def decode_batch(policy: Policy, config: EvaluationConfig) -> int:
    """How many images an evaluation decodes at a time: at 512 x 512 pixels each costs about 0.4 GiB."""
    if config.decode_batch is not None:
        return min(config.decode_batch, config.batch)
    height, width = np.broadcast_to(policy.preset.resolution, 2).tolist()
    return max(1, min(config.batch, 2 * MEGAPIXEL // (height * width)))


class Portions:
    """How many images an evaluation samples, decodes and scores at a time; less once memory has run out."""

    def __init__(self, policy: Policy, config: EvaluationConfig) -> None:
        self.rollout = Portion("sampling in the evaluation", config.batch, ledger=policy.evaluations)
        self.decode = Portion("decoding in the evaluation", decode_batch(policy, config))
        self.score = Portion("scoring in the evaluation", config.batch)
        self._planned = self._sizes()

    @property
    def undivided(self) -> bool:
        """Whether memory has never run out, so that the last bits are those of the configuration."""
        return self._sizes() == self._planned

    def _sizes(self) -> tuple[int | None, ...]:
        return self.rollout.size, self.decode.size, self.score.size


def score_split(
    policy: Policy,
    weights: str,
    split: PromptSplit,
    judges: Judges,
    config: EvaluationConfig,
    progress: Progress,
    portions: Portions | None = None,
    page: Page | None = None,
) -> SplitScores:
    """Generate and score `config.images_per_prompt` images for each prompt of a split, with one weight view.

    Once for each of `guidance_scales`, from the same noise; the grid shows those with guidance. All images are
    generated first, into the host's memory, and then scored by one judge after the other. The processes that share the
    policy's work have some of the prompts each, and all of them the scores of all. page: of an album, for the images.
    """
    scales, portions = guidance_scales(policy, config), portions or Portions(policy, config)
    parts = {
        ending: _shared(
            *(policy, weights, split, judges, config, scale, progress, portions),
            page and page(split.name, ending, scale),
        )
        for ending, scale in scales.items()
    }
    scores = {f"{metric}{ending}": v for ending, part in parts.items() for metric, v in part.scores.items()}
    return replace(parts[""], scores=scores)


def _shared(
    policy: Policy,
    weights: str,
    split: PromptSplit,
    judges: Judges,
    config: EvaluationConfig,
    scale: float,
    progress: Progress,
    portions: Portions,
    keep: Keep | None,
) -> SplitScores:
    """The scores of all prompts at one scale, from those that this process generates and those of the others."""
    prompts, processes = spread(split, config.prompts), policy.processes
    own, part = processes.share(len(prompts)), None
    if own:
        part = _score(policy, weights, split.name, (prompts, own), judges, config, scale, progress, portions, keep)
    told = [other for other in processes.objects(part, f"scores of {split.name}") if other is not None]
    if len(told) == 1:
        return told[0]
    progress((len(prompts) - len(own)) * config.images_per_prompt)
    scores = {metric: np.concatenate([other.scores[metric] for other in told]) for metric in told[0].scores}
    shown = [other for other in told if len(other.grid)]
    each = {metric: np.concatenate([other.each[metric] for other in shown]) for metric in shown[0].each}
    return SplitScores(prompts, scores, torch.cat([other.grid for other in shown]), each)


def _score(
    policy: Policy,
    weights: str,
    split: str,
    asked_for: tuple[tuple[Prompt, ...], range],
    judges: Judges,
    config: EvaluationConfig,
    scale: float,
    progress: Progress,
    portions: Portions,
    keep: Keep | None,
) -> SplitScores:
    """The scores at one scale of some of a split's prompts, given as all of them and which ones."""
    (prompts, own), n = asked_for, config.images_per_prompt
    rows = [(p, k) for p in own for k in range(n)]
    latents: list[torch.Tensor] = []
    distances: list[torch.Tensor] = []
    images: torch.Tensor | None = None

    def draw(where: slice) -> _Drawn:
        return _draw(policy, weights, split, prompts, rows[where], where.start, config, scale, portions)

    for drawn in portions.rollout.map(draw, len(rows)):
        begin = sum(map(len, latents))
        if images is None:
            images = torch.empty((len(rows), *drawn.images.shape[1:]))
        images[begin : begin + len(drawn.images)] = drawn.images
        latents.append(drawn.latents)
        distances.append(drawn.distances)
        progress(len(drawn.images))
    assert images is not None
    lot = Lot(images.__getitem__, tuple(prompts[p] for p, _ in rows))
    collected = score_images(judges, [lot], policy.device, portions.score)
    if keep is not None:
        keep(prompts, rows, images, collected)
    by_image = {m: v.reshape(len(own), n) for m, v in collected.items()}
    per_prompt = {m: v.mean(1).numpy() for m, v in by_image.items()}
    per_prompt["w2"] = torch.cat(distances).numpy()
    per_prompt["diversity"] = within_prompt_diversity(torch.cat(latents).reshape(len(own), n, -1)).numpy()
    pixels = min(n, GRID_IMAGES) * math.prod(images.shape[2:])
    shown = max(0, max(GRID_PROMPTS, GRID_PIXELS // pixels) - own.start)
    grid = images.reshape(len(own), n, *images.shape[1:])[:shown, :GRID_IMAGES].clone()
    each = {m: v[:shown, :GRID_IMAGES].numpy().copy() for m, v in by_image.items()}
    return SplitScores(prompts[own.start : own.stop], per_prompt, grid, each)


@dataclass(frozen=True)
class _Drawn:
    """Some images (B, 3, H, W), their latents, and the w2 (P,) of the prompts whose first image is among them."""

    images: torch.Tensor
    latents: torch.Tensor
    distances: torch.Tensor


@torch.no_grad()
def _draw(
    policy: Policy,
    weights: str,
    split: str,
    prompts: Sequence[Prompt],
    rows: list[tuple[int, int]],
    start: int,
    config: EvaluationConfig,
    scale: float,
    portions: Portions,
) -> _Drawn:
    """The images of these rows (prompt, image), which begin at `start`, on the host."""
    cond = policy.encode([prompts[p] for p, _ in rows])
    noise = torch.cat([_noise(policy, config.seed, split, p, k) for p, k in rows])
    policy.generator = generator_for(config.seed, "evaluation", split, start)
    x0 = policy.rollout(cond, noise, num_steps=config.num_steps, guidance_scale=scale, weights=weights).x0
    # Of one image per prompt: all of them would take a fifth of an evaluation's time.
    first = torch.tensor([k for k, (_, image) in enumerate(rows) if image == 0], device=policy.device)
    distances = torch.zeros(len(first))
    if weights != "reference" and len(first):
        distances = _velocity_distance(policy, x0[first], noise[first], cond.select(first), weights).cpu()
    parts = portions.decode.map(lambda part: policy.decode(x0[part]).cpu(), len(x0))
    return _Drawn(torch.cat(list(parts)), x0.cpu(), distances)


def within_prompt_diversity(latents: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of a prompt's images of the root mean square distance of their latents.

    latents (P, n, D) with n >= 2; returns (P,). 0 means that all images of a prompt are the same.
    """
    n, d = latents.shape[1:]
    distance = torch.cdist(latents, latents) / d**0.5
    return distance.sum((1, 2)) / (n * (n - 1))


def _noise(policy: Policy, seed: int, split: str, prompt: int, image: int) -> torch.Tensor:
    """Noise that depends on prompt and image alone, not on how images are batched."""
    policy.generator = generator_for(seed, "evaluation-noise", split, prompt, image)
    return policy.draw_noise(1)


def _velocity_distance(
    policy: Policy, x0: torch.Tensor, eps: torch.Tensor, cond: Conditioning, weights: str
) -> torch.Tensor:
    """mean_d (v - v_ref)^2 on re-noised samples, averaged over fixed sigmas: bounds the Wasserstein-2 distance of the
    two flows (2502.06061, section 4.2). Returns (B,)."""
    total = torch.zeros(len(x0), device=x0.device)
    for value in W2_SIGMAS:
        sigma = torch.full((len(x0),), value, device=x0.device)
        x = interpolate(x0, eps, sigma)
        v, v_ref = policy.velocity(x, sigma, cond, weights), policy.velocity(x, sigma, cond, "reference")
        total += velocity_error(v, v_ref)
    return total / len(W2_SIGMAS)


def by_category(split: SplitScores, metric: str) -> Iterator[tuple[str, np.ndarray]]:
    """The per-prompt scores of each category in turn."""
    categories = [p.category for p in split.prompts]
    for category in dict.fromkeys(categories):
        yield category, split.scores[metric][[c == category for c in categories]]
