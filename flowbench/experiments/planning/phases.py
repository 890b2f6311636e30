"""The parts of a run on meta tensors: what each needs and computes, per image or row, by flowbench's own classes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flowbench.algorithm import Algorithm, Batch
from flowbench.config import RunConfig
from flowbench.evaluation.judges import build_reward, half_on_gpu
from flowbench.evaluation.protocol import decode_batch
from flowbench.experiments.planning.needs import Needs, Slope
from flowbench.experiments.planning.repeats import skip_repeats
from flowbench.experiments.planning.stand_ins import Scorer, counting, on_meta
from flowbench.experiments.planning.storages import META, Meter, simulated
from flowbench.models.families.random_init import assemble, blueprint, network
from flowbench.models.flow import get_sampler
from flowbench.models.guidance import BOTH_AT_ONCE
from flowbench.models.policy import ANCHOR, Policy, Tuning
from flowbench.models.presets import AnalyticPreset, ModelPreset, load_preset
from flowbench.registry import algorithms, rewards
from flowbench.rollout import Conditioning, Rollout
from flowbench.scoring.checkpoints import random_weights
from flowbench.terms import term_names
from flowbench.training.rows import drawn

LATE = 10**6  # an iteration after every warm-up
PROMPTS = 16  # of a small rollout; a term on every n-th row is then on a share of them that is nearly true
FEW = 2  # images per prompt of a small rollout; as few as an algorithm that compares them needs


def measure(config: RunConfig) -> Needs:
    """What a run of this configuration needs on a GPU, by running one slice of each part without content.

    Raises UsageError for a model whose configuration is unknown, or that has no weights.
    """
    with random_weights(), simulated() as meter:
        dry = _Dry(config, meter)
        gc.freeze()  # else each look for garbage, between two measurements, takes a second
        try:
            return dry.needs()
        finally:
            gc.unfreeze()


class _Dry:
    """The objects of a run on meta tensors."""

    def __init__(self, config: RunConfig, meter: Meter) -> None:
        self.config, self.meter = config, meter
        self.preset: ModelPreset = load_preset(config.model)
        training, dtype = config.training, getattr(torch, self.preset.dtype)
        pipeline = assemble(self.preset, dtype, lambda: META)
        with META:
            self.policy = Policy(
                pipeline,
                self.preset,
                Tuning(training.tuning, training.lora_rank, training.lora_alpha),
                META,
                sampler=training.sampler,
                eta=training.eta,
                gradient_checkpointing=training.gradient_checkpointing,
                num_steps=training.num_steps,
                guidance_scale=training.guidance_scale,
            )
        self.reward = self._built(config.reward, half_on_gpu(config))
        self.scored = 0
        cls = algorithms.get(config.algorithm).cls
        self.algorithm: Algorithm[Any] = cls(cls.Config.model_validate(config.hyperparameters), self._score)
        with META:
            self.algorithm.setup(self.policy)
            for network_ in self.algorithm.networks().values():
                network_.to(META)
            if training.anchor_decay is not None:
                self.policy.add_view(ANCHOR)
        if plan := self.algorithm.plan().sampler:
            self.policy.sampler = get_sampler(plan)
        skip_repeats(meter, {*self.policy.family.modules(), *self.policy.views.modules()})

    def _built(self, name: str, half: bool) -> Scorer:
        with META:
            scorer = Scorer(build_reward(name, self.preset, META), half)
        skip_repeats(self.meter, scorer.modules())
        return scorer

    def _score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        self.scored += len(prompts)
        return self.reward.score(images)

    # --- all of it ------------------------------------------------------------------------------------------------

    def needs(self) -> Needs:
        """What everything needs."""
        trained = self.policy.trainable_parameters()
        own = [p for network_ in self.algorithm.networks().values() for p in network_.parameters()]
        gradients = sum(p.numel() * p.element_size() for p in (*trained, *own))
        averaged = sum(p.numel() * p.element_size() for p in trained) * bool(self.config.training.ema)
        networks = self.algorithm.networks().values()
        model = self._bytes(*self.policy.family.modules(), *self.policy.views.modules(), *networks)
        guided = next(s for s in (self.config.training.guidance_scale, self.preset.guidance_scale) if s is not None)
        evaluated = self.config.evaluation.guidance_scale or self.preset.guidance_scale
        largest = max(guided, evaluated)
        step = self._step(largest)
        halves = largest > 1 and self.policy.family.classifier_free  # guidance is then a second call
        update, evaluations, scored, smallest = self._update(step.flops / 2 if halves else step.flops)
        c = self.policy.latent_shape
        keeps = bool(self.algorithm.needs() & {"states", "log_prob"}) + self.algorithm.plan().keep_steps
        decode = self._slope(self._decode)
        encoders, encode = self._encoders()
        return Needs(
            # AdamW keeps two numbers for each that is trained
            model=model + 2 * gradients + averaged,
            gradients=gradients,
            reward=self.reward.bytes(self._bytes),
            encoders=encoders,
            encode=encode,
            step=step,
            free=step.flops / 2 if halves else step.flops,
            states=keeps * 2 * 4 * (self.policy.num_steps + 1) * c[0] * c[1] * c[2],  # kept in a list, then stacked
            decode=decode,
            score=self._slope(self._scored(self.reward)),
            update=update,
            evaluations=evaluations,
            scored=scored,
            rows=self._rows_per_image(),
            judges=self._judges(),
            pixels=self._pixels(),
            evaluation_decode=decode_batch(self.policy, self.config.evaluation),
            smallest=smallest,
        )

    def _bytes(self, *modules: torch.nn.Module) -> int:
        storages = [t.untyped_storage() for m in modules for t in (*m.parameters(), *m.buffers())]
        return sum({s._cdata: s.nbytes() for s in storages}.values())

    def _slope(self, work: Callable[[int], Callable[[], object]], few: int = 2, more: int = 6) -> Slope:
        """The peak of work(n)() above what lives before it, at two sizes; what work(n) prepares is not counted."""
        peaks, flops = [], 0.0
        for n in (few, more):
            prepared = work(n)
            gc.collect()
            before = self.meter.live
            self.meter.start()
            kept = prepared()
            peaks.append(self.meter.peak - before)
            flops = self.meter.flops / n
            del kept, prepared
        each = (peaks[1] - peaks[0]) / (more - few)
        return Slope(peaks[0] - few * each, each, flops)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _conditioning(self, n: int) -> Conditioning:
        return self.policy.encode([f"{k}" for k in range(n)])

    def _step(self, scale: float) -> Slope:
        def work(n: int) -> Callable[[], object]:
            cond, noise = self._conditioning(n), self.policy.draw_noise(n)
            return lambda: self.policy.rollout(
                cond, noise, sampler=self.policy.sampler, num_steps=1, guidance_scale=scale
            )

        return self._slope(work, BOTH_AT_ONCE + 1, BOTH_AT_ONCE + 5)

    def _latents(self, n: int) -> torch.Tensor:
        return torch.empty(n, *self.policy.latent_shape, device=META)

    def _images(self, n: int) -> torch.Tensor:
        return torch.empty(n, *self._image_shape, device=META)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        with torch.no_grad():
            return tuple(self.policy.decode(self._latents(1)).shape[1:])  # type: ignore[return-value]

    def _pixels(self) -> int:
        c, h, w = self._image_shape
        return 4 * c * h * w

    def _decode(self, n: int) -> Callable[[], object]:
        x = self._latents(n)

        def decode() -> object:
            with torch.no_grad():
                return self.policy.decode(x)

        return decode

    def _scored(self, scorer: Scorer) -> Callable[[int], Callable[[], object]]:
        def work(n: int) -> Callable[[], object]:
            images = self._images(n)

            def score() -> object:
                with torch.no_grad():
                    return scorer.score(images)

            return score

        return work

    def _judges(self) -> dict[str, tuple[int, Slope]]:
        chosen, trained = self.config.evaluation.judges, term_names(self.config.reward)
        found = {}
        for name in self.preset.rewards if chosen is None else chosen:
            info = rewards.describe(name)
            if info.domain != "images" or info.truth or name in trained:
                continue
            judge = self._built(name, self.config.evaluation.judge_precision == "auto")
            found[name] = (judge.bytes(self._bytes), self._slope(self._scored(judge), 1, 3))
        return found

    def _encoders(self) -> tuple[dict[str, int], Slope]:
        """Bytes of each text encoder, and of what encoding adds."""
        plan, left_out = blueprint(self.preset), self.policy.family.left_out(self.preset)
        parts = {n: p for n, p in plan.parts.items() if n.startswith("text_encoder") and n not in left_out}
        dtype = getattr(torch, self.preset.dtype)
        made = {name: network(part, dtype, lambda: META) for name, part in parts.items()}
        if not made:
            return {}, Slope(0, 0)
        skip_repeats(self.meter, made.values())
        largest = max(made, key=lambda name: self._bytes(made[name]))
        of_clip = parts[largest].cls.startswith("CLIP")
        length = (
            parts[largest].config.get("max_position_embeddings", 77) if of_clip else self.preset.max_sequence_length
        )

        def work(n: int) -> Callable[[], object]:
            ids = torch.zeros(n, length, dtype=torch.int64, device=META)

            def encode() -> object:
                with torch.no_grad():
                    return made[largest](ids)

            return encode

        return {name: self._bytes(module) for name, module in made.items()}, self._slope(work)

    # --- update ---------------------------------------------------------------------------------------------------

    def _rollout(self, prompts: int, each: int, shape: tuple[int, ...]) -> Rollout:
        """A rollout on the host, of zeros, with rewards that differ."""
        n, steps = prompts * each, self.policy.num_steps
        needs, latents = self.algorithm.needs(), (n, steps + 1, *shape)
        group = torch.arange(prompts).repeat_interleave(each)
        sampled = "log_prob" in needs
        cond = self._conditioning(prompts)
        texts = [f"{int(g)}" for g in group]
        return Rollout(
            iteration=LATE,
            prompts=tuple(texts),
            group=group,
            cond=Conditioning({k: torch.zeros(t.shape, dtype=t.dtype) for k, t in cond.tensors.items()}, group.clone()),
            sigmas=self.policy.family.sigmas(steps),
            x0=torch.zeros(n, *shape),
            images=torch.zeros(n, 3, 1, 1),
            reward=torch.linspace(0, 1, n),
            states=torch.zeros(latents) if needs & {"states", "log_prob"} else None,
            log_prob=torch.zeros(n, steps) if sampled else None,
            step_mean=torch.zeros(n, steps, *shape) if self.algorithm.plan().keep_steps else None,
            step_std=torch.ones(n, steps) if self.algorithm.plan().keep_steps else None,
        )

    def _prepared(self, prompts: int, each: int, shape: tuple[int, ...]) -> Batch:
        with self._on_host():
            batch = self.algorithm.prepare(self._rollout(prompts, each, shape))
            return drawn(self.algorithm, self.policy, batch, self.config.training.shared_noise)

    @contextmanager
    def _on_host(self) -> Iterator[None]:
        """The policy draws on the host, for rows that are made there."""
        device, self.policy.device = self.policy.device, torch.device("cpu")
        try:
            yield
        finally:
            self.policy.device = device

    def _rows_per_image(self) -> float:
        each = self.config.training.images_per_prompt
        with self._on_host():
            batch = self.algorithm.prepare(self._rollout(2, each, self.policy.latent_shape if each <= 4 else (1, 1, 1)))
        return len(batch) / (2 * each)

    def _update(self, forward: float) -> tuple[Slope, dict[str, float], float, int]:
        """The slope of a microbatch with its backward pass; evaluations by view and reward calls of a row.

        forward: operations of an evaluation without guidance.
        """
        counted: dict[str, float] = {}
        smallest = self.config.training.images_per_prompt if self.algorithm.whole_groups else 1
        few, more = (1, 3) if smallest == 1 else (smallest, 2 * smallest)
        each = FEW if smallest == 1 else smallest
        batch = self._prepared(max(more, PROMPTS), each, self.policy.latent_shape)
        self.scored = 0

        def work(n: int) -> Callable[[], object]:
            rows = batch.select(torch.arange(n))
            with counting(self.policy, counted):
                measured = self.algorithm.measure(self.policy, on_meta(rows))
                compared = self.algorithm.compare({k: torch.rand(v.shape) for k, v in measured.items()})
            given = on_meta(replace(rows, scalars={**rows.scalars, **compared.scalars}))

            def step() -> None:
                with self.policy.anchored(), counting(self.policy, counted):
                    loss = self.algorithm.loss(self.policy, given)
                torch.stack([p.mean() for p in (loss.policy, loss.auxiliary) if p is not None]).sum().backward()
                for p in (*self.policy.trainable_parameters(), *self._own()):
                    p.grad = None

            return step

        slope, rows = self._slope(work, few, more), few + more
        evaluations, scored = {view: n / rows for view, n in counted.items()}, self.scored / rows
        if not batch.scalars:
            return slope, evaluations, scored, smallest
        # Of what only some rows have, the slope takes it that all have it.
        true, scored = self._true_evaluations(batch)
        fewer = (sum(evaluations.values()) - sum(true.values())) * forward
        return replace(slope, flops=slope.flops - fewer), true, scored, smallest

    @torch.no_grad()
    def _true_evaluations(self, batch: Batch) -> tuple[dict[str, float], float]:
        """Evaluations by view and reward calls of a row, where what `prepare` said of the rows is known."""
        counted: dict[str, float] = {}
        self.scored = 0
        with counting(self.policy, counted), self.policy.anchored():
            measured = self.algorithm.measure(self.policy, on_meta(batch))
            compared = self.algorithm.compare({k: torch.rand(v.shape) for k, v in measured.items()})
            self.algorithm.loss(self.policy, replace(on_meta(batch), scalars={**batch.scalars, **compared.scalars}))
        return {view: n / len(batch) for view, n in counted.items()}, self.scored / len(batch)

    def _own(self) -> list[torch.nn.Parameter]:
        return [p for network_ in self.algorithm.networks().values() for p in network_.parameters()]


def plannable(preset: ModelPreset) -> bool:
    """Whether a model has memory to plan."""
    return not isinstance(preset, AnalyticPreset)
