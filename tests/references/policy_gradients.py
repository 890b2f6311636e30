"""Writes policy_gradients.json: what the reference implementations compute on a few fixed numbers, in float64.

    python tests/references/policy_gradients.py

It is written from these files alone, with numpy, and shares no code with flowbench:
- yifan123/flow_grpo, commit ac4c86e8: flow_grpo/diffusers_patch/sd3_sde_with_logprob.py (Flow-SDE's mean, deviation and
  log-probability), flow_grpo/stat_tracking.py (advantages), scripts/train_sd3.py (loss, KL, images left out)
- IamCreateAI/FlowCPS, commit 814c3597: flow_grpo/diffusers_patch/sd3_sde_with_logprob.py (CPS), scripts/train_sd3.py
  (its KL)
- X-GenGroup/Flow-Factory, commit a0b2bc5a: src/flow_factory/scheduler/flow_match_euler_discrete.py (Dance-SDE)
- kvablack/ddpo-pytorch, commit 1958463f: ddpo_pytorch/stat_tracking.py (buffer), scripts/train.py (loss)
- google-research/google-research, commit 1d49f2c0: dpok/train_online_pg.py (advantage, loss, value's loss); its rewards
  are standardised and its KL is the paper's, which algorithms/dpok.py says
The codes' log-probabilities and KLs are means over latent dimensions.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ETA, CLIP, BOUND, BETA = 0.7, 0.02, 5.0, 0.3
BUFFER, MIN_COUNT = 4, 4


@dataclass
class Moves:
    """Gaussians of many steps: mean (..., D), std (...), d mean / d v (...), and the sampler's name."""

    name: str
    mean: np.ndarray
    std: np.ndarray
    slope: np.ndarray
    dt: np.ndarray

    def log_prob(self, x_next: np.ndarray) -> np.ndarray:
        distance = (x_next - self.mean) ** 2
        if self.name == "cps":
            return -distance.mean(-1)
        std = self.std[..., None]
        return (-distance / (2 * std**2) - np.log(std) - np.log(np.sqrt(2 * np.pi))).mean(-1)

    def log_prob_slope(self, x_next: np.ndarray) -> np.ndarray:
        """d log_prob / d v, (..., D)."""
        per_mean = 2 * (x_next - self.mean) / x_next.shape[-1]
        if self.name != "cps":
            per_mean = per_mean / (2 * self.std[..., None] ** 2)
        return per_mean * self.slope[..., None]

    def kl_weight(self, exact: bool) -> np.ndarray:
        """What the mean squared difference of two means is multiplied by."""
        if self.name == "cps":
            return np.ones_like(self.std)
        variance = self.std**2
        if self.name == "flow-sde" and not exact:
            variance = variance / -self.dt  # the code's std_dev_t, without sqrt(-dt)
        return 1 / (2 * variance)


def moves(name: str, x: np.ndarray, v: np.ndarray, sigma: np.ndarray, sigma_next: np.ndarray) -> Moves:
    s, s_next = sigma[..., None], sigma_next[..., None]
    dt = s_next - s
    if name == "flow-sde":
        std_dev_t = np.sqrt(s / (1 - np.where(s == 1, s_next, s))) * ETA
        slope = (1 + std_dev_t**2 * (1 - s) / (2 * s)) * dt
        mean, std = x * (1 + std_dev_t**2 / (2 * s) * dt) + v * slope, std_dev_t * np.sqrt(-dt)
    elif name == "cps":
        std = s_next * np.sin(ETA * np.pi / 2)
        root = np.sqrt(s_next**2 - std**2)
        mean = (x - s * v) * (1 - s_next) + (x + v * (1 - s)) * root
        slope = -s * (1 - s_next) + (1 - s) * root
    else:
        log_term = 0.5 * ETA**2 * (x - (x - s * v) * (1 - s)) / s**2
        mean, std = x + (v + log_term) * dt, ETA * np.sqrt(-dt)
        slope = (1 + 0.5 * ETA**2 * (1 - s) / s) * dt
    return Moves(name, mean, std[..., 0], slope[..., 0], dt[..., 0])


def buffered(buffers: dict[int, deque], prompts: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """DDPO's advantages, before they are clipped."""
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        own = rewards[prompts == prompt]
        buffers.setdefault(int(prompt), deque(maxlen=BUFFER)).extend(own)
        kept = rewards if len(buffers[int(prompt)]) < MIN_COUNT else np.array(buffers[int(prompt)])
        advantages[prompts == prompt] = (own - kept.mean()) / (kept.std() + 1e-6)
    return advantages


def grouped(prompts: np.ndarray, rewards: np.ndarray, global_std: bool) -> np.ndarray:
    """Flow-GRPO's advantages, before they are clipped."""
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        own = rewards[prompts == prompt]
        std = (rewards if global_std else own).std() + 1e-4
        advantages[prompts == prompt] = (own - own.mean()) / std
    return advantages


def surrogate(a: np.ndarray, log_ratio: np.ndarray, both_sides: bool) -> tuple[np.ndarray, np.ndarray]:
    """The clipped loss and its derivative by the log-ratio; `both_sides` is DPOK's, else PPO's."""
    ratio = np.exp(log_ratio)
    clipped = np.clip(ratio, 1 - CLIP, 1 + CLIP)
    inside = ratio == clipped
    if both_sides:
        return -a * clipped, np.where(inside, -a * ratio, 0.0)
    flows = inside | (-a * ratio > -a * clipped)
    return np.maximum(-a * ratio, -a * clipped), np.where(flows, -a * ratio, 0.0)


@dataclass
class Paths:
    """x (B, T + 1, D); sigmas (T + 1,); velocities v, v_old, v_ref (B, T, D) and values V (B, T) of the transitions."""

    x: np.ndarray
    sigmas: np.ndarray
    v: np.ndarray
    v_old: np.ndarray
    v_ref: np.ndarray
    values: np.ndarray

    def step(self, name: str, v: np.ndarray) -> Moves:
        shape = v.shape[:2]
        sigma, sigma_next = (np.broadcast_to(s, shape) for s in (self.sigmas[:-1], self.sigmas[1:]))
        return moves(name, self.x[:, :-1], v, sigma, sigma_next)


def loss(
    paths: Paths, name: str, a: np.ndarray, beta: float, exact: bool, both_sides: bool = False, drop: bool = False
) -> dict[str, Any]:
    """The mean loss over transitions and its gradient by v; a (B, T) advantages."""
    x_next, now = paths.x[:, 1:], paths.step(name, paths.v)
    old, reference = paths.step(name, paths.v_old), paths.step(name, paths.v_ref)
    log_ratio = now.log_prob(x_next) - old.log_prob(x_next)
    rows, slope = surrogate(np.clip(a, -BOUND, BOUND), log_ratio, both_sides)
    gradient = slope[..., None] * now.log_prob_slope(x_next)
    apart, weight = now.mean - reference.mean, beta * now.kl_weight(exact)
    rows = rows + weight * (apart**2).mean(-1)
    gradient = gradient + (weight * now.slope)[..., None] * 2 * apart / apart.shape[-1]
    kept = np.abs(a).sum(1) != 0 if drop else np.ones(len(a), dtype=bool)
    gradient = np.where(kept[:, None, None], gradient, 0.0) / (kept.sum() * a.shape[1])
    inside = np.abs(np.exp(log_ratio) - 1) < CLIP
    return {"loss": rows[kept].mean(), "gradient": gradient, "inside": inside.mean()}


def samplers(draw: Any) -> dict[str, Any]:
    sigma, sigma_next = np.array([1.0, 0.9, 0.5, 0.3]), np.array([0.9, 0.75, 0.25, 0.1])
    x, x_next, v, v_ref = (draw(4, 4) for _ in range(4))
    result: dict[str, Any] = {"x": x, "x_next": x_next, "v": v, "v_ref": v_ref}
    result |= {"sigma": sigma, "sigma_next": sigma_next}
    for name in ("flow-sde", "cps", "dance-sde"):
        step, reference = moves(name, x, v, sigma, sigma_next), moves(name, x, v_ref, sigma, sigma_next)
        apart = ((step.mean - reference.mean) ** 2).mean(-1)
        result[name] = {
            "mean": step.mean,
            "std": step.std,
            "log_prob_mean": step.log_prob(x_next),
            "divergence_mean": apart * step.kl_weight(exact=True),
            "code_kl": apart * step.kl_weight(exact=False),
        }
    return result


def methods(draw: Any) -> dict[str, Any]:
    prompts = np.array([0, 0, 0, 1, 1, 1])
    rewards = [np.array([0.25, 0.5, 0.75, -1.0, 2.0, 0.5]), np.array([0.5, 1.0, 0.25, -0.5, 2.5, 0.75])]
    v_old = draw(6, 2, 4)
    paths = Paths(
        x=draw(6, 3, 4),
        sigmas=np.array([1.0, 0.6, 0.2]),
        v=v_old + 0.02 * draw(6, 2, 4),
        v_old=v_old,
        v_ref=draw(6, 2, 4),
        values=0.5 * draw(6, 2),
    )
    buffers: dict[int, deque] = {}
    first, second = (buffered(buffers, prompts, r) for r in rewards)
    own, everyone = (grouped(prompts, rewards[0], global_std) for global_std in (False, True))
    shaped = (rewards[0] - rewards[0].mean()) / (rewards[0].std(ddof=1) + 1e-6)
    advantage = shaped[:, None] - paths.values
    wide = {k: np.repeat(a[:, None], 2, 1) for k, a in (("ddpo", second), ("own", own), ("everyone", everyone))}
    cases = {}
    for name in ("flow-sde", "cps", "dance-sde"):
        grpo = {"beta": BETA, "drop": True}
        cases[name] = {
            "ddpo": loss(paths, name, wide["ddpo"], beta=0.0, exact=True),
            "dpok": loss(paths, name, advantage, beta=BETA, exact=True, both_sides=True),
            "flow-grpo": loss(paths, name, wide["everyone"], exact=False, **grpo),
            "flow-grpo, kl_over_step": loss(paths, name, wide["everyone"], exact=True, **grpo),
            "flow-grpo, own deviation": loss(paths, name, wide["own"], exact=False, **grpo),
        }
    return {
        "prompts": prompts,
        "rewards": rewards,
        **vars(paths),
        "ddpo_advantages": [first, second],
        "value_loss": ((paths.values - shaped[:, None]) ** 2).mean(),
        "cases": cases,
    }


def plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return node.tolist() if isinstance(node, np.ndarray | np.generic) else node


def main() -> None:
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).round(3)

    settings = {"eta": ETA, "clip_range": CLIP, "advantage_clip": BOUND, "beta": BETA}
    table = {"settings": settings | {"buffer_size": BUFFER, "min_count": MIN_COUNT}}
    table |= {"samplers": samplers(draw), "methods": methods(draw)}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(plain(table)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
