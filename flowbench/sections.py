"""The two sections of a configuration that the core knows: training and evaluation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator

from flowbench.errors import UsageError
from flowbench.names import component_fault

LARGEST_SEED = 2**63 - 1  # what torch takes
Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of the configuration's parts.

    added_later: settings that older records do not have; divides: those that only divide or place the work, so that
    they change memory and time and no result; observes: those that only say what is looked at or kept on the way.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()
    divides: ClassVar[frozenset[str]] = frozenset()
    observes: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainingConfig(Section):
    """What the one loop does, whatever the algorithm."""

    added_later: ClassVar = frozenset(
        (
            *("anchor_decay", "auxiliary_steps", "guidance_scale", "num_steps", "reward_scale", "sde_window"),
            *("rollout_batch", "sde_window_stay", "shared_noise", "encode_first", "offload", "reward_precision"),
            *("compile", "overlap", "rollout_dtype"),
        )
    )
    divides: ClassVar = frozenset(
        (
            *("decode_batch", "encode_first", "gradient_checkpointing", "microbatch", "offload", "overlap"),
            "rollout_batch",
        )
    )
    observes: ClassVar = frozenset(("keep_checkpoints",))

    images: int = Field(9600, ge=1, description="budget: images generated for training")
    prompts_per_iteration: int = Field(16, ge=1)
    images_per_prompt: int = Field(4, ge=1, description="group size")
    tuning: Literal["full", "lora"] = "full"
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(64.0, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    auxiliary_learning_rate: float = Field(1e-3, gt=0, description="of an algorithm's own networks, such as a critic")
    auxiliary_steps: int = Field(8, ge=1, description="steps of an algorithm's own networks per step of the policy")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[Decay, Decay] = (0.9, 0.99)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1, description="passes over each rollout")
    minibatch: int = Field(64, ge=1, description="rows per optimizer step")
    reward_scale: Literal["raw", "standardized"] = Field(
        "raw", description="of each reward in a sum: as it is, or by its own mean and deviation over the run so far"
    )
    microbatch: int | None = Field(None, ge=1, description="rows per backward pass; None is the whole minibatch")
    rollout_batch: int | None = Field(None, ge=1, description="images sampled at a time; None is all of an iteration")
    decode_batch: int = Field(64, ge=1, description="images decoded and scored at a time")
    overlap: bool = Field(
        True, description="on a GPU, decode and score images of an iteration while its next ones are sampled"
    )
    gradient_checkpointing: bool = False
    sampler: str = Field("ode", description="sampler of training rollouts")
    eta: float = Field(0.7, ge=0, description="noise level of a stochastic sampler")
    num_steps: int | None = Field(None, ge=1, description="sampler steps in training; None is the model's own number")
    guidance_scale: float | None = Field(None, ge=1, description="guidance in training; None is the model's, 1 is none")
    sde_window: int | None = Field(
        None, ge=1, description="consecutive stochastic steps, ODE elsewhere (MixGRPO, 2507.21802); None is all steps"
    )
    sde_window_stay: int | None = Field(
        None, ge=1, description="iterations before the window slides on by a step; None places it at random each time"
    )
    sigma_distribution: Literal["logit-normal", "uniform", "sampler"] = "logit-normal"
    sigma_logit: tuple[float, PositiveFloat] = Field(
        (0.0, 1.0), description="mean and deviation of the logit-normal sigmas"
    )
    shared_noise: bool | None = Field(
        None,
        description="same noise and sigma for the images of a prompt, in re-noised states; None is the algorithm's",
    )
    anchor_decay: float | None = Field(
        None, ge=0, lt=1, description="the loss's reference is the policy's average of this decay per iteration"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="largest decay of the average of the tuned weights that is evaluated; 0 is none"
    )
    reward_precision: Literal["auto", "float32"] = Field(
        "auto",
        description="auto: half precision on a GPU, for a reward that allows it and whose gradient is not trained on",
    )
    offload: bool | None = Field(
        None, description="whether the reward leaves the device while it does not score; None is: with a memory limit"
    )
    encode_first: bool | None = Field(
        None,
        description="whether text encoders encode all prompts and go, before the rest is loaded; None is: on a GPU",
    )
    rollout_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of training's rollouts and images, where the weights have a higher one"
    )
    compile: bool = Field(False, description="torch.compile of the transformer's blocks; rounds otherwise")
    checkpoint_every: int = Field(25, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int | None = Field(
        None, ge=1, description="checkpoints that are kept; None is two while the run is at work, and then the last"
    )

    @property
    def images_per_iteration(self) -> int:
        """Images that one iteration generates."""
        return self.prompts_per_iteration * self.images_per_prompt

    def overlaps(self, images: int) -> bool:
        """Whether some of so many images can be decoded and scored while others are sampled.

        That takes a rollout in several parts, of which the first are enough to decode; and rewards that stay on the
        device, since those that leave it (`offload`) do so for want of memory.
        """
        parts = self.rollout_batch is not None and max(self.rollout_batch, self.decode_batch) < images
        return self.overlap and parts and not self.offload

    @property
    def iterations(self) -> int:
        """How many iterations the budget is.

        Raises UsageError for a budget that is no whole number of them, with the nearest that are.
        """
        count, rest = divmod(self.images, self.images_per_iteration)
        if rest:
            nearest = [n * self.images_per_iteration for n in (count, count + 1) if n]
            raise UsageError(
                f"training.images is {self.images}, but an iteration makes {self.prompts_per_iteration} prompts x "
                f"{self.images_per_prompt} images; use {' or '.join(map(str, nearest))}"
            )
        return count


class EvaluationConfig(Section):
    """The protocol: same prompts and same noise for base and tuned model.

    seed: of the noise, not of training; the run of seed k has block k of it, see `RunConfig.protocol`.
    """

    added_later: ClassVar = frozenset(
        ("base_cache", "decode_batch", "guidance_scale", "judge_precision", "judges", "unguided")
    )
    divides: ClassVar = frozenset(("base_cache", "batch", "decode_batch"))
    observes: ClassVar = frozenset(("dev_images_per_prompt", "dev_judges", "keep_images", "points"))

    splits: tuple[str, ...] = ("test", "compositional")
    prompts: int = Field(96, ge=2, description="prompts per split, spread over the categories")
    images_per_prompt: int = Field(4, ge=2)
    num_steps: int | None = Field(None, ge=1, description="sampler steps; None is the model's own number")
    guidance_scale: float | None = Field(None, ge=1, description="None is the model's own, 1 is none")
    unguided: bool = Field(True, description="where that is above 1: also score without guidance, as METRIC@1")
    batch: int = Field(64, ge=1, description="images sampled, and scored, at a time")
    decode_batch: int | None = Field(
        None, ge=1, description="images decoded at a time; None is as many as have two megapixels together"
    )
    judges: tuple[str, ...] | None = Field(
        None, description="rewards that score without being trained on; None is all of the model's, and the oracle"
    )
    judge_precision: Literal["auto", "float32"] = Field(
        "auto", description="auto: half precision on a GPU, for a judge that allows it"
    )
    base_cache: bool = Field(True, description="whether the base model's scores are kept on disk and used again")
    points: int = Field(
        5, ge=0, description="points of the budget at which split dev is scored, where the prompts have one; 0 is none"
    )
    dev_images_per_prompt: int = Field(2, ge=2, description="of each of at most `prompts` prompts of dev, at a point")
    dev_judges: bool = Field(True, description="whether the judges held out score at the points too")
    keep_images: bool = Field(False, description="whether the evaluation's images are kept in the run folder")
    seed: int = Field(20_251, ge=0, le=LARGEST_SEED)

    @field_validator("splits")
    @classmethod
    def _are_parts_of_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Their names stand in those of files."""
        for name in value:
            if fault := component_fault(name):
                raise ValueError(f"split {name!r}: a name {fault}")
            if value.count(name) > 1:
                raise ValueError(f"split {name!r} stands twice")
        return value
