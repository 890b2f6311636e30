"""Scores a model on fixed prompts and fixed noise, so that two models differ by their weights alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flowbench.config import EvaluationConfig, hashable
from flowbench.errors import RunError
from flowbench.models.flow import interpolate, velocity_error
from flowbench.models.policy import Policy
from flowbench.models.presets import OWN_SPACING
from flowbench.prompts import Prompt, PromptSplit, spread
from flowbench.reward import Reward, checked_score
from flowbench.rollout import Conditioning
from flowbench.seeding import generator_for
from flowbench.terms import UNGUIDED
from flowbench.testbeds.shapes.truth import truth

W2_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
GRID_PROMPTS, GRID_IMAGES = 12, 4

Progress = Callable[[int], None]  # images done


@dataclass(frozen=True)
class SplitScores:
    """Per-prompt scores of one model on one split.

    prompts: P prompts; scores: metric name to (P,) means over a prompt's images; grid: images (p, n, 3, H, W) of the
    first prompts, for a picture.
    """

    prompts: tuple[Prompt, ...]
    scores: dict[str, np.ndarray]
    grid: torch.Tensor


@dataclass(frozen=True)
class Judges:
    """What scores the images: reward models by name, and whether the testbed's oracle may be asked.

    held_out: names of those that the run does not train on.
    """

    rewards: dict[str, Reward]
    oracle: bool
    held_out: tuple[str, ...] = ()


def protocol_hash(config: EvaluationConfig, splits: list[PromptSplit], spacing: str = OWN_SPACING) -> str:
    """Ten hex digits over the protocol, its prompt files and the model's `sigma_spacing`."""
    content: dict[str, Any] = {"config": hashable(config), "splits": {s.name: s.sha256 for s in splits}}
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


def score_split(
    policy: Policy, weights: str, split: PromptSplit, judges: Judges, config: EvaluationConfig, progress: Progress
) -> SplitScores:
    """Generate and score `config.images_per_prompt` images for each prompt of a split, with one weight view.

    Once for each of `guidance_scales`, from the same noise; the grid shows those with guidance. The processes that
    share the policy's work have some of the prompts each, and all of them the scores of all.
    """
    scales = guidance_scales(policy, config)
    parts = {ending: _shared(policy, weights, split, judges, config, s, progress) for ending, s in scales.items()}
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
) -> SplitScores:
    """The scores of all prompts at one scale, from those that this process generates and those of the others."""
    prompts, processes = spread(split, config.prompts), policy.processes
    own, part = processes.share(len(prompts)), None
    if own:
        part = _score(policy, weights, split.name, (prompts, own), judges, config, scale, progress)
    told = [other for other in processes.objects(part, f"scores of {split.name}") if other is not None]
    if len(told) == 1:
        return told[0]
    progress((len(prompts) - len(own)) * config.images_per_prompt)
    scores = {metric: np.concatenate([other.scores[metric] for other in told]) for metric in told[0].scores}
    return SplitScores(prompts, scores, torch.cat([other.grid for other in told if len(other.grid)]))


def _score(
    policy: Policy,
    weights: str,
    split: str,
    asked_for: tuple[tuple[Prompt, ...], range],
    judges: Judges,
    config: EvaluationConfig,
    scale: float,
    progress: Progress,
) -> SplitScores:
    """The scores at one scale of some of a split's prompts, given as all of them and which ones."""
    (prompts, own), n = asked_for, config.images_per_prompt
    rows = [(p, k) for p in own for k in range(n)]
    collected: dict[str, list[torch.Tensor]] = {}
    latents, grid, distances = [], [], []
    for start in range(0, len(rows), config.batch):
        part = rows[start : start + config.batch]
        asked = tuple(prompts[p] for p, _ in part)
        cond = policy.encode(asked)
        noise = torch.cat([_noise(policy, config.seed, split, p, k) for p, k in part])
        policy.generator = generator_for(config.seed, "evaluation", split, start)
        samples = policy.rollout(cond, noise, num_steps=config.num_steps, guidance_scale=scale, weights=weights)
        with torch.no_grad():
            images = policy.decode(samples.x0)
            scores = score_images(judges, images, asked)
            # Of one image per prompt: all of them would take a fifth of an evaluation's time.
            first = torch.tensor([k for k, (_, image) in enumerate(part) if image == 0], device=policy.device)
            if weights != "reference" and len(first):
                distances.append(
                    _velocity_distance(policy, samples.x0[first], noise[first], cond.select(first), weights)
                )
        for name, values in scores.items():
            collected.setdefault(name, []).append(values.float().cpu())
        latents.append(samples.x0.cpu())
        grid += [
            image.cpu() for image, (p, k) in zip(images, part, strict=True) if p < GRID_PROMPTS and k < GRID_IMAGES
        ]
        progress(len(part))
    per_prompt = {m: torch.cat(v).reshape(len(own), n).mean(1).numpy() for m, v in collected.items()}
    per_prompt["w2"] = torch.cat(distances).cpu().numpy() if distances else np.zeros(len(own), dtype=np.float32)
    per_prompt["diversity"] = within_prompt_diversity(torch.cat(latents).reshape(len(own), n, -1)).numpy()
    shown = min(n, GRID_IMAGES)
    picture = torch.stack(grid) if grid else images[:0].cpu()
    return SplitScores(prompts[own.start : own.stop], per_prompt, picture.reshape(-1, shown, *picture.shape[1:]))


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


def score_images(judges: Judges, images: torch.Tensor, prompts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Scores (B,) by metric of images (B, 3, H, W) in [0, 1] and their prompts.

    Raises RunError, naming the judge, for a bad score, and for images or prompts that the oracle cannot read.
    """
    scores = {name: checked_score(reward, images, prompts) for name, reward in judges.rewards.items()}
    if judges.oracle:
        try:
            scores |= truth(images, prompts)
        except RunError as error:
            raise RunError(f"{error}; name other judges with evaluation.judges") from error
    return scores


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
