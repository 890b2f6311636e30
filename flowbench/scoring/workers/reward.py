"""A reward that lives in a worker, gradients included."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from flowbench.hooks import hook
from flowbench.registry import Plugin, RewardInfo, is_url, rewards
from flowbench.reward import Reward
from flowbench.scoring.workers.environment import Environment
from flowbench.scoring.workers.process import Worker
from flowbench.scoring.workers.wire import Backward, Forgotten, Gradient, Load, Score, Scored

if TYPE_CHECKING:
    from flowbench.scoring.checkpoints import Weights

_calls = itertools.count()


def make_reward(name: str, arguments: Mapping[str, Any]) -> Reward:
    """The reward of that name, not loaded yet; in a worker if it declares requirements.

    name may be a URL, which is the reward "remote"; the argument `backend`, if given and not "native", names the
    variant of the reward that is registered as "<name>-<backend>".
    Raises UsageError for an unknown name or variant, TypeError for arguments that do not fit.
    """
    given = dict(arguments)
    backend = given.pop("backend", "native")
    if is_url(name):
        given = {"url": name, **given}
    plugin = rewards.get(name if backend == "native" else f"{name}-{backend}")
    with hook(f"reward '{name}'", "__init__", plugin.cls, passed=(TypeError,)):
        reward: Reward = plugin.cls(**given)
    return WorkerReward(plugin, given, reward) if plugin.info.requirements else reward


class WorkerReward(Reward):
    """Stands for a reward that declares requirements: the same scores and gradients, computed in its environment.

    unloaded: the reward itself, made here with the same arguments.
    """

    def __init__(self, plugin: Plugin[RewardInfo], arguments: dict[str, Any], unloaded: Reward) -> None:
        self.info, self.plugin, self.arguments, self.unloaded = plugin.info, plugin, arguments, unloaded

    def load(self, device: torch.device) -> None:
        """Start the worker and load the reward there.

        Raises RunError with the remedy when its environment is not installed, and whatever the reward's `load` raises.
        """
        environment = Environment(self.info.requirements)
        environment.check(self.info.name)
        request = Load(self.info.name, _plugin_file(self.plugin), self.arguments, str(device), torch.get_num_threads())
        self.worker = Worker(environment.python, request, f"try {environment.remedy(self.info.name)}")
        self._provenance = {**self.worker.start().provenance, "environment": environment.versions()}

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """As the reward itself; a worker that dies is started again once and asked again."""
        if self.info.differentiable and images.requires_grad and torch.is_grad_enabled():
            return _Crossing.apply(images, prompts, self.worker)
        return _score(self.worker, Score.of(images, prompts, None))

    def provenance(self) -> dict[str, Any]:
        """The reward's own, and the packages of its environment."""
        return self._provenance

    def weights(self) -> tuple[Weights, ...]:
        """The reward's own."""
        return self.unloaded.weights()


class _Crossing(torch.autograd.Function):
    """Scores in the worker; the gradient asks it for the product with the Jacobian of that very call."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, prompts: tuple[str, ...], worker: Worker) -> torch.Tensor:
        ctx.save_for_backward(images)
        ctx.prompts, ctx.worker, ctx.call = prompts, worker, next(_calls)
        return _score(worker, Score.of(images, prompts, ctx.call))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (images,) = ctx.saved_tensors
        worker, request = ctx.worker, Backward(ctx.call, cotangent)
        reply = worker.ask(request)
        if isinstance(reply, Forgotten):  # the worker was started anew, or holds later calls
            reply = worker.ask(Score.of(images, ctx.prompts, ctx.call), request)
        if not isinstance(reply, Gradient):
            raise worker.gone("while it computed a gradient")
        return reply.images.to(images), None, None


def _score(worker: Worker, request: Score) -> torch.Tensor:
    reply = worker.ask(request)
    assert isinstance(reply, Scored)
    return reply.scores.to(request.images.device)


def _plugin_file(plugin: Plugin[RewardInfo]) -> str | None:
    """The file given by --plugin that registers the reward; None for one that an entry point finds."""
    name = plugin.cls.__module__
    file = sys.modules[name].__file__ if name.startswith("flowbench_plugin_") else None
    return str(Path(file).resolve()) if file else None
