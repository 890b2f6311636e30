"""The gradient of a policy's mean reward through the whole sampler: computed once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from flowbench.caches import digest
from flowbench.errors import RunError
from flowbench.evaluation.exact import quadratic_form
from flowbench.evaluation.exact_gradient import exact_gradient
from flowbench.files import write_atomically
from flowbench.models.families.plane import on_plane
from flowbench.models.flow import get_sampler
from flowbench.models.policy import Policy
from flowbench.prompts import PromptSplit
from flowbench.reward import Reward, checked_score
from flowbench.scoring.checkpoints import fingerprint
from flowbench.seeding import generator_for

MICROBATCH, POINTS = 16, 4096  # images, and points in the plane, that are sampled at a time


@dataclass(frozen=True)
class SamplingPath:
    """A sampling path: the sampler's name, its sigmas (T + 1) from 1 to 0, its noise level and the guidance scale."""

    sampler: str
    sigmas: tuple[float, ...]
    eta: float
    guidance_scale: float


@dataclass(frozen=True)
class Identity:
    """All that decides a true gradient. weights: hash of the tuned module; prompts: hash of the training split."""

    model: str
    weights: str
    reward: str
    provenance: dict[str, Any]
    path: SamplingPath
    prompts: str
    images: int
    parts: int
    seed: int

    def text(self) -> str:
        """As JSON; equal texts are equal gradients."""
        content = asdict(self)
        if not get_sampler(self.path.sampler).has_log_prob:
            content["path"]["eta"] = None
        return json.dumps(content, sort_keys=True, default=str)

    def key(self) -> str:
        """Sixteen hex digits over everything."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrueGradient:
    """parts: J independent estimates (D,) of the gradient in `Policy.trainable_parameters`, of equally many images.

    images: in all; 0 for one that is exact, which has one part. reused: whether it was read from disk.
    """

    parts: tuple[torch.Tensor, ...]
    images: int
    reused: bool


def identify(
    policy: Policy, reward: Reward, prompts: PromptSplit, path: SamplingPath, images: int, parts: int, seed: int
) -> Identity:
    """The identity of the true gradient of a policy that has no views but "current" and "reference" yet."""
    return Identity(
        model=policy.preset.name,
        weights=fingerprint(policy.transformer),
        reward=reward.info.name,
        provenance=reward.provenance(),
        path=path,
        prompts=prompts.sha256,
        images=images,
        parts=parts,
        seed=seed,
    )


def true_gradient(
    policy: Policy,
    reward: Reward,
    prompts: PromptSplit,
    identity: Identity,
    cache: Path,
    microbatch: int | None = None,
    recompute: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrueGradient:
    """The gradient that `identity` describes: exact in the plane where that is possible, from the cache, or computed.

    microbatch: images sampled with gradient at a time; recompute: whether each sampler step is computed again in the
    backward pass, which keeps the memory of one step. Raises RunError for a cached file of another gradient.
    """
    path = identity.path
    sampler, sigmas = get_sampler(path.sampler), torch.tensor(path.sigmas)
    if on_plane(policy):
        exact = exact_gradient(policy, quadratic_form(reward), sampler, sigmas, path.eta)
        if exact is not None:
            return TrueGradient((exact,), images=0, reused=False)
    file = cache / f"{identity.key()}.safetensors"
    if file.is_file():
        return read_gradient(file, identity)
    size = microbatch or (POINTS if on_plane(policy) else MICROBATCH)
    total, kept = identity.images, []
    for part in range(identity.parts):
        done = part * (total // identity.parts)

        def tick(n: int, done: int = done) -> None:
            progress(done + n, total)

        kept.append(_part(policy, reward, prompts, identity, part, size, recompute, tick))
    gradient = TrueGradient(tuple(kept), total, reused=False)
    _keep(file, gradient, identity)
    return gradient


def read_gradient(file: Path, identity: Identity) -> TrueGradient:
    """The gradient in a file, if it is the one that `identity` describes; else RunError."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            said = stored.metadata() or {}
            parts = stored.get_tensor("parts")
    except (SafetensorError, OSError) as error:
        raise RunError(f"'{file}' is damaged: {str(error).splitlines()[0]}; delete it") from error
    if said.get("identity") != identity.text():
        raise RunError(f"'{file}' holds the gradient of other weights or settings than its name says; delete it")
    # Those of flowbench 0.1 have no checksum.
    if said.keys() != {"identity"} and said.get("sha256") != digest({"parts": parts}):
        raise RunError(f"'{file}' is damaged: its content is not that of its checksum; delete it")
    return TrueGradient(tuple(parts), identity.images, reused=True)


def _keep(file: Path, gradient: TrueGradient, identity: Identity) -> None:
    parts = {"parts": torch.stack(gradient.parts)}
    said = {"identity": identity.text(), "sha256": digest(parts)}
    write_atomically(file, lambda place: save_file(parts, place, metadata=said))


def _part(
    policy: Policy,
    reward: Reward,
    prompts: PromptSplit,
    identity: Identity,
    part: int,
    size: int,
    recompute: bool,
    tick: Callable[[int], None],
) -> torch.Tensor:
    """One of the independent estimates (D,): the mean over its images."""
    n, parameters = identity.images // identity.parts, policy.trainable_parameters()
    draw = generator_for(identity.seed, "true-gradient", part)
    chosen = torch.randint(len(prompts.prompts), (n,), generator=draw)
    policy.generator = draw
    for p in parameters:
        p.grad = None
    done = 0
    for rows in chosen.split(size):
        texts = tuple(prompts.prompts[i] for i in rows.tolist())
        x0 = _sample(policy, texts, identity.path, recompute)
        (checked_score(reward, policy.decode(x0), texts).sum() / n).backward()
        done += len(rows)
        tick(done)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def _sample(policy: Policy, texts: tuple[str, ...], path: SamplingPath, recompute: bool) -> torch.Tensor:
    """x0 of these prompts, with gradient through every step."""
    sampler, cond, x = get_sampler(path.sampler), policy.encode(texts), policy.draw_noise(len(texts))

    def advance(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        v = policy.guided_velocity(x, sigma.expand(len(x)), cond, guidance_scale=path.guidance_scale)
        step = sampler.step(x, v, sigma, sigma_next, path.eta)
        return step.mean + step.std * noise

    for sigma, sigma_next in _steps(path, x.device):
        noise = policy.draw_noise(len(x)) if sampler.has_log_prob else torch.zeros_like(x)
        if recompute:
            x = checkpoint(advance, x, sigma, sigma_next, noise, use_reentrant=False)
        else:
            x = advance(x, sigma, sigma_next, noise)
    return x


def _steps(path: SamplingPath, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return pairwise(torch.tensor(path.sigmas, device=device))
