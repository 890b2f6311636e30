"""One run from configuration to record: build, train, evaluate, write."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowbench.algorithm import Algorithm
from flowbench.config import RunConfig, load_run_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.dev import ImageDev, dev_split
from flowbench.evaluation.exact_study import exact_study
from flowbench.evaluation.judges import build_judges, training_reward
from flowbench.evaluation.lengths import cut_prompts
from flowbench.evaluation.pairs import Pair, compare, evaluate_pairs, evaluated_texts
from flowbench.evaluation.protocol import guidance_scales
from flowbench.experiments.folder import CONFIG, RECORD, check_finished, finished_record, mark_finished, occupied
from flowbench.experiments.inputs import keep_inputs
from flowbench.experiments.kept import IMAGES, make_album, save_table
from flowbench.experiments.outcome import NO_WAY, Evaluated, Way, costs_of, make_record
from flowbench.files import write_atomically, write_folder
from flowbench.hooks import guarded, hook
from flowbench.models.counting import EVALUATION
from flowbench.models.encoding import EncodedTexts, encode_ahead, encodes_ahead
from flowbench.models.families import load_pipeline
from flowbench.models.families.plane import on_plane
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import AnalyticPreset, ModelPreset, load_preset
from flowbench.models.processes import Processes, started
from flowbench.prompts import load_split, spread
from flowbench.reading.checksums import SUMS, write_sums
from flowbench.record import Point, Record, read_metrics
from flowbench.registry import algorithms
from flowbench.reporting.frontier import draw_study
from flowbench.reporting.plots import learning_curves
from flowbench.reporting.samples import draw_pairs
from flowbench.reporting.style import drawing
from flowbench.reward import Reward, checked_score
from flowbench.rollout import Rollout
from flowbench.testbeds.shapes.truth import truth
from flowbench.training.checkpoint import AGAIN, METRICS, checkpoint_files, rescued
from flowbench.training.points import Points
from flowbench.training.processes import check_division
from flowbench.training.trainer import IterationLog, Trainer

CALL = "pipeline_call.json"  # beside the tuned weights
TRUTH_EVERY = 4  # iterations; the oracle is not free


@dataclass(frozen=True)
class Listener:
    """Where a run tells how far it is; all of it optional.

    on_record: the result, with its folder complete; on_point: scores on split dev, the base model's as iteration 0.
    """

    on_start: Callable[[int, int], None] = lambda iteration, iterations: None
    on_iteration: Callable[[IterationLog], None] = lambda log: None
    on_evaluation: Callable[[int, int], None] = lambda done, total: None
    on_record: Callable[[Record, Path], None] = lambda record, folder: None
    on_point: Callable[[Point], None] = lambda point: None


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
    policy.texts.announce(text for group in texts for text in group)
    if ahead is not None:
        policy.texts.take(ahead)
    return policy


def base_policy(preset: ModelPreset, device: torch.device, texts: Sequence[Sequence[str]] = ()) -> Policy:
    """The preset's model as it is; `texts` as in `build_policy`."""
    ahead = _encoded(preset, device, texts)
    policy = Policy(load_pipeline(preset, device, "all" if ahead is None else "rest"), preset, device=device)
    policy.texts.announce(text for group in texts for text in group)
    if ahead is not None:
        policy.texts.take(ahead)
    return policy


def _encoded(
    preset: ModelPreset, device: torch.device, texts: Sequence[Sequence[str]], asked: bool | None = None
) -> EncodedTexts | None:
    return encode_ahead(preset, device, texts) if texts and encodes_ahead(preset, device, asked) else None


def build_algorithm(config: RunConfig, reward: Reward) -> Algorithm:
    """The algorithm with its hyperparameters; what its hooks raise or return wrongly is told with their place."""
    cls = algorithms.get(config.algorithm).cls

    def score(images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return checked_score(reward, images, prompts)

    torch.manual_seed(config.seed)
    with hook(f"algorithm '{config.algorithm}'", "__init__", cls):
        algorithm: Algorithm = cls(cls.Config.model_validate(config.hyperparameters), score)
    return guarded(algorithm)


def execute(
    config: RunConfig,
    folder: Path,
    command: str,
    resume: bool,
    listener: Listener = Listener(),
    overwrite: bool = False,
    lean: bool = False,
) -> Record:
    """Train and evaluate; the folder then holds everything that docs/records.md promises.

    In each of several processes that were started together, this is its share of the work: main writes, and listens.
    With `resume` a run that is finished is left as it is, and gives its record; overwrite: begin anew, whatever is
    there; lean: leave no pictures and no checkpoint beside the record and the tuned weights, as one of many trials.
    Raises UsageError and BusyError as `folder.occupied` does. Whatever else is raised once training can begin,
    the last good iteration is saved, and a note of the error says where and how to go on.
    """
    if resume and (record := finished_record(folder)):
        return record
    with started(config.device) as processes, ExitStack() as held:
        request = _Request(config, folder, command, resume, overwrite, lean)
        return _execute(request, listener if processes.is_main else Listener(), processes, held)


@dataclass(frozen=True)
class _Request:
    """What `execute` was asked for."""

    config: RunConfig
    folder: Path
    command: str
    resume: bool
    overwrite: bool
    lean: bool

    @property
    def plain(self) -> str:
        """The command that makes the same run where there is none: how often it was interrupted is no part of it."""
        try:
            words = shlex.split(self.command)
        except ValueError:  # it is no command
            return self.command
        return shlex.join(word for word in words if word not in ("--resume", "--overwrite"))

    @property
    def again(self) -> str:
        """How to go on after an interruption."""
        return f"continue with: {self.plain} --resume" if self.plain and self.plain.isprintable() else AGAIN


def _execute(request: _Request, listener: Listener, processes: Processes, held: ExitStack) -> Record:
    config, folder = request.config, request.folder
    preset, device = load_preset(config.model), processes.device
    check_division(processes, config.training)
    splits = [load_split(config.prompt_set(preset), name) for name in config.evaluation.splits]
    train_prompts = load_split(config.prompt_set(preset), "train")
    # On the plane prompts say nothing: its points are exact.
    dev = None if isinstance(preset, AnalyticPreset) else dev_split(config, preset)
    on_dev = spread(dev, config.evaluation.prompts) if dev else ()
    if processes.is_main:
        held.enter_context(occupied(folder, config, request.resume, request.overwrite))
        keep_inputs(folder, preset, train_prompts, [*splits, *((dev,) if dev else ())])
    processes.wait()
    reward = training_reward(config, preset, device, config.training.reward_scale == "standardized")
    protocol = config.protocol()
    evaluated, *others = evaluated_texts(splits, protocol)
    texts = [evaluated, *others, train_prompts.prompts, *([on_dev] if on_dev else [])]
    policy = build_policy(config, preset, device, texts)
    policy.processes = processes
    # Now, so that a missing or forbidden judge costs no training.
    judges = build_judges(config, reward, preset, device, splits)
    cut = cut_prompts(policy, judges.rewards, [text for group in texts for text in group])
    algorithm = build_algorithm(config, reward)
    trainer = Trainer(config, policy, algorithm, reward, train_prompts.prompts, folder, listener.on_iteration)
    study = exact_study(policy, reward, config, trainer.iterations)
    if study:
        trainer.probe = study.probe
    scorer = ImageDev(policy, reward, judges, config, dev, config.prompt_set(preset)) if dev else study
    if scorer and config.evaluation.points:
        trainer.points = Points(scorer, policy, config.evaluation.points, trainer.iterations, folder, listener.on_point)
    if judges.oracle and config.reward != "oracle":
        trainer.observe = _truth_of_training
    if request.resume:
        trainer.resume()
    trainer.again = request.again
    with rescued(trainer):
        listener.on_start(trainer.iteration, trainer.iterations)
        if device.type != "cpu":  # now, because training moves the text encoders off the device
            for prompts in filter(None, (evaluated, [""], train_prompts.prompts, on_dev)):
                policy.encode(prompts)
        budget = trainer.run()
        trainer.updater.use_average()
        if processes.is_main:
            save_tuned(policy, folder / "checkpoints" / "tuned", config)
        evaluation_begun = time.perf_counter()
        with policy.evaluations.counted_as(EVALUATION):
            album = make_album(folder / IMAGES, processes) if protocol.keep_images else None
            pairs = evaluate_pairs(policy, splits, judges, protocol, listener.on_evaluation, album)
        if album:
            save_table(album, protocol.seed, processes)
        scores = {**compare(pairs), **(study.scores(config.evaluation.splits) if study else {})}
        seconds = time.perf_counter() - evaluation_begun
        (evaluations,) = processes.total((policy.evaluations.counts.get(EVALUATION, 0),))
        costs = costs_of(policy, budget, trainer.points, (seconds, evaluations), processes.hardware)
        way = Way(trainer.points.base, trainer.points.reached) if trainer.points else NO_WAY
        outcome = Evaluated(pairs, scores, seconds, evaluations)
        used = [train_prompts, *splits]
        record = make_record(config, request.plain, reward, judges, used, dev, outcome, budget, costs, way, cut)
        if processes.is_main:
            record.save(folder / RECORD)
            mark_finished(folder)
    if processes.is_main:
        trainer.checkpoints.keep_only(config.training.keep_checkpoints or (0 if request.lean else 1))
        if not request.lean:
            with drawing(f"of run '{folder}'"):
                draw(folder, pairs, config, way)
                if study and splits:
                    draw_study(folder / "frontier.png", study, read_metrics(folder / METRICS), scores)
        listener.on_record(record, folder)
    return record


def _truth_of_training(rollout: Rollout) -> dict[str, float]:
    """What the oracle thinks of the images trained on, now and then: beside the reward it shows over-optimisation."""
    if rollout.iteration % TRUTH_EVERY:
        return {}
    return {name: verdicts.mean().item() for name, verdicts in truth(rollout.images, rollout.prompts).items()}


def save_tuned(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Write the tuned weights, and beside them the arguments with which plain diffusers samples what is evaluated."""

    def save(place: Path) -> None:
        policy.save(place)
        if not on_plane(policy):
            scale = guidance_scales(policy, config.evaluation)[""]
            arguments = policy.family.call_arguments(config.evaluation.num_steps or policy.preset.num_steps, scale)
            write_atomically(place / CALL, json.dumps(arguments, indent=1) + "\n")
        write_sums(place / SUMS, (file for file in place.rglob("*") if file.is_file()))

    write_folder(folder, save)


def draw(folder: Path, pairs: dict[str, Pair], config: RunConfig, way: Way = NO_WAY) -> None:
    """Sample grids before and after, where samples are images, and the learning curves."""
    title = f"{config.algorithm} on {config.reward}, seed {config.seed}"
    draw_pairs(folder / "samples", pairs, config.reward, title)
    log = read_metrics(folder / METRICS)
    learning_curves(folder / "curves.png", log, title, config.reward, way.base, way.points, config.algorithm)


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

    Raises UsageError for a folder that holds no run, or a finished one whose texts are not as they were.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"'{folder}' is no run folder (it has no {CONFIG})")
    check_finished(folder)
    return load_run_config(path)


def tuned_weights(folder: Path) -> dict[str, Any]:
    """The weights that a run evaluates, for `Policy.load_state_dict`.

    Raises RunError when they are missing or damaged.
    """
    files = checkpoint_files(folder)
    if not files:
        raise RunError(f"run '{folder}' has no checkpoint yet; continue it with --resume")
    from flowbench.training.state import load_state

    state = load_state(files[0])
    # The reference view of a run that uses "old" is not needed to sample from it.
    return {"current": state["average"] or state["policy"]["current"]}
