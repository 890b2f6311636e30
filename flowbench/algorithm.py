"""The contract of an algorithm: what rollouts it needs, how rewards become advantages, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from flowbench.errors import RunError
from flowbench.registry import AlgorithmInfo, register_algorithm
from flowbench.rollout import Batch, Compared, Draws, Loss, Rollout, endpoints, pairs, transitions, visited

if TYPE_CHECKING:
    from flowbench.models.policy import Policy

RewardFunction: TypeAlias = "Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]"


class AlgorithmConfig(BaseModel):
    """Base of an algorithm's hyperparameters: frozen, typed, unknown keys are errors.

    `added_later` names options that older records do not have: at their defaults they stay out of a run's hash, as do
    the training's and the evaluation's own.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=AlgorithmConfig)


def no_score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """Stands in for the reward of an algorithm that was built without one."""
    raise RunError("this algorithm was built without a reward")


class Algorithm(Generic[C]):
    """Base class. Subclasses define `Config`, `prepare` and `loss`, and what else they need.

    `score` is the run's reward as a function of images (B, 3, H, W) and prompts; differentiable if the algorithm
    declares the need "reward_grad". `ablations` lists the variants that `flowbench ablate` compares with the default,
    each as the hyperparameters that it changes. `whole_groups` declares that rows of a group must never be cut apart,
    neither by minibatches nor by microbatches.

    From rollout to update in three steps: `prepare` sees the whole iteration; `measure` and `compare` see a minibatch;
    `loss` sees rows.
    """

    info: ClassVar[AlgorithmInfo]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    ablations: ClassVar[Sequence[Mapping[str, Any]]] = ()
    whole_groups: ClassVar[bool] = False

    def __init__(self, config: C, score: RewardFunction = no_score) -> None:
        self.cfg = config
        self.score = score

    def setup(self, policy: Policy) -> None:
        """Build networks of its own or ask the policy for a weight view; called once, before a checkpoint is loaded."""
        self.policy = policy

    def needs(self) -> frozenset[str]:
        """What this configuration really needs of the class's declared needs; fewer states kept is memory saved."""
        return self.info.needs

    def prepare(self, rollout: Rollout) -> Batch:
        """Turn a scored rollout into rows for the loss."""
        raise NotImplementedError

    def draws(self) -> Draws:
        """The noise and sigmas that each row of a minibatch is handed; nothing by default."""
        return Draws()

    def measure(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Scalars (R,) of some rows that `compare` needs, without gradient; each a function of its row alone."""
        return {}

    def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
        """What the scalars of all rows of a minibatch say of each; the one place where rows are compared."""
        return Compared()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Unreduced loss of some rows of a minibatch.

        Each row's value is a function of that row alone, with what it was handed by `draws` and `compare`, so that
        nothing depends on how a minibatch is cut. If `whole_groups` is set, rows of a group are always together, and
        may be compared here too.
        """
        raise NotImplementedError

    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        """Per-row loss of the algorithm's own networks alone, for the steps that `training.auxiliary_steps` adds.

        Each such step has noise of its own.
        """
        return None

    def after_update(self, policy: Policy) -> None:
        """Called after every optimizer step, for EMA or old-policy updates."""

    def after_iteration(self, policy: Policy) -> None:
        """Called when all updates of an iteration are done, before the next rollout."""

    def networks(self) -> dict[str, torch.nn.Module]:
        """The algorithm's own trainable networks by name; the core trains them on `Loss.auxiliary`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the algorithm learned besides its networks: tensors, numbers, strings, lists, dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "Batch",
    "Compared",
    "Draws",
    "Loss",
    "Rollout",
    "endpoints",
    "pairs",
    "register_algorithm",
    "transitions",
    "visited",
]
