"""One run from configuration to record: build, train, evaluate, write."""

from __future__ import annotations

import datetime
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, load_run_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.exact_study import exact_study
from flowbench.evaluation.judges import build_judges, training_reward
from flowbench.evaluation.pairs import Pair, compare, evaluate_pairs, evaluated_texts
from flowbench.evaluation.protocol import Judges, guidance_scales, protocol_hash
from flowbench.experiments.inputs import keep_inputs
from flowbench.models.encoding import EncodedTexts, encode_ahead, encodes_ahead
from flowbench.models.families import load_pipeline
from flowbench.models.families.plane import on_plane
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.models.processes import Processes, started
from flowbench.prompts import PromptSplit, load_split
from flowbench.record import Record, Score, Spent, code_commit, package_versions, read_metrics, write_atomically
from flowbench.registry import algorithms
from flowbench.reporting.frontier import draw_study
from flowbench.reporting.plots import learning_curves
from flowbench.reporting.samples import draw_pairs
from flowbench.reward import Reward, checked_score
from flowbench.rollout import Rollout
from flowbench.terms import path_name
from flowbench.testbeds.shapes.truth import truth
from flowbench.training.checkpoint import CHECKPOINT, METRICS
from flowbench.training.processes import check_division
from flowbench.training.trainer import IterationLog, Trainer

CONFIG, RECORD, DONE = "config.yaml", "record.json", "DONE"
CALL = "pipeline_call.json"  # beside the tuned weights
TRUTH_EVERY = 4  # iterations; the oracle is not free


@dataclass(frozen=True)
class Listener:
    """Where a run tells how far it is; all of it optional. on_record: the result, with its folder complete."""

    on_start: Callable[[int, int], None] = lambda iteration, iterations: None
    on_iteration: Callable[[IterationLog], None] = lambda log: None
    on_evaluation: Callable[[int, int], None] = lambda done, total: None
    on_record: Callable[[Record, Path], None] = lambda record, folder: None


def run_folder(output: Path, config: RunConfig) -> Path:
    """runs/<model>/<reward>/<algorithm>/<config-hash>-s<seed>."""
    model = load_preset(config.model).name
    return output / model / path_name(config.reward) / config.algorithm / f"{config.hash()}-s{config.seed}"


def build_policy(
    config: RunConfig, preset: ModelPreset, device: torch.device, texts: Sequence[Sequence[str]] = ()
) -> Policy:
    """The preset's model, ready to be tuned as the configuration says.

    texts: groups of all prompts that it will be asked for, to be encoded before the rest of it is loaded where
    `encodes_ahead` says so; without them the text encoders are loaded with the rest.
    """
    training = config.training
    ahead = _encoded(preset, device, texts, training.encode_first)
    # LoRA's initial weights are random; they belong to the run's seed.
    torch.manual_seed(config.seed)
    policy = Policy(
        load_pipeline(preset, device) if ahead is None else load_pipeline(preset, device, "rest"),
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
    if ahead is not None:
        policy.texts.take(ahead)
    return policy


def base_policy(preset: ModelPreset, device: torch.device, texts: Sequence[Sequence[str]] = ()) -> Policy:
    """The preset's model as it is; `texts` as in `build_policy`."""
    ahead = _encoded(preset, device, texts)
    policy = Policy(load_pipeline(preset, device, "all" if ahead is None else "rest"), preset, device=device)
    if ahead is not None:
        policy.texts.take(ahead)
    return policy


def _encoded(
    preset: ModelPreset, device: torch.device, texts: Sequence[Sequence[str]], asked: bool | None = None
) -> EncodedTexts | None:
    return encode_ahead(preset, device, texts) if texts and encodes_ahead(preset, device, asked) else None


def build_algorithm(config: RunConfig, reward: Reward) -> Algorithm:
    """The algorithm with its hyperparameters."""
    cls = algorithms.get(config.algorithm).cls

    def score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return checked_score(reward, images, prompts)

    torch.manual_seed(config.seed)
    return cls(cls.Config.model_validate(config.hyperparameters), score)


def prepare_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Make the run folder and write its config.yaml.

    Raises UsageError when it already holds a finished run, an unfinished one without `resume`, or none with it.
    """
    if (folder / DONE).exists():
        raise UsageError(
            f"this run is finished: {folder}; change --seed or a setting, or delete the folder to repeat it"
        )
    if (folder / CHECKPOINT).exists() and not resume:
        raise UsageError(f"an unfinished run is in {folder}; add --resume to continue it, or delete the folder")
    if resume and not (folder / CHECKPOINT).exists():
        raise UsageError(f"nothing to resume in {folder}; check --output, --seed and the settings, or drop --resume")
    if not resume and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def execute(config: RunConfig, folder: Path, command: str, resume: bool, listener: Listener = Listener()) -> Record:
    """Train and evaluate; the folder then holds everything that design.md promises.

    In each of several processes that were started together, this is its share of the work: main writes, and listens.
    Raises RunError when something fails on the way, with all that was computed saved.
    """
    with started(config.device) as processes:
        return _execute(config, folder, command, resume, listener if processes.is_main else Listener(), processes)


def _execute(
    config: RunConfig, folder: Path, command: str, resume: bool, listener: Listener, processes: Processes
) -> Record:
    preset, device = load_preset(config.model), processes.device
    check_division(processes, config.training)
    splits = [load_split(config.prompt_set(preset), name) for name in config.evaluation.splits]
    train_prompts = load_split(config.prompt_set(preset), "train")
    if processes.is_main:
        prepare_folder(folder, config, resume)
        keep_inputs(folder, preset, train_prompts, splits)
    processes.wait()
    reward = training_reward(config, preset, device, config.training.reward_scale == "standardized")
    evaluated, *others = evaluated_texts(splits, config.evaluation)
    policy = build_policy(config, preset, device, [evaluated, *others, train_prompts.prompts])
    policy.processes = processes
    # Now, so that a missing or forbidden judge costs no training.
    judges = build_judges(config, reward, preset, device, splits)
    algorithm = build_algorithm(config, reward)
    trainer = Trainer(config, policy, algorithm, reward, train_prompts.prompts, folder, listener.on_iteration)
    study = exact_study(policy, reward, config, trainer.iterations)
    if study:
        trainer.probe = study.probe
    if judges.oracle and config.reward != "oracle":
        trainer.observe = _truth_of_training
    if resume:
        trainer.resume()
    listener.on_start(trainer.iteration, trainer.iterations)
    if device.type != "cpu":  # now, because training moves the text encoders off the device
        policy.encode(evaluated)
    budget = trainer.run()
    trainer.updater.use_average()
    if processes.is_main:
        save_tuned(policy, folder / "checkpoints" / "tuned", config)
    evaluation_begun = time.perf_counter()
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
    record = make_record(config, reward, judges, spent, pairs, scores, splits, all_splits, command, processes)
    if processes.is_main:
        record.save(folder / RECORD)
        draw(folder, pairs, config)
        if study:
            draw_study(folder / "frontier.png", study, read_metrics(folder / METRICS), scores)
        (folder / DONE).touch()
        listener.on_record(record, folder)
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
    processes: Processes,
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
        protocol_hash=protocol_hash(config.undivided().evaluation, splits, load_preset(config.model).sigma_spacing),
        prompt_hashes={s.name: s.sha256 for s in all_splits},
        reward_provenance=reward.provenance(),
        judges={name: judges.rewards[name].provenance() for name in judges.held_out},
        base_cached=tuple(split for split, pair in pairs.items() if pair.cached),
        command=command,
        commit=code_commit(),
        device=processes.hardware,
        versions=package_versions(),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def draw(folder: Path, pairs: dict[str, Pair], config: RunConfig) -> None:
    """Sample grids before and after, where samples are images, and the learning curves."""
    title = f"{config.algorithm} on {config.reward}, seed {config.seed}"
    draw_pairs(folder / "samples", pairs, config.reward, title)
    learning_curves(
        folder / "curves.png", read_metrics(folder / METRICS), title, config.reward, algorithm=config.algorithm
    )


def load_tuned(folder: Path, device: torch.device, texts: Sequence[Sequence[str]] = ()) -> tuple[Policy, RunConfig]:
    """The policy of a finished run, with the base model as its "reference"; `texts` as in `build_policy`.

    Raises UsageError for a folder that holds no run, RunError when its weights are missing.
    """
    config, preset = run_config(folder)
    weights = tuned_weights(folder)
    policy = build_policy(config, preset, device, texts)
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
