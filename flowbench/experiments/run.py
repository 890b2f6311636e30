"""One run from configuration to record: build, train, evaluate, write."""

from __future__ import annotations

import datetime
import gc
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from flowbench.algorithm import Algorithm
from flowbench.config import EvaluationConfig, RunConfig, load_run_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.exact_study import exact_study
from flowbench.evaluation.judges import build_judges, build_reward
from flowbench.evaluation.protocol import (
    Judges,
    SplitScores,
    by_category,
    count_images,
    guidance_scales,
    protocol_hash,
    score_split,
)
from flowbench.evaluation.statistics import mean_ci95
from flowbench.experiments.inputs import keep_inputs
from flowbench.models.devices import pick_device
from flowbench.models.families import load_pipeline
from flowbench.models.families.plane import on_plane
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.prompts import PromptSplit, load_split, spread
from flowbench.record import Record, Score, Spent, code_commit, package_versions, read_metrics, write_atomically
from flowbench.registry import algorithms
from flowbench.reporting.frontier import draw_study
from flowbench.reporting.plots import learning_curves, sample_grid
from flowbench.reward import Reward, checked_score
from flowbench.rollout import Rollout
from flowbench.terms import path_name
from flowbench.testbeds.shapes.truth import truth
from flowbench.training.checkpoint import CHECKPOINT, METRICS
from flowbench.training.trainer import IterationLog, Trainer

CONFIG, RECORD, DONE = "config.yaml", "record.json", "DONE"
CALL = "pipeline_call.json"  # beside the tuned weights
TRUTH_EVERY = 4  # iterations; the oracle is not free


@dataclass(frozen=True)
class Listener:
    """Where a run tells how far it is; all of it optional."""

    on_start: Callable[[int, int], None] = lambda iteration, iterations: None
    on_iteration: Callable[[IterationLog], None] = lambda log: None
    on_evaluation: Callable[[int, int], None] = lambda done, total: None


def run_folder(output: Path, config: RunConfig) -> Path:
    """runs/<model>/<reward>/<algorithm>/<config-hash>-s<seed>."""
    model = load_preset(config.model).name
    return output / model / path_name(config.reward) / config.algorithm / f"{config.hash()}-s{config.seed}"


def build_policy(config: RunConfig, preset: ModelPreset, device: torch.device) -> Policy:
    """The preset's model, ready to be tuned as the configuration says."""
    training = config.training
    # LoRA's initial weights are random; they belong to the run's seed.
    torch.manual_seed(config.seed)
    return Policy(
        load_pipeline(preset, device),
        preset,
        Tuning(training.tuning, training.lora_rank, training.lora_alpha),
        device,
        sigma_distribution=training.sigma_distribution,
        sigma_logit=training.sigma_logit,
        sampler=training.sampler,
        eta=training.eta,
        gradient_checkpointing=training.gradient_checkpointing,
        num_steps=training.num_steps,
        guidance_scale=training.guidance_scale,
        rollout_dtype=getattr(torch, training.rollout_dtype),
        compile_blocks=training.compile,
    )


def build_algorithm(config: RunConfig, reward: Reward) -> Algorithm:
    """The algorithm with its hyperparameters."""
    cls = algorithms.get(config.algorithm).cls

    def score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return checked_score(reward, images, prompts)

    torch.manual_seed(config.seed)
    return cls(cls.Config.model_validate(config.hyperparameters), score)


def prepare_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Make the run folder and write its config.yaml.

    Raises UsageError when it already holds a finished run, or an unfinished one without `resume`.
    """
    if (folder / DONE).exists():
        raise UsageError(
            f"this run is finished: {folder}; change --seed or a setting, or delete the folder to repeat it"
        )
    if (folder / CHECKPOINT).exists() and not resume:
        raise UsageError(f"an unfinished run is in {folder}; add --resume to continue it, or delete the folder")
    if not resume and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def execute(config: RunConfig, folder: Path, command: str, resume: bool, listener: Listener = Listener()) -> Record:
    """Train and evaluate; the folder then holds everything that design.md promises.

    Raises RunError when something fails on the way, with all that was computed saved.
    """
    preset, device = load_preset(config.model), pick_device(config.device)
    splits = [load_split(config.prompt_set(preset), name) for name in config.evaluation.splits]
    train_prompts = load_split(config.prompt_set(preset), "train")
    prepare_folder(folder, config, resume)
    keep_inputs(folder, preset, train_prompts, splits)
    reward = build_reward(config.reward, preset, device, config.training.reward_scale == "standardized")
    policy = build_policy(config, preset, device)
    # Now, so that a missing or forbidden judge costs no training; a GPU's memory is then for training alone.
    early = build_judges(config, reward, preset, torch.device("cpu"), splits)
    judges = early if device.type == "cpu" else None
    algorithm = build_algorithm(config, reward)
    trainer = Trainer(config, policy, algorithm, reward, train_prompts.prompts, folder, listener.on_iteration)
    study = exact_study(policy, reward, config, trainer.iterations)
    if study:
        trainer.probe = study.probe
    if early.oracle and config.reward != "oracle":
        trainer.observe = _truth_of_training
    if resume:
        trainer.resume()
    listener.on_start(trainer.iteration, trainer.iterations)
    if device.type != "cpu":  # now, because training moves the text encoders off the device
        policy.encode([p for split in splits for p in spread(split, config.evaluation.prompts)])
    budget = trainer.run()
    trainer.updater.use_average()
    save_tuned(policy, folder / "checkpoints" / "tuned", config)
    evaluation_begun = time.perf_counter()
    judges = judges or build_judges(config, reward, preset, device, splits)
    pairs = evaluate_pairs(policy, splits, judges, config.evaluation, listener.on_evaluation)
    scores = {**compare(pairs), **(study.scores(config.evaluation.splits) if study else {})}
    spent = Spent(
        images=budget.images,
        reward_calls=budget.reward_calls,
        function_evaluations=budget.function_evaluations,
        seconds=budget.seconds,
        evaluation_seconds=time.perf_counter() - evaluation_begun,
        overhead=1 - sum(budget.timings.values()) / max(budget.seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(device),
    )
    all_splits = [train_prompts, *splits]
    record = make_record(config, reward, judges, spent, pairs, scores, splits, all_splits, command, device)
    record.save(folder / RECORD)
    draw(folder, pairs, config)
    if study:
        draw_study(folder / "frontier.png", study, read_metrics(folder / METRICS), scores)
    (folder / DONE).touch()
    return record


def _truth_of_training(rollout: Rollout) -> dict[str, float]:
    """What the oracle thinks of the images trained on, now and then: beside the reward it shows over-optimisation."""
    if rollout.iteration % TRUTH_EVERY:
        return {}
    return {name: verdicts.mean().item() for name, verdicts in truth(rollout.images, rollout.prompts).items()}


def save_tuned(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Write the tuned weights, and beside them the arguments with which plain diffusers samples what is evaluated."""
    policy.save(folder)
    if on_plane(policy):
        return
    scale = guidance_scales(policy, config.evaluation)[""]
    arguments = policy.family.call_arguments(config.evaluation.num_steps or policy.preset.num_steps, scale)
    write_atomically(folder / CALL, json.dumps(arguments, indent=1) + "\n")


@dataclass(frozen=True)
class Pair:
    """Scores of the base and of the tuned model on one split."""

    base: SplitScores
    tuned: SplitScores


def evaluate_pairs(
    policy: Policy,
    splits: list[PromptSplit],
    judges: Judges,
    protocol: EvaluationConfig,
    progress: Callable[[int, int], None],
) -> dict[str, Pair]:
    """Score base and tuned model on each split, on the same prompts and noise."""
    done, total = 0, 2 * count_images(policy, splits, protocol)

    def tick(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return {
        split.name: Pair(*(score_split(policy, w, split, judges, protocol, tick) for w in ("reference", "current")))
        for split in splits
    }


def compare(pairs: dict[str, Pair]) -> dict[str, Score]:
    """Scores per metric and split, and for the oracle's also per category, with paired intervals over prompts."""
    scores = {}
    for split, pair in pairs.items():
        for metric in pair.base.scores:
            scores[f"{metric}/{split}"] = _score(pair.base.scores[metric], pair.tuned.scores[metric])
            if metric.startswith("oracle"):
                for (category, base), (_, tuned) in zip(
                    by_category(pair.base, metric), by_category(pair.tuned, metric), strict=True
                ):
                    scores[f"{metric}/{split}/{category}"] = _score(base, tuned)
    return scores


def _score(base: Any, tuned: Any) -> Score:
    return Score(base=float(base.mean()), tuned=float(tuned.mean()), diff_ci95=mean_ci95(tuned - base))


def make_record(
    config: RunConfig,
    reward: Reward,
    judges: Judges,
    spent: Spent,
    pairs: dict[str, Pair],
    scores: dict[str, Score],
    splits: list[PromptSplit],
    all_splits: list[PromptSplit],
    command: str,
    device: torch.device,
) -> Record:
    """Everything that the record must answer for."""
    return Record(
        algorithm=config.algorithm,
        reward=config.reward,
        model=config.model,
        seed=config.seed,
        budget=spent,
        scores=scores,
        per_prompt={
            f"{metric}/{split}": {"base": values.tolist(), "tuned": pair.tuned.scores[metric].tolist()}
            for split, pair in pairs.items()
            for metric, values in pair.base.scores.items()
        },
        prompts={split: [p.text for p in pair.base.prompts] for split, pair in pairs.items()},
        config=config.model_dump(mode="json"),
        config_hash=config.hash(),
        protocol_hash=protocol_hash(config.evaluation, splits, load_preset(config.model).sigma_spacing),
        prompt_hashes={s.name: s.sha256 for s in all_splits},
        reward_provenance=reward.provenance(),
        judges={name: judges.rewards[name].provenance() for name in judges.held_out},
        command=command,
        commit=code_commit(),
        device=_device_name(device),
        versions=package_versions(),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def draw(folder: Path, pairs: dict[str, Pair], config: RunConfig) -> None:
    """Sample grids before and after, where samples are images, and the learning curves."""
    for split, pair in pairs.items():
        if pair.base.grid.shape[2] != 3:
            continue
        prompts = [p.text for p in pair.base.prompts[: len(pair.base.grid)]]
        sample_grid(folder / "samples" / f"{split}.png", {"base": pair.base.grid, "tuned": pair.tuned.grid}, prompts)
    title = f"{config.algorithm} on {config.reward}, seed {config.seed}"
    learning_curves(folder / "curves.png", read_metrics(folder / METRICS), title)


def load_tuned(folder: Path, device: torch.device) -> tuple[Policy, RunConfig]:
    """The policy of a finished run, with the base model as its "reference".

    Raises UsageError for a folder that holds no run, RunError when its weights are missing.
    """
    config, preset = run_config(folder)
    weights = tuned_weights(folder)
    policy = build_policy(config, preset, device)
    policy.load_state_dict(weights)
    return policy, config


def run_config(folder: Path) -> tuple[RunConfig, ModelPreset]:
    """A run's configuration, and the preset as it was then.

    Raises UsageError for a folder that holds no run.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"'{folder}' is no run folder (it has no {CONFIG})")
    return load_run_config(path)


def tuned_weights(folder: Path) -> dict[str, Any]:
    """The weights that a run evaluates, for `Policy.load_state_dict`.

    Raises RunError when they are missing.
    """
    checkpoint = folder / CHECKPOINT
    if not checkpoint.is_file():
        raise RunError(f"run '{folder}' has no checkpoint yet; continue it with --resume")
    from flowbench.training.state import load_state

    state = load_state(checkpoint)
    # The reference view of a run that uses "old" is not needed to sample from it.
    return {"current": state["average"] or state["policy"]["current"]}


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the GPU where one is used, else of this process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"


def release_memory() -> None:
    """Give unused memory back between two runs of one process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
