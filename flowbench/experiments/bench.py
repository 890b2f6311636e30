"""How fast a model samples, learns and is evaluated here, and how near that is to the device's matrix products."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.planning.storages import Meter
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.activations import own_gelu
from flowbench.models.devices import pick_device
from flowbench.models.policy import Policy
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.prompts import load_split
from flowbench.record import package_versions
from flowbench.registry import algorithms
from flowbench.rollout import Batch, Rollout
from flowbench.scoring.checkpoints import random_weights
from flowbench.training.budget import Budget
from flowbench.training.collect import Collector
from flowbench.training.trainer import Trainer

PLAIN = "plain-diffusers"
PROMPTS = 4
MATMUL = {"cuda": 8192, "cpu": 1024}  # side of the squares whose product is the measure
PARTS = {"rollout": "images", "decode": "images", "reward": "images", "update": "rows", "evaluation": "images"}


@dataclass(frozen=True)
class Speed:
    """One part: the median of its seconds, what it did, operations, the share of a matrix product's rate, and memory.

    peak_gib: on a GPU of all that was allocated meanwhile; on a CPU of the tensors that the part made itself.
    """

    part: str
    seconds: float
    number: int
    unit: str
    tflop: float
    matmul_share: float
    peak_gib: float

    @property
    def rate(self) -> float:
        """Images or rows per second."""
        return self.number / self.seconds


@dataclass(frozen=True)
class Overlap:
    """Median seconds of rollout, decode and reward together, in portions of `portion` images.

    beside: those of one portion scored while the next is sampled (`training.overlap`); in_turns: one after the other.
    """

    portion: int
    in_turns: float
    beside: float

    @property
    def speedup(self) -> float:
        """How many times as fast it is beside."""
        return self.in_turns / self.beside


@dataclass(frozen=True)
class BenchReport:
    """What `flowbench bench` found. rollouts: images per second of rollout, decode and reward, one after the other.

    overlap: what it brings to have them beside each other; None where that is not done, as on a CPU.
    """

    model: str
    algorithm: str
    reward: str
    device: str
    dtype: str
    tuning: str
    images: int
    repeats: int
    matmul_tflops: float
    rollouts: float
    speeds: tuple[Speed, ...]
    plain_seconds: float | None
    overlap: Overlap | None
    versions: dict[str, str]

    @property
    def over_plain(self) -> float | None:
        """How many times as fast as plain diffusers rollout and decode are."""
        seconds = {speed.part: speed.seconds for speed in self.speeds}
        return None if self.plain_seconds is None else self.plain_seconds / (seconds["rollout"] + seconds["decode"])

    def as_json(self) -> dict[str, Any]:
        """The report as JSON's objects."""
        content = asdict(self)
        for line, speed in zip(content["speeds"], self.speeds, strict=True):
            line["rate"] = speed.rate
        if self.overlap is not None:
            content["overlap"]["speedup"] = self.overlap.speedup
        return {**content, "over_plain": self.over_plain}


def bench_config(
    model: str, algorithm: str, reward: str, device: str, images: int, repeats: int, settings: dict[str, Any]
) -> RunConfig:
    """The configuration that is timed: the model's own, with iterations of a few images.

    Raises UsageError for an analytic model, or images that are no multiple of the prompts.
    """
    preset = load_preset(model)
    if isinstance(preset, AnalyticPreset):
        raise UsageError(f"model '{preset.name}' is a formula; bench times networks, for example mini-sd3")
    if images % PROMPTS:
        raise UsageError(f"--images is {images}; it must be a multiple of {PROMPTS}, the number of prompts")
    fixed = {
        "training.images": images * (repeats + 2),
        "training.prompts_per_iteration": PROMPTS,
        "training.images_per_prompt": images // PROMPTS,
        "training.minibatch": images,
    }
    if "warmup" in algorithms.get(algorithm).cls.Config.model_fields:
        fixed["algorithm.warmup"] = 0
    return resolve_config(algorithm, reward, model, overrides={**fixed, **settings}, device=device)


def bench(
    config: RunConfig, repeats: int, compare: str | None = None, progress: Callable[[int], None] = lambda done: None
) -> BenchReport:
    """Time each part `repeats` times, in turns, after one time that does not count.

    Raises UsageError for something to compare with that there is not.
    """
    if compare not in (None, PLAIN):
        raise UsageError(f"bench cannot compare with '{compare}'; there is {PLAIN}")
    preset, device = load_preset(config.model), pick_device(config.device)
    with random_weights(preset.random_init), tempfile.TemporaryDirectory() as folder:
        reward = build_reward(config.reward, preset, device)
        prompts = load_split(config.prompt_set(preset), "train").prompts[:PROMPTS]
        policy = build_policy(config, preset, device)
        policy.encode(["", *prompts])
        trainer = Trainer(config, policy, build_algorithm(config, reward), reward, prompts, Path(folder))
        return _Bench(config, policy, trainer, device).report(repeats, compare, progress)


class _Bench:
    def __init__(self, config: RunConfig, policy: Policy, trainer: Trainer, device: torch.device) -> None:
        self.config, self.policy, self.trainer, self.device = config, policy, trainer, device
        self.images = config.training.images_per_iteration
        self.times: dict[str, list[float]] = {}
        self.rows = self.images
        trainer.collector.overlaps = False  # each part on its own
        self.beside = self._collector()

    def report(self, repeats: int, compare: str | None, progress: Callable[[int], None]) -> BenchReport:
        """Warm up, count operations and memory once, then time."""
        counted = self._counted()
        for k in range(repeats + 1):
            self._timed(k, compare)
            if k == 0:  # kernels are chosen and caches filled
                self.times = {}
            progress(k)
        seconds = {name: statistics.median(values) for name, values in self.times.items()}
        matmul = _matmul_flops(self.device) / seconds["matmul"]
        speeds = []
        for part, unit in PARTS.items():
            flops, peak = counted[part]
            number = self.rows if unit == "rows" else self.images
            share = flops / seconds[part] / matmul
            speeds.append(Speed(part, seconds[part], number, unit, flops / 1e12, share, peak / 2**30))
        iteration = sum(seconds[part] for part in ("rollout", "decode", "reward"))
        t = self.config.training
        return BenchReport(
            model=self.config.model,
            algorithm=self.config.algorithm,
            reward=self.config.reward,
            device=_device_name(self.device),
            dtype=str(self.policy.model_dtype).removeprefix("torch."),
            tuning=t.tuning,
            images=self.images,
            repeats=repeats,
            matmul_tflops=matmul / 1e12,
            rollouts=self.images / iteration,
            speeds=tuple(speeds),
            plain_seconds=seconds.get(PLAIN),
            overlap=self._overlap(seconds),
            versions=package_versions(),
        )

    def _overlap(self, seconds: dict[str, float]) -> Overlap | None:
        if self.beside is None:
            return None
        return Overlap(self.beside.config.training.decode_batch, seconds["in turns"], seconds["beside"])

    # --- the parts ------------------------------------------------------------------------------------------------

    def _collector(self) -> Collector | None:
        """One that samples, and scores beside that, a quarter of the images at a time; None where that is not done."""
        t = self.config.training
        portion = min(t.decode_batch, self.images // PROMPTS)  # a whole prompt's, which no algorithm cuts
        cut = t.model_copy(update={"rollout_batch": portion, "decode_batch": portion})
        trainer, config = self.trainer, self.config.model_copy(update={"training": cut})
        collector = Collector(config, self.policy, trainer.algorithm, trainer.reward, trainer.prompts)
        return collector if collector.overlaps else None

    def _collect(self, k: int, budget: Budget) -> Rollout:
        return self.trainer.collector.collect(k, budget)

    def _prepared(self, rollout: Rollout) -> Batch:
        batch = self.trainer.algorithm.prepare(rollout)
        self.rows = len(batch)
        return batch

    def _evaluate(self) -> None:
        e, texts = self.config.evaluation, self._texts()
        noise = self.policy.draw_noise(self.images)
        x0 = self.policy.rollout(
            self.policy.encode(texts), noise, num_steps=e.num_steps, guidance_scale=e.guidance_scale
        ).x0
        with torch.no_grad():
            for start in range(0, self.images, self.config.training.decode_batch):
                rows = slice(start, start + self.config.training.decode_batch)
                self.trainer.reward.score(self.policy.decode(x0[rows]), tuple(texts[rows]))

    def _plain(self) -> None:
        """The same images as a training rollout's by the pipeline's own call, decoding included."""
        t, preset = self.config.training, self.policy.preset
        scale = preset.guidance_scale if t.guidance_scale is None else t.guidance_scale
        arguments = self.policy.family.call_arguments(self.policy.num_steps, scale)
        self.policy.pipeline.set_progress_bar_config(disable=True)
        size, noise = t.decode_batch, self.policy.draw_noise(self.images).to(self.policy.model_dtype)
        with torch.no_grad(), own_gelu(self.policy.transformer):
            for start in range(0, self.images, size):
                texts, part = self._texts()[start : start + size], noise[start : start + size]
                self.policy.pipeline(prompt=texts, latents=part, output_type="pt", **arguments)

    def _texts(self) -> list[str]:
        prompts = self.trainer.prompts
        return [str(prompts[k * len(prompts) // self.images]) for k in range(self.images)]

    # --- timed and counted ----------------------------------------------------------------------------------------

    def _timed(self, k: int, compare: str | None) -> None:
        budget = Budget()
        rollout = self._collect(k, budget)
        for part in ("rollout", "decode", "reward"):
            self.times.setdefault(part, []).append(budget.timings[part])
        batch = self._prepared(rollout)
        self._time("update", lambda: self.trainer.updater.update(batch, k))
        self._time("evaluation", self._evaluate)
        if self.beside is not None:
            for part, beside in (("in turns", False), ("beside", True)):
                self.beside.overlaps = beside
                self._time(part, partial(self.beside.collect, k, Budget()))
        if compare == PLAIN:
            self._time(PLAIN, self._plain)
        a = _square(self.device)
        self._time("matmul", lambda: a @ a)

    def _time(self, part: str, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.setdefault(part, []).append(time.perf_counter() - begun)

    def _counted(self) -> dict[str, tuple[float, float]]:
        """Operations and peak bytes of each part, run once and not timed."""
        policy, t = self.policy, self.config.training
        texts = self._texts()
        cond, noise = policy.encode(texts), policy.draw_noise(self.images)
        found = {}
        x0, *found["rollout"] = self._count(
            lambda: (
                policy.rollout(
                    cond, noise, sampler=policy.sampler, num_steps=policy.num_steps, guidance_scale=t.guidance_scale
                ).x0
            )
        )
        with torch.no_grad():
            images, *found["decode"] = self._count(
                lambda: torch.cat([policy.decode(part) for part in x0.split(t.decode_batch)])
            )
            _, *found["reward"] = self._count(lambda: self.trainer.reward.score(images, tuple(texts)))
        batch = self._prepared(self._collect(0, Budget()))
        _, *found["update"] = self._count(lambda: self.trainer.updater.update(batch, 0))
        _, *found["evaluation"] = self._count(self._evaluate)
        return {part: (flops, peak) for part, (flops, peak) in found.items()}

    def _count(self, work: Callable[[], Any]) -> tuple[Any, float, float]:
        """The result of the work, its operations, and the most bytes meanwhile."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with Meter(self.device) as meter:
            result = work()
        if self.device.type == "cuda":
            return result, meter.flops, torch.cuda.max_memory_allocated(self.device)
        return result, meter.flops, meter.peak


def _square(device: torch.device) -> torch.Tensor:
    side, dtype = MATMUL[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(side, side, device=device, dtype=dtype)


def _matmul_flops(device: torch.device) -> float:
    return 2.0 * MATMUL[device.type] ** 3


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
