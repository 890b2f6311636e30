"""What one record of a contribution must keep to: computed again here from what is installed, wherever it can be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.escape import plain
from flowbench.models.presets import load_preset, preset_names
from flowbench.names import path_name
from flowbench.plugin_sources import source
from flowbench.prompts import available_splits, load_split
from flowbench.record import OWN, PRESET, VERSION, Record, Score, code_commit, weight_hashes
from flowbench.registry import algorithms, rewards
from flowbench.reporting.groups import SEARCH, is_trial
from flowbench.reporting.targets import DIVERSITY
from flowbench.terms import plain_metric, term_names
from flowbench.workloads import load_workload, workload_names

SLACK = 1e-3  # of a bound: published numbers are rounded
# A search's trials are scored on dev alone, at the end: what they leave out cannot be selected by.
OF_TRIALS = ("splits", "judges", "points", "dev_judges")
SHARES, LENGTHS = ("oracle_exact", "oracle_soft"), (DIVERSITY, "w2", "kl")


def faults_of(record: Record) -> Iterator[str]:
    """A line for each thing that is wrong with a record, or cannot be checked here."""
    if record.version != VERSION:
        yield f"is of version {record.version}, results are of version {VERSION}; run it with this flowbench"
        return
    for check in (_of_workload, _settings, _sources, _judges):
        yield from check(record)
    if record.status == "failed":
        if not record.failure or record.scores:
            yield "failed, so that it has one line that says why, and no scores"
        return
    for check in (_scores, _costs, _points):
        yield from check(record)


def _of_workload(record: Record) -> Iterator[str]:
    """It was made for a workload that flowbench ships, as that workload is; a record of an ablation names none."""
    if record.workload is None:
        return
    if record.workload not in workload_names():  # which a file's name is not: nothing is read because a record says so
        yield f"was made for workload '{plain(record.workload)}', which flowbench does not ship"
        return
    workload = load_workload(record.workload)
    if record.workload_hash != workload.hash:
        yield f"was made for another version of workload '{workload.name}' ({plain(str(record.workload_hash))})"
        return
    training, evaluation = (_section(record, name) for name in ("training", "evaluation"))
    has = {"model": record.model, "reward": record.reward, "training.images": training.get("images")}
    wants = {"model": workload.model, "reward": workload.reward, "training.images": workload.images}
    for name, value in workload.evaluation.items():
        if name in OF_TRIALS and is_trial(record):
            continue
        has[f"evaluation.{name}"] = evaluation.get(name)
        wants[f"evaluation.{name}"] = list(value) if isinstance(value, tuple) else value
    for name, wanted in wants.items():
        if has[name] != wanted:
            yield f"has {name} = {plain(str(has[name]))}, and workload '{workload.name}' {wanted}"


def _section(record: Record, name: str) -> dict[str, Any]:
    """A section of its settings, which need not be any."""
    found = record.config.get(name)
    return found if isinstance(found, dict) else {}


def _splits(record: Record) -> list[str]:
    found = _section(record, "evaluation").get("splits")
    return list(map(str, found)) if isinstance(found, list) else []


@dataclass(frozen=True)
class _Computed:
    """What a configuration decides, computed here."""

    config_hash: str
    protocol_hash: str
    prompt_hashes: dict[str, str]
    steps: int
    points: int


@lru_cache(maxsize=256)
def _computed(config: str) -> _Computed:
    from flowbench.evaluation.protocol import protocol_hash

    run = RunConfig.model_validate_json(config)
    preset = load_preset(run.model)
    prompts = run.prompt_set(preset)
    splits = {name: load_split(prompts, name) for name in available_splits(prompts)}
    evaluated = [splits[name] for name in run.evaluation.splits if name in splits]
    return _Computed(
        config_hash=run.hash(),
        protocol_hash=protocol_hash(run.undivided().evaluation, evaluated, preset.sigma_spacing),
        prompt_hashes={name: split.sha256 for name, split in splits.items()},
        steps=run.training.num_steps or preset.num_steps,
        points=run.evaluation.points,
    )


@lru_cache(maxsize=256)
def default_hash(algorithm: str, workload: str) -> str:
    """The hash of an algorithm's own settings on a workload.

    Raises UsageError for unknown names, or an algorithm that cannot be run on the workload.
    """
    known = load_workload(workload)
    overrides, prompts = known.overrides(), known.prompts
    return resolve_config(algorithm, known.reward, known.model, overrides=overrides, prompts=prompts).hash()


def _here(record: Record) -> _Computed:
    without = {name: value for name, value in record.config.items() if name != "seed"}
    return _computed(json.dumps(without, sort_keys=True))


def _before_defaults(record: Record) -> bool:
    """Whether it is a trial of a foreign method as it was before the search's result became its defaults.

    The source of a foreign method is in the hash of its settings, which then cannot be computed again.
    """
    known = record.sources.get("algorithm")
    if record.ruleset != SEARCH or known is None or known.distribution == OWN:
        return False
    return source(algorithms, record.algorithm).sha256 != known.sha256


def _known(record: Record) -> _Computed | None:
    """What its settings decide, or None where `_settings` says why that cannot be known."""
    if any(True for _ in _unusable(record)):
        return None
    try:
        return _here(record)
    except (ValidationError, UsageError):
        return None


def _unusable(record: Record) -> Iterator[str]:
    """Why nothing can be computed again; names of a record never become files that are read."""
    if record.algorithm not in algorithms.names():
        yield "its algorithm is not installed here, so that nothing can be computed again; install it or use --plugin"
    elif any(record.config.get(name) != getattr(record, name) for name in ("algorithm", "reward", "model", "seed")):
        yield "its settings are of another algorithm, reward, model or seed than it says"
    elif record.model not in preset_names() or record.config.get("prompts") is not None:
        yield "has a model or prompts that flowbench does not ship, so that nothing can be computed again"


def _settings(record: Record) -> Iterator[str]:
    """Hashes are those of its settings, protocol and prompts; under `defaults` the settings are the algorithm's own."""
    faults = list(_unusable(record))
    if faults:
        yield from faults
        return
    try:
        here, usual = _here(record), None
        if record.ruleset == "defaults" and record.workload in workload_names():
            usual = default_hash(record.algorithm, str(record.workload))
    except ValidationError as error:
        first = error.errors()[0]
        yield f"its setting '{plain('.'.join(map(str, first['loc'])))}' is none: {plain(first['msg'].lower())}"
        return
    except UsageError as error:
        yield f"its settings cannot be used here: {plain(str(error))}"
        return
    if record.config_hash != here.config_hash and not _before_defaults(record):
        yield f"has config hash {plain(record.config_hash)}, and its settings have {here.config_hash}"
    elif usual is not None and record.config_hash != usual:
        yield "has settings that are not the algorithm's own, which ruleset 'defaults' asks for"
    if record.protocol_hash != here.protocol_hash:
        yield f"has protocol hash {plain(record.protocol_hash)}, and its settings have {here.protocol_hash}"
    for name, digest in sorted(record.prompt_hashes.items()):
        if here.prompt_hashes.get(name) != digest:
            yield f"used other prompts as split '{plain(name)}' than this flowbench has"
    missing = {"train", *_splits(record)} - record.prompt_hashes.keys()
    if missing and record.status == "finished":
        yield f"does not say which prompts it used as {', '.join(sorted(map(plain, missing)))}"


def _sources(record: Record) -> Iterator[str]:
    """Every plug-in is flowbench's own or of an installed package that is named with version and hash."""
    wanted = {"algorithm", PRESET, *map(path_name, (*term_names(record.reward), *record.judges))} - {"oracle"}
    for name in sorted(wanted - record.sources.keys()):
        yield f"does not say where '{plain(name)}' comes from"
    trial = record.ruleset == SEARCH  # of the method before the search's result became its defaults
    same_code = record.commit is not None and record.commit == code_commit()
    for name, known in sorted(record.sources.items()):
        if name == PRESET:
            if known.distribution != OWN:
                yield "has a model preset that is not flowbench's own"
            continue
        if known.distribution is None or known.version is None:
            yield f"has '{plain(name)}' from a file; put it into a package, so that others can install what you ran"
            continue
        own = known.distribution == OWN
        registry = algorithms if name == "algorithm" else rewards
        called = record.algorithm if name == "algorithm" else name
        if called in registry.names() and (same_code or not own) and not (trial and name == "algorithm"):
            here = source(registry, called)
            if here.sha256 != known.sha256:
                yield f"has another '{plain(name)}' than the one that is installed here"


def _judges(record: Record) -> Iterator[str]:
    """No judge was trained on, neither by name nor by its weights."""
    trained = {path_name(name) for name in term_names(record.reward)}
    weights = weight_hashes(record.reward_provenance)
    for name, provenance in record.judges.items():
        if path_name(name) in trained or weights & weight_hashes(provenance):
            yield f"has '{plain(name)}' as a judge, which was trained on"


def _scores(record: Record) -> Iterator[str]:
    """Scores are there for every split, finite, and in their reward's range; prompts have as many of them as texts."""
    for split in _splits(record):
        if not any(key.endswith(f"/{split}") for key in record.scores):
            yield f"has no scores on split '{plain(str(split))}'"
    for key, score in record.scores.items():
        low, high = _bounds(key.split("/")[0])
        slack = SLACK * max(1.0, abs(low) if math.isfinite(low) else 0, abs(high) if math.isfinite(high) else 0)
        for value in (score.base, score.tuned):
            if not math.isfinite(value) or not low - slack <= value <= high + slack:
                yield f"has {plain(key)} = {value:g}, which is not within [{low:g}, {high:g}]"
                break
    for key, sides in record.per_prompt.items():
        texts = record.prompts.get(key.rpartition("/")[2], [])
        if key in record.scores and not _agree(sides, record.scores[key], len(texts)):
            yield f"has scores of prompts for {plain(key)} that do not agree with their means, or with the prompts"


def _agree(sides: dict[str, list[float]], score: Score, prompts: int) -> bool:
    base, tuned = sides.get("base", []), sides.get("tuned", [])
    if not len(base) == len(tuned) == prompts or not prompts:
        return False
    pairs = ((sum(base) / prompts, score.base), (sum(tuned) / prompts, score.tuned))
    return all(abs(mean - said) <= SLACK * max(1.0, abs(said)) for mean, said in pairs)


def _bounds(metric: str) -> tuple[float, float]:
    name = plain_metric(metric)
    if name in SHARES:
        return 0.0, 1.0
    if name in LENGTHS:
        return 0.0, math.inf
    return rewards.describe(name).range if name in rewards.names() else (-math.inf, math.inf)


def _costs(record: Record) -> Iterator[str]:
    """The budget was met exactly, and sampling cost what it must."""
    spent, costs, images = record.budget, record.costs, _section(record, "training").get("images")
    for name, found in (("budget", spent.images), ("costs", costs.images)):
        if found != images:
            yield f"has {found} images in its {name}, and the budget is {plain(str(images))}"
    here = _known(record)
    if here is None:
        return
    least = spent.images * here.steps
    sampled = costs.function_evaluations.get("sampling", 0)
    if min(sampled, spent.function_evaluations) < least:
        yield f"has {sampled} evaluations of sampling, and its images take at least {least}"
    if not (spent.seconds > 0 and math.isfinite(spent.seconds)) or not costs.device:
        yield "does not say how many seconds it took on which device"


def _points(record: Record) -> Iterator[str]:
    """It was scored at the points of its budget, the last at the end."""
    here = _known(record)
    if here is None:
        return
    wanted = here.points
    images = [point.images for point in record.points]
    ordered = all(a < b for a, b in pairwise(images))
    if len(images) != wanted or not ordered or (wanted and images[-1] != record.budget.images):
        yield f"has {len(images)} points of its budget of the {wanted} that it asks for, or in another order"
    elif wanted and not record.dev_base:
        yield "has no scores of the base model on split dev"
