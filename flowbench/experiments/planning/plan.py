"""The peak memory of each phase of a run, its time, and the division of the work that keeps it below a limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from flowbench.config import RunConfig
from flowbench.errors import RunError, UsageError
from flowbench.experiments.planning.counts import Counts, count
from flowbench.experiments.planning.needs import Needs
from flowbench.experiments.planning.phases import measure, plannable
from flowbench.models.guidance import BOTH_AT_ONCE
from flowbench.models.presets import load_preset

GIB = 2**30
# What a limit leaves free: the CUDA context with the libraries' workspaces, and the allocator's fragments.
CONTEXT = 1.0 * GIB
FRAGMENTS = 0.05
# Settings that a limit may lower, largest first; none of them changes a result.
SIZES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
ENCODED = 32  # texts at a time
TFLOPS = {"H100": 450.0, "H200": 450.0, "B200": 900.0, "A100": 200.0, "L40S": 150.0, "4090": 120.0, "3090": 50.0}


@dataclass(frozen=True)
class Division:
    """How much of the work is done at a time.

    rollout: images sampled at a time in training; decode: images decoded or scored; microbatch: rows per backward pass;
    evaluation: images sampled or scored at a time in evaluation, evaluation_decode: decoded; offload: whether rewards
    are on the device only to score; overlap: whether images are decoded and scored while others are sampled.
    """

    rollout: int
    decode: int
    microbatch: int
    evaluation: int
    evaluation_decode: int
    offload: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of a run: what lies in memory throughout, by what it is, and what one slice of the work adds, in bytes."""

    name: str
    resident: dict[str, int]
    slice: int
    detail: str

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return sum(self.resident.values()) + self.slice


@dataclass(frozen=True)
class Cost:
    """One purpose: how often, function evaluations (or reward calls), operations, and seconds at the stated rate."""

    purpose: str
    number: int
    evaluations: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will need. tflops: the throughput that seconds are computed with; limit: bytes, None for none."""

    division: Division
    phases: tuple[Phase, ...]
    costs: tuple[Cost, ...]
    counts: Counts
    tflops: float
    rate: str
    limit: int | None = None

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def seconds(self) -> float:
        """Of the whole run, at the stated throughput."""
        return sum(cost.seconds for cost in self.costs)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON's objects."""
        content = asdict(self)
        for phase, seen in zip(content["phases"], self.phases, strict=True):
            phase["peak"] = seen.peak
        return {**content, "peak": self.peak.peak, "peak_phase": self.peak.name, "seconds": self.seconds}


def parse_memory(text: str) -> int:
    """ "24GiB", "24G" or "40000MiB" in bytes.

    Raises UsageError for anything else.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*(g|gb|gib|m|mb|mib)\s*", text.lower())
    if not found:
        raise UsageError(f"--memory-limit '{text}' is no amount of memory; write for example 24GiB")
    return round(float(found[1]) * (GIB if found[2][0] == "g" else 2**20))


def plan(config: RunConfig, limit: int | None = None, tflops: float | None = None, needs: Needs | None = None) -> Plan:
    """What the run needs, divided so that every phase stays below `limit` bytes, if there is one.

    Raises UsageError for a model without weights or with an unknown configuration, RunError, naming the phase, where no
    division stays below the limit.
    """
    preset = load_preset(config.model)
    if not plannable(preset):
        raise UsageError(f"model '{preset.name}' is a formula: it needs no memory to plan; leave out --memory")
    needs = needs or measure(config)
    division = configured(config, needs) if limit is None else fitted(config, needs, limit)
    counts, (rate, source) = count(config), throughput(tflops, config.device)
    phases = tuple(phases_of(config, needs, division))
    return Plan(division, phases, tuple(_costs(config, needs, counts, rate)), counts, rate, source, limit)


def configured(config: RunConfig, needs: Needs) -> Division:
    """The division that the configuration itself asks for."""
    t = config.training
    minibatch = min(t.minibatch, t.images_per_iteration)
    return Division(
        rollout=min(t.rollout_batch or t.images_per_iteration, t.images_per_iteration),
        decode=min(t.decode_batch, t.images_per_iteration),
        microbatch=min(t.microbatch or minibatch, t.minibatch),
        evaluation=config.evaluation.batch,
        evaluation_decode=needs.evaluation_decode,
        offload=bool(t.offload),
        overlap=t.overlaps(t.images_per_iteration),
    )


def phases_of(config: RunConfig, needs: Needs, division: Division) -> Iterator[Phase]:
    """The phases of a run, in their order."""
    d, model = division, {"model": needs.model}
    reward = {"reward": needs.reward} if needs.reward and not d.offload else {}
    yield Phase("encode", {**reward, "encoders": _encoders(needs, d)}, needs.encode.at(ENCODED), f"{ENCODED} texts")
    rollout = _sampled(needs, d.rollout) + needs.states * d.rollout
    yield Phase("rollout", {**model, **reward}, rollout, f"{d.rollout} images")
    beside, told = (rollout, f"{d.decode} images beside the rollout of {d.rollout}") if d.overlap else (0, "")
    told = told or f"{d.decode} images"
    yield Phase("decode", {**model, **reward}, needs.decode.at(d.decode) + beside, told)
    scoring = {**model, **({"reward": needs.reward} if needs.reward else {})}
    yield Phase("score", scoring, needs.score.at(d.decode) + needs.pixels * d.decode + beside, told)
    seeing = scoring if needs.scored else {**model, **reward}
    yield Phase(
        "update", {**seeing, "gradients": needs.gradients}, needs.update.at(d.microbatch), f"{d.microbatch} rows"
    )
    sampled = max(_sampled(needs, d.evaluation), needs.decode.at(d.evaluation_decode))
    yield Phase("evaluation", {**model, **reward}, sampled, f"{d.evaluation} images")
    judges = {**needs.judges, **({config.reward: (needs.reward, needs.score)} if needs.reward else {})}
    if judges:
        name = max(judges, key=lambda n: judges[n][0] + judges[n][1].at(d.evaluation))
        size, slope = judges[name]
        others = {} if d.offload or name == config.reward else reward
        resident = {**model, **others, "judge": size}
        scored = slope.at(d.evaluation) + needs.pixels * d.evaluation
        yield Phase("judges", resident, scored, f"{name}, {d.evaluation} images")


def _sampled(needs: Needs, images: int) -> int:
    """Bytes of a step of so many images; of a few, prompts and negative prompts are one call."""
    return needs.step.at(max(images, 2 * min(images, BOTH_AT_ONCE)))


def _encoders(needs: Needs, division: Division) -> int:
    """All encoders at once, or with a tight limit the largest alone."""
    sizes = needs.encoders.values() or (0,)
    return max(sizes) if division.offload else sum(sizes)


def usable(limit: int) -> int:
    """Bytes of tensors below a limit, without what the context and fragments take."""
    return int((limit - CONTEXT) / (1 + FRAGMENTS))


def fitted(config: RunConfig, needs: Needs, limit: int) -> Division:
    """The largest division, at most the configured one, whose phases all stay below the limit; rewards leave the
    device only where they must, and images are scored while others are sampled only where that leaves room for it.

    Raises RunError, naming the phase, where there is none.
    """
    room, asked = usable(limit), configured(config, needs)
    for offload in (False, True):
        division = Division(1, 1, needs.smallest, 1, 1, offload)
        if all(phase.peak <= room for phase in phases_of(config, needs, division)):
            break
    else:
        worst = max(phases_of(config, needs, division), key=lambda phase: phase.peak)
        raise RunError(
            f"--memory-limit {limit / GIB:g}GiB is too little for the phase '{worst.name}' of model '{config.model}': "
            f"it needs {worst.peak / GIB:.1f} GiB with {worst.detail} at a time, and {room / GIB:.1f} GiB are usable; "
            "give it more, or use LoRA, another reward or a lower resolution"
        )
    for field in ("rollout", "decode", "microbatch", "evaluation", "evaluation_decode"):
        most = getattr(asked, field)
        for size in (most, *(s for s in SIZES if s < most)):
            tried = replace(division, **{field: size})
            if all(phase.peak <= room for phase in phases_of(config, needs, tried)):
                division = tried
                break
    tried = replace(division, overlap=config.training.overlap)
    can = divided(config, tried).training.overlaps(config.training.images_per_iteration)
    return tried if can and all(phase.peak <= room for phase in phases_of(config, needs, tried)) else division


def divided(config: RunConfig, division: Division) -> RunConfig:
    """The configuration with this division of the work; its results and hash are the same."""
    training = {
        "rollout_batch": division.rollout,
        "decode_batch": division.decode,
        "microbatch": division.microbatch,
        "offload": division.offload,
        "overlap": division.overlap,
    }
    evaluation = {"batch": division.evaluation, "decode_batch": division.evaluation_decode}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )


def throughput(tflops: float | None, device: str) -> tuple[float, str]:
    """TFLOP/s, and where the number comes from."""
    if tflops is not None:
        return tflops, "as given"
    import torch

    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(None if device == "auto" else device)
        for card, rate in TFLOPS.items():
            if card in name:
                return rate, f"assumed for {name}"
    return TFLOPS["H100"], "assumed for an H100, since no known GPU is here"


def _costs(config: RunConfig, needs: Needs, counts: Counts, tflops: float) -> Iterator[Cost]:
    rate, t = tflops * 1e12, counts.training

    def cost(purpose: str, number: float, evaluations: float, flops: float) -> Cost:
        return Cost(purpose, round(number), round(evaluations), flops, flops / rate)

    step = needs.free if t.guidance_scale <= 1 else needs.step.flops
    yield cost("rollout", t.images, t.total, t.images * t.steps * step)
    yield cost("decode", t.images, 0, t.images * needs.decode.flops)
    yield cost("reward", t.images, 0, t.images * needs.score.flops)
    rows = t.images * needs.rows * config.training.epochs
    for n, (view, each) in enumerate(needs.evaluations.items()):
        # the operations of an update are not told apart by view
        yield cost(f"loss {view}", rows, rows * each, 0 if n else rows * needs.update.flops)
    if needs.scored:
        yield cost("reward in the loss", rows * needs.scored, 0, 0)
    if counts.dev:
        step = needs.step.flops if counts.dev.guidance_scale > 1 else needs.free
        judged = needs.score.flops + needs.decode.flops
        if config.evaluation.dev_judges:
            judged += sum(slope.flops for _, slope in needs.judges.values())
        images = counts.dev.images
        yield cost("points on dev", images, counts.dev.total, images * (counts.dev.steps * step + judged))
    for model in ("base", "tuned"):
        for part in counts.evaluation:
            per_step = needs.step.flops if part.guidance_scale > 1 else needs.free
            judged = needs.score.flops + sum(slope.flops for _, slope in needs.judges.values()) + needs.decode.flops
            guided = "" if part.guidance_scale > 1 or len(counts.evaluation) == 1 else ", no guidance"
            flops = part.images * (part.steps * per_step + judged)
            yield cost(f"evaluation {model}{guided}", part.images, part.total, flops)
