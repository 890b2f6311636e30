"""How many images a run makes, and how many function evaluations it samples them with; read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from flowbench.config import RunConfig
from flowbench.models.counting import DEV
from flowbench.models.families import family_entry
from flowbench.models.presets import AnalyticPreset, ModelPreset, load_preset
from flowbench.prompts import available_splits, load_split


@dataclass(frozen=True)
class Sampling:
    """Images that are sampled alike: how many, in how many steps, with how much guidance.

    evaluations: function evaluations of one image.
    """

    images: int
    steps: int
    guidance_scale: float
    evaluations: int

    @property
    def total(self) -> int:
        """Function evaluations of all images."""
        return self.images * self.evaluations


@dataclass(frozen=True)
class Counts:
    """What a run samples: in training, in the evaluation of one model, once for each guidance, and at all points.

    dev: the images of the points of the budget and of the base model there; None where there are no points, or they
    are exact.
    """

    training: Sampling
    evaluation: tuple[Sampling, ...]
    iterations: int
    evaluated_prompts: int
    dev: Sampling | None = None

    @property
    def evaluation_images(self) -> int:
        """Images of base and tuned model together."""
        return 2 * sum(part.images for part in self.evaluation)


def count(config: RunConfig) -> Counts:
    """The exact counts of a run.

    Raises UsageError for a budget that is no whole number of iterations.
    """
    preset, t, e = load_preset(config.model), config.training, config.evaluation
    guidance = preset.guidance_scale if t.guidance_scale is None else t.guidance_scale
    scale = preset.guidance_scale if e.guidance_scale is None else e.guidance_scale
    scales = (scale, 1.0) if e.unguided and scale > 1 else (scale,)
    prompts = sum(min(len(load_split(config.prompt_set(preset), s).prompts), e.prompts) for s in e.splits)
    return Counts(
        training=_sampling(preset, t.images, t.num_steps, guidance),
        evaluation=tuple(_sampling(preset, prompts * e.images_per_prompt, e.num_steps, s) for s in scales),
        iterations=t.iterations,
        evaluated_prompts=prompts,
        dev=_on_dev(config, preset, scale),
    )


def _on_dev(config: RunConfig, preset: ModelPreset, scale: float) -> Sampling | None:
    e, prompt_set = config.evaluation, config.prompt_set(preset)
    if not e.points or isinstance(preset, AnalyticPreset) or DEV not in available_splits(prompt_set):
        return None
    prompts = min(len(load_split(prompt_set, DEV).prompts), e.prompts)
    points = 1 + min(e.points, config.training.iterations)
    return _sampling(preset, points * prompts * e.dev_images_per_prompt, e.num_steps, scale)


def _sampling(preset: ModelPreset, images: int, num_steps: int | None, scale: float) -> Sampling:
    steps = num_steps or preset.num_steps
    per_step = family_entry(preset.family).guided_evaluations if scale > 1 else 1
    return Sampling(images, steps, scale, steps * per_step)
