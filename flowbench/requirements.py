"""Whether a resolved configuration can be carried out: what is checked before anything is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flowbench.errors import NotApplicableError, UsageError
from flowbench.models.presets import AnalyticPreset, ModelPreset
from flowbench.prompts.sets import available_splits
from flowbench.registry import algorithms, rewards
from flowbench.terms import term_names

if TYPE_CHECKING:
    from flowbench.config import EvaluationConfig, RunConfig

WARMUP_SHARE = 0.2  # of a budget, above which a run is warned of it

logger = logging.getLogger("flowbench")


def check_domain(config: RunConfig, preset: ModelPreset, domain: str) -> None:
    """Raise UsageError where the reward cannot score what the model makes, or the model cannot be tuned as asked."""
    analytic = isinstance(preset, AnalyticPreset)
    if analytic != (domain == "points"):
        made = "points, use 'linear' or 'quadratic'" if analytic else "images, use for example 'clip'"
        raise UsageError(f"reward '{config.reward}' scores {domain}; model '{config.model}' makes {made}")
    if analytic and config.training.tuning != "full":
        raise UsageError(f"model '{config.model}' has no layers for LoRA; use training.tuning=full")


def check_needs(needs: frozenset[str], config: RunConfig, without_gradient: list[str]) -> None:
    """Raise UsageError where the sampler lacks what an algorithm needs, NotApplicableError where a reward does."""
    from flowbench.models.flow import get_sampler

    sampler = config.training.sampler
    if not get_sampler(sampler).has_log_prob and "log_prob" in needs:
        raise UsageError(f"{config.algorithm} needs log_prob; sampler '{sampler}' has none, use 'flow-sde'")
    if "reward_grad" in needs and without_gradient:
        raise NotApplicableError(
            f"{config.algorithm} needs the reward's gradient; reward '{without_gradient[0]}' has none, "
            "use for example 'clip'"
        )


def warmup_iterations(config: RunConfig) -> int:
    """How many of a run's iterations pass before the policy's first update."""
    return algorithms.get(config.algorithm).cls.Config.model_validate(config.hyperparameters).warmup_iterations()


def check_warmup(config: RunConfig) -> None:
    """Raise UsageError for a budget that is no whole number of iterations, or none but the algorithm's warm-up."""
    training, warmup = config.training, warmup_iterations(config)
    if warmup >= training.iterations:
        least = (warmup + 1) * training.images_per_iteration
        raise UsageError(
            f"training.images is {training.images}, all of which is {config.algorithm}'s warm-up of {warmup} "
            f"iterations; use {least} or more, or a smaller algorithm.warmup"
        )


def check_group(config: RunConfig) -> None:
    """Raise UsageError for a group too small for an algorithm that compares the images of a prompt."""
    cls = algorithms.get(config.algorithm).cls
    least, given = cls.Config.model_validate(config.hyperparameters).least_group(), config.training.images_per_prompt
    if given < least:
        raise UsageError(
            f"training.images_per_prompt is {given}, but {config.algorithm} compares the images of a prompt with each "
            f"other and would learn nothing; use {least} or more"
        )


def check_scored(config: RunConfig, preset: ModelPreset) -> None:
    """Raise UsageError for a run that nothing would be known of, neither on a split nor on dev."""
    if config.evaluation.splits or isinstance(preset, AnalyticPreset):
        return
    if not config.evaluation.points or "dev" not in available_splits(config.prompt_set(preset)):
        raise UsageError(
            "evaluation.splits is empty and split dev is not scored either, so that nothing would be known of the run; "
            "name a split, such as evaluation.splits=[test]"
        )


def warn_of_warmup(config: RunConfig) -> None:
    """Log a warning where the warm-up is more than a fifth of the budget."""
    warmup, iterations = warmup_iterations(config), config.training.iterations
    if warmup > WARMUP_SHARE * iterations:
        logger.warning(
            "the warm-up of %s is %d of %d iterations, more than a fifth; a larger training.images or a smaller "
            "algorithm.warmup leaves more for learning",
            *(config.algorithm, warmup, iterations),
        )


def check_judges(config: EvaluationConfig, reward: str | None) -> None:
    """Raise UsageError for a judge that is unknown or trained on."""
    trained = term_names(reward) if reward else ()
    for name in config.judges or ():
        rewards.require(name)
        if name in trained:
            raise UsageError(
                f"the run trains on '{name}', so it cannot be a judge: it would praise what it taught; take it out of "
                "evaluation.judges (its score is reported all the same)"
            )


def check_resolution(preset: ModelPreset) -> None:
    """Raise UsageError for images whose sides the model cannot make, as far as its files here tell."""
    if isinstance(preset, AnalyticPreset):
        return
    from flowbench.models.families import family_class
    from flowbench.models.families.base import check_multiple
    from flowbench.models.families.random_init import known_parts

    parts = known_parts(preset)
    if parts and "vae" in parts and "transformer" in parts:
        multiple = family_class(preset.family).multiple(parts["vae"].config, parts["transformer"].config)
        check_multiple(preset, multiple)


def check_window(config: RunConfig, preset: ModelPreset) -> None:
    """Raise UsageError for a window of stochastic steps that the sampler does not have."""
    from flowbench.models.flow import get_sampler

    training = config.training
    if training.sde_window is None:
        return
    if not get_sampler(training.sampler).has_log_prob:
        raise UsageError(f"training.sde_window: sampler '{training.sampler}' is not stochastic, use 'flow-sde'")
    steps = training.num_steps or preset.num_steps
    if training.sde_window >= steps:  # the last step is never in it, as in the reference implementations
        raise UsageError(f"training.sde_window is {training.sde_window}; it must be below the {steps} sampler steps")
