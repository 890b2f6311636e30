"""The one resumable training loop of the embedded models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flowbench.training.state import load_state, save_state

Progress = Callable[[str, int, int, float], None]  # stage, step, steps, loss


@dataclass(frozen=True)
class FitPlan:
    """How one stage is trained: AdamW, linear warm-up, cosine decay to `lr_end`, optional weight EMA."""

    name: str
    steps: int
    lr: float
    lr_end: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float | None = None
    clip_grad: float = 1.0
    checkpoint_every: int = 250


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, a function of seed and step alone, so that resuming needs no stored state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def reduced_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 takes many times as long unless the hardware has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def learning_rate(plan: FitPlan, step: int) -> float:
    """Learning rate at a step: linear warm-up, then cosine from `lr` to `lr_end`."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    share = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr_end + 0.5 * (plan.lr - plan.lr_end) * (1 + math.cos(math.pi * share))


def fit(module: nn.Module, loss: Callable[[int], torch.Tensor], plan: FitPlan, work: Path, progress: Progress) -> None:
    """Train `module` in place on `loss(step)`; resumes from `work/<name>.safetensors`; ends with EMA weights if asked.

    Raises FloatingPointError when the loss is no longer finite.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    average = [p.detach().clone() for p in params] if plan.ema else []
    checkpoint, start = work / f"{plan.name}.safetensors", 0
    if checkpoint.exists():
        state = load_state(checkpoint)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = [a.to(params[0].device) for a in state["average"]], state["step"]
    module.train()
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        value = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss of {plan.name} is {value.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, plan.clip_grad)
        optimizer.step()
        if plan.ema:
            # The usual ramp, so that the average does not remember the initial weights.
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(plan.ema, (1 + step) / (10 + step)))
        progress(plan.name, step + 1, plan.steps, value.detach().item())
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save_state(checkpoint, {**state, "step": step + 1})
    for p, a in zip(params, average, strict=False):
        p.data.copy_(a)
    module.eval()
