"""Which rewards a run is scored by: the one it trains on, and the judges that it does not train on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from flowbench.config import RunConfig
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.protocol import Judges
from flowbench.hooks import hook
from flowbench.models.presets import ModelPreset
from flowbench.names import path_name
from flowbench.prompts import PromptSplit
from flowbench.prompts.needs import check_needs, unmet
from flowbench.registry import algorithms, rewards
from flowbench.reward import Reward
from flowbench.scoring.combination import WeightedSum
from flowbench.scoring.visitor import Visitor, movable
from flowbench.scoring.workers.reward import make_reward
from flowbench.terms import parse_reward, term_names

logger = logging.getLogger("flowbench")


CPU = torch.device("cpu")


def build_reward(
    name: str,
    preset: ModelPreset,
    device: torch.device,
    standardized: bool = False,
    *,
    half: bool = False,
    visiting: bool = False,
) -> Reward:
    """The reward, or weighted sum of rewards, as the model's preset configures it, loaded.

    half: in float16, for a reward that states a tolerance; visiting: on the device only while it scores, for one that
    can be moved. Raises UsageError when the preset's arguments do not fit, RunError when weights are missing.
    """
    terms = parse_reward(name)
    if standardized or len(terms) > 1 or terms[0].weight != 1.0:
        parts = {t.name: build_reward(t.name, preset, device, half=half, visiting=visiting) for t in terms}
        return WeightedSum(terms, parts, standardized)
    try:
        reward = make_reward(name, preset.rewards.get(name, {}))
    except TypeError as error:
        raise UsageError(f"reward '{name}' for model '{preset.name}': {error}") from error
    if visiting and movable(reward):
        return Visitor(lambda where: build_reward(name, preset, where, half=half), device)
    halved = half and reward.half_tolerance is not None
    with hook(f"reward '{name}'", "load", type(reward)):
        reward.load(CPU if halved else device)
        if halved:
            reward.halve()
            reward.to(device)
    return reward


def training_reward(config: RunConfig, preset: ModelPreset, device: torch.device, standardized: bool = False) -> Reward:
    """The reward that a run trains on, where and as precise as its configuration says."""
    half = device.type == "cuda" and half_on_gpu(config)
    visiting = bool(config.training.offload) and device.type != "cpu"
    return build_reward(config.reward, preset, device, standardized, half=half, visiting=visiting)


def half_on_gpu(config: RunConfig) -> bool:
    """Whether a run asks its reward to score in half precision on a GPU: never one whose gradient is trained on."""
    trains_on_gradient = "reward_grad" in algorithms.describe(config.algorithm).needs
    return config.training.reward_precision == "auto" and not trains_on_gradient


def build_judges(
    config: RunConfig,
    reward: Reward | None,
    preset: ModelPreset,
    device: torch.device,
    splits: Sequence[PromptSplit] = (),
) -> Judges:
    """The loaded reward that the run trains on (None for no run at all), and the judges held out from it.

    Held out are the rewards of `evaluation.judges`, by default all that the model's preset configures and the oracle on
    the world of shapes, without those that the run trains on: neither by name nor, since a checkpoint can have two
    names, by the hash of their weights. A default judge that is not on this machine, or that needs more than the
    prompts of the evaluated `splits` have, is left out with a warning, and never downloaded. On a GPU a judge is loaded
    once to see that it can be, and then only for scoring.
    Raises UsageError when `evaluation.judges` names a reward trained on, or one whose needs the prompts do not meet,
    RunError when weights of a judge that it names are missing.
    """
    trained = trained_on(config, reward)
    known = {_weights_hash(r): name for name, r in trained.items()}
    chosen, held_out = config.evaluation.judges, dict[str, Reward]()
    half = device.type == "cuda" and config.evaluation.judge_precision == "auto"

    def seated(name: str) -> Reward:
        if device.type == "cpu":
            return build_reward(name, preset, device)
        visitor = Visitor(lambda where: build_reward(name, preset, where, half=half), device)
        visitor.leave()
        return visitor

    for name in usable(_candidates(config, preset), config.prompt_set(preset), splits, named=chosen is not None):
        judge = seated(name) if chosen is not None else _if_here(name, preset, seated)
        if judge is None:
            continue
        twin = known.get(_weights_hash(judge)) if _weights_hash(judge) else None
        if twin and chosen is not None:
            raise UsageError(
                f"judge '{name}' has the same weights as reward '{twin}', which the run trains on: it would praise "
                "what it taught; take it out of evaluation.judges"
            )
        if twin:
            logger.warning("'%s' is no judge of this run: it has the same weights as reward '%s'", name, twin)
        else:
            held_out[path_name(name)] = judge
    scored = {path_name(name): r for name, r in trained.items() if not r.info.truth}
    return Judges({**scored, **held_out}, oracle=_oracle_judges(config, preset), held_out=tuple(held_out))


def usable(names: Iterable[str], prompt_set: str, splits: Sequence[PromptSplit], named: bool = False) -> Iterator[str]:
    """Names of those rewards whose needs the prompts meet; says why of each of the others.

    Raises UsageError instead if they were named by the user.
    """
    for name in names:
        info = rewards.describe(name)
        if named:
            check_needs([info], prompt_set, splits)
        if fault := unmet(info, prompt_set, splits):
            logger.warning("'%s' is no judge of this run: %s", name, fault)
        else:
            yield name


def _if_here(name: str, preset: ModelPreset, seated: Callable[[str], Reward]) -> Reward | None:
    """A default judge, unless it is missing."""
    remedies = [w.missing() for w in make_reward(name, preset.rewards[name]).weights()]
    try:
        if not any(remedies):
            return seated(name)
        reason = "its weights are not on this machine; " + next(filter(None, remedies))
    except RunError as error:
        reason = str(error)
    logger.warning("'%s' is no judge of this run: %s", name, reason)
    return None


def trained_on(config: RunConfig, reward: Reward | None) -> dict[str, Reward]:
    """The rewards that a run trains on, by the names that its configuration has for them."""
    if reward is None:
        return {}
    # A plain reward may call itself by another name than the configuration, such as that of its backend.
    return reward.parts() if isinstance(reward, WeightedSum) else {config.reward: reward}


def _candidates(config: RunConfig, preset: ModelPreset) -> Iterator[str]:
    """Names of the judges to be built."""
    chosen, trained = config.evaluation.judges, term_names(config.reward)
    for name in preset.rewards if chosen is None else chosen:
        info = rewards.describe(name)
        if info.domain == "images" and not info.truth and name not in trained:
            yield name


def reads_oracle(prompt_set: str) -> bool:
    """Whether the oracle can read the prompts of a set: those of the world of shapes."""
    return prompt_set == "shapes"


def _oracle_judges(config: RunConfig, preset: ModelPreset) -> bool:
    chosen = config.evaluation.judges
    readable = reads_oracle(config.prompt_set(preset))
    if chosen is None or "oracle" in term_names(config.reward):
        return readable
    if "oracle" in chosen and not readable:
        raise UsageError(
            f"judge 'oracle' reads only the world of shapes, and not the prompts '{config.prompt_set(preset)}'"
        )
    return "oracle" in chosen


def _weights_hash(reward: Reward) -> str | None:
    return reward.provenance().get("sha256")
