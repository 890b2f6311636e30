"""`flowbench probe`: what one update of an algorithm is worth, beside the true gradient of the mean reward."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flowbench.caches import home
from flowbench.config import RunConfig
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.directions import Worth, worth
from flowbench.evaluation.judges import build_reward
from flowbench.experiments import api
from flowbench.experiments.run import build_algorithm, build_policy, run_config, tuned_weights
from flowbench.experiments.true_gradient import Identity, SamplingPath, TrueGradient, identify, true_gradient
from flowbench.experiments.updates import measure_updates
from flowbench.files import write_atomically
from flowbench.models.devices import pick_device
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.record import code_commit
from flowbench.terms import combined_info, parse_reward
from flowbench.training.trainer import Trainer

PARTS = 8  # of a true gradient that is estimated
Which: TypeAlias = Literal["evaluation", "own"]


@dataclass(frozen=True)
class ProbePlan:
    """How much is measured. images: for the true gradient, in all; batches: of each algorithm; warmup: iterations
    before, in which only the algorithm's own networks learn (it may itself ask for more); sampler: whether the true
    gradient is that of the evaluation's sampler or of the algorithm's own; cache: where true gradients are kept, None
    is a folder in flowbench's home.
    """

    images: int = 8192
    batches: int = 12
    warmup: int = 0
    sampler: Which = "evaluation"
    cache: Path | None = None


@dataclass(frozen=True)
class Truth:
    """The true gradient that an algorithm was compared with. images 0: exact; parts: independent estimates of it."""

    key: str
    images: int
    parts: int
    reused: bool


@dataclass(frozen=True)
class Probed:
    """One algorithm's row. parameters: how many its tuning trains; worth None: `failure` says why."""

    algorithm: str
    config_hash: str
    tuning: str
    parameters: int
    batches: int
    images: int
    warmup_iterations: int
    warmup_images: int
    seconds: float
    truth: Truth | None
    worth: Worth | None
    failure: str | None = None


@dataclass(frozen=True)
class ProbeReport:
    """What `flowbench probe` found. weights: "base", or the run folder that they are from; images: of all rows."""

    model: str
    reward: str
    seed: int
    weights: str
    sampler: Which
    rows: tuple[Probed, ...]
    command: str
    commit: str | None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class ProbeListener:
    """Where a probe tells how far it is: what it is at, done and total."""

    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None


def probe_configs(
    algorithms: Sequence[str],
    reward: str | None,
    model: str | None,
    run: Path | None,
    seed: int,
    device: str,
    settings: dict[str, Any],
    plugins: Sequence[Path] = (),
) -> list[RunConfig]:
    """The configuration of each algorithm; with `run` its model, reward and tuning.

    Raises UsageError as a run of it would, and for a reward without gradient.
    """
    if run is not None:
        its_own, _ = run_config(run)
        if model is not None and model != its_own.model:
            raise UsageError(f"run '{run}' is of model '{its_own.model}', not '{model}'; leave --model out")
        model, reward = its_own.model, reward or its_own.reward
        tuning = its_own.training
        settings = {
            "training.tuning": tuning.tuning,
            "training.lora_rank": tuning.lora_rank,
            "training.lora_alpha": tuning.lora_alpha,
            **settings,
        }
    configs = [api.resolve(a, reward, model, seed, None, device, settings, None, plugins) for a in algorithms]
    for term in parse_reward(configs[0].reward):
        if not combined_info((term,)).differentiable:
            raise UsageError(
                f"probe needs the reward's gradient; reward '{term.name}' has none, use for example 'clip'"
            )
    return configs


def probe(
    configs: Sequence[RunConfig],
    plan: ProbePlan,
    run: Path | None = None,
    command: str = "",
    listener: ProbeListener = ProbeListener(),
    output: Path | None = None,
) -> ProbeReport:
    """Probe each algorithm from the same fixed weights: the base model's, or those of a run.

    An algorithm that fails is a row with its reason. `output` is written after every row, so that an interruption
    loses one. Raises RunError when the run's weights are missing.
    """
    weights = tuned_weights(run) if run is not None else None
    first = configs[0]
    report = ProbeReport(
        model=load_preset(first.model).name,
        reward=first.reward,
        seed=first.seed,
        weights="base" if run is None else str(run),
        sampler=plan.sampler,
        rows=(),
        command=command,
        commit=code_commit(),
    )
    for config in configs:
        report = replace(report, rows=(*report.rows, _probe_one(config, plan, weights, listener)))
        if output is not None:
            report.save(output)
    return report


def _probe_one(config: RunConfig, plan: ProbePlan, weights: dict[str, Any] | None, listener: ProbeListener) -> Probed:
    preset, device = load_preset(config.model), pick_device(config.device)
    prompts = load_split(config.prompt_set(preset), "train")
    policy = build_policy(config, preset, device, [prompts.prompts, [""]])
    if weights is not None:
        policy.load_state_dict(weights)
    policy.encode(prompts.prompts)
    if device.type != "cpu":
        policy.encode([""])
        policy.release_text_encoders()
    row = Probed(
        algorithm=config.algorithm,
        config_hash=config.hash(),
        tuning=config.training.tuning,
        parameters=sum(p.numel() for p in policy.trainable_parameters()),
        batches=plan.batches,
        images=0,
        warmup_iterations=0,
        warmup_images=0,
        seconds=0.0,
        truth=None,
        worth=None,
    )
    try:
        identity, gradient = _truth(config, policy, plan, listener)
        truth = Truth(identity.key(), gradient.images, len(gradient.parts), gradient.reused)
        row, begun = replace(row, truth=truth), time.perf_counter()
        reward = build_reward(config.reward, preset, device, config.training.reward_scale == "standardized")
        algorithm = build_algorithm(config, reward)
        trainer = Trainer(config, policy, algorithm, reward, prompts.prompts, Path())  # it writes nothing here
        found = measure_updates(trainer, plan.batches, plan.warmup, listener.on_progress)
        return replace(
            row,
            images=found.images * len(found.plain),
            warmup_iterations=found.warmup_iterations,
            warmup_images=found.warmup_images,
            seconds=time.perf_counter() - begun,
            worth=worth(found.plain, found.shuffled, gradient.parts, found.images),
        )
    except RunError as error:
        return replace(row, failure=str(error))


def _truth(
    config: RunConfig, policy: Policy, plan: ProbePlan, listener: ProbeListener
) -> tuple[Identity, TrueGradient]:
    """The true gradient in the algorithm's own parameters, of the reward as it is, never standardised."""
    preset = policy.preset
    reward = build_reward(config.reward, preset, policy.device)
    prompts = load_split(config.prompt_set(preset), "train")
    path = sampling_path(config, policy, plan.sampler)
    identity = identify(policy, reward, prompts, path, plan.images - plan.images % PARTS, PARTS, config.seed)
    gradient = true_gradient(
        policy,
        reward,
        prompts,
        identity,
        plan.cache or home() / "gradients",
        config.training.microbatch,
        config.training.gradient_checkpointing,
        lambda done, total: listener.on_progress(f"true gradient ({config.training.tuning})", done, total),
    )
    return identity, gradient


def sampling_path(config: RunConfig, policy: Policy, which: Which) -> SamplingPath:
    """The evaluation's sampler, or that of the algorithm's training."""
    training, preset = config.training, policy.preset
    if which == "evaluation":
        steps, given, sampler = config.evaluation.num_steps, config.evaluation.guidance_scale, "ode"
    else:
        steps, given, sampler = training.num_steps, training.guidance_scale, training.sampler
    return SamplingPath(
        sampler=sampler,
        sigmas=tuple(policy.sigmas(steps or preset.num_steps).tolist()),
        eta=training.eta,
        guidance_scale=preset.guidance_scale if given is None else given,
    )
