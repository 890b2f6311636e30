"""The contract of an algorithm: what rollouts it needs, how rewards become advantages, and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from flowbench.errors import RunError, UsageError
from flowbench.registry import AlgorithmInfo, register_algorithm
from flowbench.rollout import (
    Batch,
    Compared,
    Draws,
    Loss,
    Rollout,
    RolloutPlan,
    endpoints,
    pairs,
    transitions,
    visited,
)

if TYPE_CHECKING:
    from flowbench.models.policy import Policy

RewardFunction: TypeAlias = "Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]"


class AlgorithmConfig(BaseModel):
    """Base of an algorithm's hyperparameters: frozen, typed, unknown keys are errors.

    `added_later` names options that older records do not have: at their defaults they stay out of a run's hash, as do
    the training's and the evaluation's own.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def least_group(self) -> int:
        """The least images of a prompt in an iteration from which anything is learnt.

        It is 2 where an image counts by its difference from the others of its prompt.
        """
        return 1

    def warmup_iterations(self) -> int:
        """How many iterations pass before the policy's first update: the field `warmup`, if there is one."""
        return int(getattr(self, "warmup", 0))


@dataclass(frozen=True)
class Defaults:
    """An algorithm's settings for one model; what they do not name stays as the model's preset or `Config` has it.

    training: settings of the loop, {"learning_rate": 2e-4}; algorithm: hyperparameters. They are the same for every
    reward: a comparison is fair only where no setting depends on the reward's name. log: the search that they come
    from, a folder that `flowbench tune` wrote or a page, relative to the repository; None: no search.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    log: str | None = None


@dataclass(frozen=True)
class Uniform:
    """A search dimension: numbers from low to high, each as likely as another."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _ordered(self.low, self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high

    def place(self, value: float) -> float:
        """Where a value stands between the ends, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class LogUniform:
    """A search dimension: positive numbers from low to high whose logarithms are equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _ordered(self.low, self.high)
        if self.low <= 0:
            raise UsageError(f"a LogUniform search dimension begins at {self.low}; its low must be above 0")

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high

    def place(self, value: float) -> float:
        """Where a value's logarithm stands between those of the ends, from 0 to 1."""
        return math.log(value / self.low) / math.log(self.high / self.low)


@dataclass(frozen=True)
class Integers:
    """A search dimension: whole numbers from low to high, both included, each as likely as another."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _ordered(self.low, self.high)

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        return self.low, self.high

    def place(self, value: int) -> float:
        """Where a value stands between the ends, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Choice:
    """A search dimension: these values, each as likely as another."""

    values: tuple[str | float | bool | None, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < max(2, len(self.values)):
            raise UsageError(f"a Choice search dimension has {self.values}; give two or more different values")
        if not all(isinstance(value, (str, int, float, type(None))) for value in self.values):
            raise UsageError(f"a Choice search dimension has {self.values}; its values must be text, numbers or null")

    @property
    def ends(self) -> tuple[str | float | bool | None, ...]:
        """All values: a choice has no inside."""
        return self.values

    def place(self, value: str | float | bool | None) -> float:
        """Where a value stands in the list, from 0 to 1."""
        return self.values.index(value) / (len(self.values) - 1)


def _ordered(low: float, high: float) -> None:
    if not low < high:
        raise UsageError(f"a search dimension goes from {low} to {high}; its low must be below its high")


Dimension: TypeAlias = Uniform | LogUniform | Integers | Choice

# What every algorithm searches, in the same ranges. They are centred on Flow-GRPO's settings for SD3.5 medium
# (yifan123/flow_grpo, config/base.py): a learning rate of 3e-4, and an average of weights that remembers about 80
# optimizer steps (0.9 every 8 of them). Here averages remember none, 10, 33 or 100 steps, and never more than about a
# ninth of the steps so far (training/average.py): longer ones would all be the same in a run of a few hundred.
COMMON_SEARCH_SPACE: Mapping[str, Dimension] = {
    "training.learning_rate": LogUniform(3e-5, 3e-3),
    "training.ema": Choice((0.0, 0.9, 0.97, 0.99)),
    "training.tuning": Choice(("full", "lora")),
}

C = TypeVar("C", bound=AlgorithmConfig)


def no_score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    """Stands in for the reward of an algorithm that was built without one."""
    raise RunError("this algorithm was built without a reward")


class Algorithm(Generic[C]):
    """Base class. Subclasses define `Config`, `prepare` and `loss`, and what else they need.

    `score` is the run's reward as a function of images (B, 3, H, W) and prompts; differentiable if the algorithm
    declares the need "reward_grad". `ablations` lists the variants that `flowbench ablate` compares with the default,
    each as the settings that it changes: its own by their names, the loop's by full names ("training.ema").
    `whole_groups` declares that rows of a group must never be cut apart, neither by minibatches nor by microbatches.
    `anchored` declares that the formula itself pulls to the reference, so strongly that training comes to rest under
    any reward; `flowbench check` tries that.

    `defaults` are its settings by the name of a model, {"mini-sd3": Defaults(...)}; they stand between those of the
    model's preset and the user's. `search_space` says what a search may vary, by a setting's full name
    ("training.learning_rate", "algorithm.tau"): `COMMON_SEARCH_SPACE` and one to three of its own, each the published
    value within a factor of ten either way, or all the choices. It is the same for every model and reward.
    `flowbench check` refuses a key that is unknown and a value that is invalid, in both.

    `metrics` says in a line each what it logs, {"strength": "mean of |A| / beta0"}; pictures of a run show it.

    From rollout to update in three steps: `prepare` sees the whole iteration; `measure` and `compare` see a minibatch;
    `loss` sees rows.
    """

    info: ClassVar[AlgorithmInfo]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    ablations: ClassVar[Sequence[Mapping[str, Any]]] = ()
    defaults: ClassVar[Mapping[str, Defaults]] = {}
    search_space: ClassVar[Mapping[str, Dimension]] = COMMON_SEARCH_SPACE
    metrics: ClassVar[Mapping[str, str]] = {}
    whole_groups: ClassVar[bool] = False
    anchored: ClassVar[bool] = False

    def __init__(self, config: C, score: RewardFunction = no_score) -> None:
        self.cfg = config
        self.score = score

    def setup(self, policy: Policy) -> None:
        """Build networks of its own or ask the policy for a weight view; called once, before a checkpoint is loaded."""
        self.policy = policy

    def needs(self) -> frozenset[str]:
        """What this configuration really needs of the class's declared needs; fewer states kept is memory saved."""
        return self.info.needs

    def plan(self) -> RolloutPlan:
        """What it asks of its rollouts, beside what its needs say."""
        return RolloutPlan()

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
    "COMMON_SEARCH_SPACE",
    "Algorithm",
    "AlgorithmConfig",
    "Batch",
    "Choice",
    "Compared",
    "Defaults",
    "Dimension",
    "Draws",
    "Integers",
    "LogUniform",
    "Loss",
    "Rollout",
    "RolloutPlan",
    "Uniform",
    "endpoints",
    "pairs",
    "register_algorithm",
    "transitions",
    "visited",
]
