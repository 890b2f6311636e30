"""What a run came to, as its record: of one that finished, and of one that failed."""

from __future__ import annotations

import datetime
import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from flowbench.config import RunConfig
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.pairs import Pair
from flowbench.evaluation.protocol import Judges, protocol_hash
from flowbench.models.counting import DEV, EVALUATION
from flowbench.models.operations import training_flops
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset, load_preset, preset_names
from flowbench.models.sources import source_sha256
from flowbench.names import path_name
from flowbench.plugin_sources import sources
from flowbench.prompts import PromptSplit, load_split
from flowbench.reading.checksums import file_sha256
from flowbench.record import (
    MODEL,
    OWN,
    PRESET,
    VERSION,
    Costs,
    Point,
    Record,
    Score,
    Source,
    Spent,
    code_commit,
    package_versions,
)
from flowbench.reward import Reward
from flowbench.scoring.workers.reward import make_reward
from flowbench.terms import term_names
from flowbench.training.budget import Budget
from flowbench.training.points import Points


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a finished run. scores: as in a record; seconds, function_evaluations: what it took."""

    pairs: Mapping[str, Pair]
    scores: Mapping[str, Score]
    seconds: float
    function_evaluations: int


@dataclass(frozen=True)
class Way:
    """What a run's points say: the base model on dev, and the averaged policy on the way."""

    base: Mapping[str, float]
    points: tuple[Point, ...]


NO_WAY = Way({}, ())
NONE_CUT: Mapping[str, int] = MappingProxyType({})


def make_record(
    config: RunConfig,
    command: str,
    reward: Reward,
    judges: Judges,
    splits: Sequence[PromptSplit],
    dev: PromptSplit | None,
    evaluated: Evaluated,
    budget: Budget,
    costs: Costs,
    way: Way = NO_WAY,
    cut_prompts: Mapping[str, int] = NONE_CUT,
) -> Record:
    """Everything that the record of a finished run must answer for.

    splits: train's, and then those that were evaluated; dev: the one of the points, if prompts were scored there;
    cut_prompts: as `cut` counts them.
    """
    spent = Spent(
        images=budget.images,
        reward_calls=budget.reward_calls,
        function_evaluations=budget.function_evaluations,
        seconds=budget.seconds,
        evaluation_seconds=evaluated.seconds,
        overhead=budget.overhead,
        peak_memory_mb=costs.peak_memory_mb,
    )
    return _record(
        config,
        command,
        spent,
        costs,
        way,
        {s.name: s for s in (*splits, *((dev,) if dev else ()))},
        scores=dict(evaluated.scores),
        per_prompt={
            f"{metric}/{split}": {"base": values.tolist(), "tuned": pair.tuned.scores[metric].tolist()}
            for split, pair in evaluated.pairs.items()
            for metric, values in pair.base.scores.items()
        },
        prompts={split: [p.text for p in pair.base.prompts] for split, pair in evaluated.pairs.items()},
        reward_provenance=reward.provenance(),
        judges={name: judges.rewards[name].provenance() for name in judges.held_out},
        cut_prompts=dict(cut_prompts),
        base_cached=tuple(split for split, pair in evaluated.pairs.items() if pair.cached),
    )


def failed_record(
    config: RunConfig, command: str, failure: str, costs: Costs = Costs(), way: Way = NO_WAY, device: str = ""
) -> Record:
    """The record of a run that did not come to its end, which is a result too; it has no scores.

    failure: why, of which the first line is kept. Its identity is that of the run that would have finished.
    """
    spent = Spent(
        images=costs.images,
        reward_calls=costs.reward_calls,
        function_evaluations=0,
        seconds=sum(costs.seconds.values()),
        evaluation_seconds=0.0,
        overhead=0.0,
        peak_memory_mb=costs.peak_memory_mb,
    )
    line = (failure.strip().splitlines() or ["it does not say why"])[0]
    costs = costs if costs.device else costs.model_copy(update={"device": device or config.device})
    return _record(config, command, spent, costs, way, _prompts(config), status="failed", failure=line)


def _prompts(config: RunConfig) -> dict[str, PromptSplit]:
    """The splits that a run would have used; those that cannot be read are what it may have failed of."""
    found = {}
    for name in ("train", *config.evaluation.splits):
        try:
            found[name] = load_split(config.prompt_set(load_preset(config.model)), name)
        except UsageError:
            continue
    return found


def _record(
    config: RunConfig,
    command: str,
    spent: Spent,
    costs: Costs,
    way: Way,
    splits: Mapping[str, PromptSplit],
    **found: object,
) -> Record:
    preset = load_preset(config.model)
    evaluated = [splits[name] for name in config.evaluation.splits if name in splits]
    content = {
        "scores": {},
        "per_prompt": {},
        "prompts": {},
        "reward_provenance": {},
        **found,
        "version": VERSION,
        "algorithm": config.algorithm,
        "reward": config.reward,
        "model": config.model,
        "seed": config.seed,
        "budget": spent,
        "config": config.model_dump(mode="json"),
        "config_hash": config.hash(),
        "protocol_hash": protocol_hash(config.undivided().evaluation, evaluated, preset.sigma_spacing),
        "prompt_hashes": {name: split.sha256 for name, split in splits.items()},
        "command": command,
        "commit": code_commit(),
        "device": costs.device,
        "versions": package_versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "points": way.points,
        "dev_base": dict(way.base),
        "costs": costs,
        "sources": sources_of(config),
        "weights": weights_of(config),
    }
    return Record.model_validate(content)


def sources_of(config: RunConfig) -> dict[str, Source]:
    """Of the algorithm, each reward term, each judge that may sit, and the model's preset.

    A judge that is missing on this machine has its source here too: which judges sat, `judges` says.
    """
    preset, chosen = load_preset(config.model, resolve=False), config.evaluation.judges
    judges = tuple(name for name in (preset.rewards if chosen is None else chosen) if name != "oracle")
    names = tuple(dict.fromkeys((*term_names(config.reward), *judges)))
    content = hashlib.sha256(preset.model_dump_json().encode()).hexdigest()
    own = OWN if config.model in preset_names() else None
    found = {path_name(name): source for name, source in sources(config.algorithm, names).items()}
    return {**found, PRESET: Source(distribution=own, sha256=content)}


def weights_of(config: RunConfig) -> dict[str, str | None]:
    """SHA-256 of the files of "model", and of each reward term by its name, without loading any.

    "" for what has no files, None for what is not known before it is loaded, or is not on this machine.
    """
    preset = load_preset(config.model)
    found = {path_name(name): _reward_weights(name, preset) for name in term_names(config.reward)}
    return {**found, MODEL: source_sha256(preset)}


def _reward_weights(name: str, preset: ModelPreset) -> str | None:
    try:
        reward = make_reward(name, preset.rewards.get(name, {}))
        wanted = reward.weights()
        files = [weights.files() for weights in wanted]
        digests = [{file.name: file_sha256(file) for file in found} for found in files]
    except (UsageError, RunError, TypeError, OSError):  # what a run may have failed of
        return None
    if not wanted:
        return "" if type(reward).pure else None
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if all(files) else None


def costs_of(
    policy: Policy, budget: Budget, points: Points | None, evaluation: tuple[float, int], hardware: str
) -> Costs:
    """What a run spent, by kind. evaluation: seconds and function evaluations of the final one."""
    seconds, evaluations = {**budget.timings}, {**budget.evaluations}
    if points is not None:
        seconds[DEV], evaluations[DEV] = points.seconds, points.function_evaluations
    seconds[EVALUATION], evaluations[EVALUATION] = evaluation
    return Costs(
        images=budget.images,
        reward_calls=budget.reward_calls,
        function_evaluations=evaluations,
        updates=budget.updates,
        flops=training_flops(policy),
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(policy.device),
        device=hardware,
        precision=str(policy.model_dtype).removeprefix("torch."),
    )


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the GPU where one is used, else of this process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
