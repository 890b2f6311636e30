"""The model being tuned: text encoding, velocity, weight views, sampling, decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowbench.errors import UsageError
from flowbench.models.activations import use_fast_gelu
from flowbench.models.compiling import Compiler
from flowbench.models.counting import Evaluations
from flowbench.models.families import family_class
from flowbench.models.flow import get_sampler
from flowbench.models.presets import ModelPreset
from flowbench.models.processes import ALONE
from flowbench.models.sampling import Samples
from flowbench.models.texts import TextCache
from flowbench.models.velocities import Velocities
from flowbench.models.views import ANCHOR, EXTRA_VIEWS, VIEWS, Tuning, make_views
from flowbench.rollout import Conditioning

__all__ = ["ANCHOR", "EXTRA_VIEWS", "VIEWS", "Policy", "Samples", "Tuning"]


class Policy(Velocities):
    """A pipeline whose transformer is being tuned; the preset's family knows how to use it.

    Weight views: "current" is trained, "reference" is the model before tuning; "old" (behaviour policy) and "average"
    (slow average) exist for algorithms that ask for them, "anchor" where `training.anchor_decay` does. With LoRA a view
    is an adapter state of one module; with full tuning it is a frozen copy. `generator` supplies all randomness of
    `rollout` and of the draws; the trainer sets it. `num_steps` and `guidance_scale` are those of training; None means
    the preset's. `rollout_dtype` is the precision of training's rollouts and images, where the weights have a
    higher one; `compile_blocks` compiles the transformer's blocks. `processes` are those that share its work.
    """

    def __init__(
        self,
        pipeline: Any,
        preset: ModelPreset,
        tuning: Tuning = Tuning(),
        device: torch.device | None = None,
        sigma_distribution: str = "logit-normal",
        sigma_logit: tuple[float, float] = (0.0, 1.0),
        sampler: str = "ode",
        eta: float = 0.7,
        gradient_checkpointing: bool = False,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        rollout_dtype: torch.dtype = torch.float32,
        compile_blocks: bool = False,
    ) -> None:
        self.pipeline, self.preset, self.tuning = pipeline, preset, tuning
        self.family = family_class(preset.family)(pipeline, preset)
        self.device = device = device or torch.device("cpu")
        self.sigma_logit = sigma_logit
        self.num_steps, self.guidance_scale = num_steps or preset.num_steps, guidance_scale
        self.sigma_distribution, self.sampler, self.eta = sigma_distribution, get_sampler(sampler), eta
        self.generator = torch.Generator().manual_seed(0)
        self.evaluations, self.processes = Evaluations(), ALONE
        self._anchored, self.gradient_checkpointing = False, gradient_checkpointing
        for part in self.family.modules():
            part.requires_grad_(False).eval().to(device)
        use_fast_gelu(self.transformer)
        self.texts = TextCache(self.family, device)
        self.views = make_views(self.family, tuning, gradient_checkpointing)
        self.rollout_dtype = self.family.lower_dtype(rollout_dtype)
        self._compiler = Compiler(preset.name) if compile_blocks else None
        self._compile()

    @property
    def transformer(self) -> Any:
        """The module that is tuned."""
        return self.family.transformer

    @property
    def compiled(self) -> bool:
        """Whether the transformer's blocks are compiled, and so round otherwise."""
        return self._compiler is not None

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return self.family.model_dtype

    # --- text -----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Iterable[str]) -> Conditioning:
        """Conditioning of these prompts; each different text is encoded once and kept."""
        return self.texts.encode(list(prompts))

    def release_text_encoders(self) -> None:
        """Move the text encoders off the device, once every prompt of a run is encoded."""
        self.texts.release_encoders()

    @property
    def text_width(self) -> int:
        """D of `text_summary`."""
        return self.family.text_width

    def text_summary(self, cond: Conditioning) -> torch.Tensor:
        """One vector per row, (R, D), that says what its prompt is about; for critics."""
        return self.family.summarize(cond.tensors)[cond.index]

    # --- weight views -------------------------------------------------------------------------------------------------

    def double(self) -> None:
        """Compute in float64 from here on; for checks of small models."""
        for module in self.views.modules():
            module.double()
        self.views.forget(everything=True)

    def add_view(self, name: str) -> None:
        """Make a view of EXTRA_VIEWS: a copy of the current weights, moved by `update_view`."""
        if name not in EXTRA_VIEWS:
            raise UsageError(f"weight view '{name}' cannot be added; {EXTRA_VIEWS} can, {VIEWS[:2]} always exist")
        self.views.add(name)
        self._compile()

    def _compile(self) -> None:
        if self._compiler:
            for module in self.views.modules():
                self._compiler.compile(module)

    def update_view(self, name: str, decay: float) -> None:
        """view = decay * view + (1 - decay) * current."""
        self.views.update(name, decay)

    def has_view(self, name: str) -> bool:
        """Whether a view of EXTRA_VIEWS was added."""
        return self.views.has(name)

    @contextmanager
    def anchored(self, on: bool = True) -> Iterator[None]:
        """Within it "reference" is the view "anchor", if there is one: for losses. Not `on`: the base model again."""
        before, self._anchored = self._anchored, on
        try:
            yield
        finally:
            self._anchored = before

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer trains, in a fixed order."""
        return self.views.parameters("current")

    def state_dict(self) -> dict[str, Any]:
        """The trained weights and the added views, for a checkpoint."""
        return self.views.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.views.load_state_dict(state)

    def save(self, folder: Path) -> None:
        """Write the tuned weights in diffusers' own format: LoRA weights, or the transformer's folder."""
        self.family.save(folder, lora=self.tuning.kind == "lora")

    # --- sampling -------------------------------------------------------------------------------------------------

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampler's sigmas (num_steps + 1,), from 1 to 0, from the pipeline's own scheduler."""
        return self.family.sigmas(num_steps).to(self.device)

    def draw_noise(self, n: int, device: torch.device | None = None) -> torch.Tensor:
        """Standard normal latents (n, C, h, w), on the policy's device or another."""
        return self._randn((n, *self.latent_shape)).to(device or self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.family.latent_shape

    def draw_sigmas(self, n: int) -> torch.Tensor:
        """n noise levels in (0, 1], as `sigma_distribution` says."""
        if self.sigma_distribution == "logit-normal":
            mean, std = self.sigma_logit
            sigma = torch.sigmoid(mean + std * torch.randn(n, generator=self.generator))
        elif self.sigma_distribution == "uniform":
            sigma = torch.rand(n, generator=self.generator)
        elif self.sigma_distribution == "sampler":
            grid = self.sigmas(self.num_steps)[:-1].cpu()
            sigma = grid[torch.randint(len(grid), (n,), generator=self.generator)]
        else:
            raise UsageError(
                f"unknown training.sigma_distribution '{self.sigma_distribution}'; "
                "use 'logit-normal', 'uniform' or 'sampler'"
            )
        return sigma.to(self.device)

    def draw_integers(self, high: int, n: int) -> torch.Tensor:
        """n uniform integers in [0, high)."""
        return torch.randint(high, (n,), generator=self.generator).to(self.device)

    def _randn(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        # On the host whatever the device, so that a seed means the same noise everywhere.
        return self.processes.randn(shape, self.generator)
