"""The model being tuned: text encoding, velocity, sampling, decoding, and named views of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from flowbench.errors import RunError, UsageError
from flowbench.models.flow import SAMPLERS, Sampler, Step, gaussian_log_prob, get_sampler
from flowbench.models.lora import TRAINED, AdapterState, adapter_parameters, add_adapter, save_adapter
from flowbench.models.presets import ModelPreset
from flowbench.rollout import Conditioning

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

EXTRA_VIEWS = ("old", "average")
VIEWS = ("current", "reference", *EXTRA_VIEWS)


@dataclass(frozen=True)
class Tuning:
    """Which weights are trained: "full", or "lora" of this rank and alpha on the attention projections."""

    kind: str = "full"
    lora_rank: int = 32
    lora_alpha: float = 64.0


@dataclass(frozen=True)
class Samples:
    """The result of `Policy.rollout`; shapes as in `rollout.Rollout`."""

    x0: torch.Tensor
    sigmas: torch.Tensor
    states: torch.Tensor | None
    log_prob: torch.Tensor | None


class Policy:
    """A diffusers StableDiffusion3Pipeline whose transformer is being tuned.

    Weight views: "current" is trained, "reference" is the model before tuning; "old" (behaviour policy) and "average"
    (slow average) exist for algorithms that ask for them. With LoRA a view is an adapter state of one module; with full
    tuning it is a frozen copy. `generator` supplies all randomness of `rollout` and of the draws; the trainer sets it.
    `num_steps` and `guidance_scale` are those of training; None means the preset's.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
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
    ) -> None:
        self.pipeline, self.preset, self.tuning = pipeline, preset, tuning
        self.device = device = device or torch.device("cpu")
        self.sigma_logit = sigma_logit
        self.num_steps, self.guidance_scale = num_steps or preset.num_steps, guidance_scale
        self.sigma_distribution, self.sampler, self.eta = sigma_distribution, get_sampler(sampler), eta
        self.generator = torch.Generator().manual_seed(0)
        self.function_evaluations = 0
        self.text_device = device
        self._texts: dict[str, int] = {}
        self._tokens: list[torch.Tensor] = []
        self._pooled: list[torch.Tensor] = []
        self._copies: dict[str, torch.nn.Module] = {}
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(device)
        self.transformer: SD3Transformer2DModel = pipeline.transformer
        self.vae = pipeline.vae
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if tuning.kind == "lora":
            self._add_adapter(TRAINED)
        elif tuning.kind == "full":
            self._copies["reference"] = copy.deepcopy(self.transformer)
            self.transformer.requires_grad_(True)
        else:
            raise UsageError(f"unknown training.tuning '{tuning.kind}'; use 'full' or 'lora'")

    # --- text -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> Conditioning:
        """Conditioning of these prompts; each different text is encoded once and kept."""
        prompts = list(prompts)
        new = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                part,
                None,
                None,
                device=self.text_device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.preset.max_sequence_length,
            )
            for text, t, p in zip(part, tokens.to(self.device), pooled.to(self.device), strict=True):
                self._texts[text] = len(self._tokens)
                self._tokens.append(t)
                self._pooled.append(p)
        ids = [self._texts[p] for p in prompts]
        unique = list(dict.fromkeys(ids))
        where = {k: i for i, k in enumerate(unique)}
        index = torch.tensor([where[k] for k in ids], device=self.device)
        tokens = torch.stack([self._tokens[k] for k in unique])
        return Conditioning(tokens, torch.stack([self._pooled[k] for k in unique]), index)

    def release_text_encoders(self) -> None:
        """Move the text encoders off the device, once every prompt of a run is encoded."""
        self.text_device = torch.device("cpu")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(self.pipeline, name)
            if encoder is not None:
                encoder.to("cpu")

    # --- velocity and weight views --------------------------------------------------------------------------------

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, weights: str = "current"
    ) -> torch.Tensor:
        """v(x_sigma, sigma, c) without guidance; x (R, C, h, w), sigma (R,). Only the view "current" has a gradient.

        Raises UsageError for a view that nobody asked for.
        """
        self.function_evaluations += len(x)
        if weights != "current":
            with torch.no_grad(), self._view(weights) as module:
                return self._forward(module, x, sigma, cond.tokens[cond.index], cond.pooled[cond.index])
        return self._forward(self.transformer, x, sigma, cond.tokens[cond.index], cond.pooled[cond.index])

    def guided_velocity(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """The velocity that the sampler follows: with classifier-free guidance if its scale is above 1.

        guidance_scale None is that of training.
        """
        scale = next(s for s in (guidance_scale, self.guidance_scale, self.preset.guidance_scale) if s is not None)
        v = self.velocity(x, sigma, cond, weights)
        if scale <= 1.0:
            return v
        empty = self.encode([""] * len(x))
        v_empty = self.velocity(x, sigma, empty, weights)
        return v_empty + scale * (v - v_empty)

    def _forward(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        dtype = self.model_dtype
        with self._precision():
            v = module(x.to(dtype), tokens.to(dtype), pooled.to(dtype), timestep=sigma * 1000, return_dict=False)[0]
        return v.float()

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return next(self.transformer.parameters()).dtype

    def _precision(self) -> AbstractContextManager[object]:
        # LoRA weights stay float32 beside half-precision base weights; autocast joins the two.
        if self.model_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.model_dtype)

    def double(self) -> None:
        """Compute in float64 from here on; for checks of small models."""
        for module in (self.transformer, *self._copies.values()):
            module.double()

    def add_view(self, name: str) -> None:
        """Make a view of EXTRA_VIEWS: a copy of the current weights, moved by `update_view`."""
        if name not in EXTRA_VIEWS:
            raise UsageError(f"weight view '{name}' cannot be added; {EXTRA_VIEWS} can, {VIEWS[:2]} always exist")
        if self.tuning.kind == "lora":
            self._add_adapter(name)
            self.transformer.set_adapter(TRAINED)
        else:
            self._copies[name] = copy.deepcopy(self.transformer).requires_grad_(False)
        self.update_view(name, decay=0.0)

    @torch.no_grad()
    def update_view(self, name: str, decay: float) -> None:
        """view = decay * view + (1 - decay) * current."""
        view: list[torch.Tensor] = [*self._view_parameters(name)]
        torch._foreach_lerp_(view, [p.detach() for p in self.trainable_parameters()], 1.0 - decay)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer trains, in a fixed order."""
        if self.tuning.kind == "lora":
            return adapter_parameters(self.transformer, TRAINED)
        return list(self.transformer.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The trained weights and the added views, for a checkpoint."""
        state = {"current": [p.detach() for p in self.trainable_parameters()]}
        for name in filter(self.has_view, EXTRA_VIEWS):
            state[name] = [p.detach() for p in self._view_parameters(name)]
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for p, saved in zip(self.trainable_parameters(), state["current"], strict=True):
            p.copy_(saved)
        for name in state.keys() & set(EXTRA_VIEWS):
            for p, saved in zip(self._view_parameters(name), state[name], strict=True):
                p.copy_(saved)

    def save(self, folder: Path) -> None:
        """Write the tuned weights in diffusers' own format: LoRA weights, or the transformer's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tuning.kind == "full":
            self.transformer.save_pretrained(folder / "transformer")
        else:
            save_adapter(self.pipeline, folder)

    def has_view(self, name: str) -> bool:
        """Whether a view of EXTRA_VIEWS was added."""
        return name in self._copies or bool(adapter_parameters(self.transformer, name))

    def _view_parameters(self, name: str) -> list[torch.nn.Parameter]:
        if name in self._copies:
            return list(self._copies[name].parameters())
        params = adapter_parameters(self.transformer, name)
        if not params:
            raise UsageError(f"weight view '{name}' does not exist; call policy.add_view('{name}') in setup")
        return params

    def _add_adapter(self, name: str) -> None:
        add_adapter(self.transformer, name, self.tuning.lora_rank, self.tuning.lora_alpha)

    def _view(self, name: str) -> AbstractContextManager[torch.nn.Module]:
        if self.tuning.kind == "lora" and (name == "reference" or self.has_view(name)):
            return AdapterState(self.transformer, name)
        if name not in self._copies:
            raise UsageError(f"weight view '{name}' does not exist; call policy.add_view('{name}') in setup")
        return nullcontext(self._copies[name])

    # --- sampling -------------------------------------------------------------------------------------------------

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampler's sigmas (num_steps + 1,), from 1 to 0, from the pipeline's own scheduler."""
        self.pipeline.scheduler.set_timesteps(num_steps)
        return self.pipeline.scheduler.sigmas.float().to(self.device)

    def draw_noise(self, n: int) -> torch.Tensor:
        """Standard normal latents (n, C, h, w)."""
        return self._randn((n, *self.latent_shape))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        side = self.preset.resolution // self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels, side, side)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding."""
        return int(self.transformer.config.pooled_projection_dim)

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

    @torch.no_grad()
    def rollout(
        self,
        cond: Conditioning,
        noise: torch.Tensor,
        *,
        sampler: Sampler = SAMPLERS["ode"],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        window: range | None = None,
        keep_states: bool = False,
        weights: str = "current",
    ) -> Samples:
        """Sample from noise (B, C, h, w) to x0. A sampler with noise uses `generator`, and gives log_prob.

        num_steps and guidance_scale None are the preset's. Steps outside `window`, if there is one, are ODE steps; they
        have no density, and their log_prob is infinite.
        """
        x = noise
        sigmas = self.sigmas(num_steps or self.preset.num_steps)
        scale = self.preset.guidance_scale if guidance_scale is None else guidance_scale
        states, log_probs = [x], []
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            v = self.guided_velocity(x, sigma.expand(len(x)), cond, weights, scale)
            chosen = sampler if window is None or k in window else SAMPLERS["ode"]
            step = chosen.step(x, v, sigma, sigma_next, self.eta)
            x = step.mean
            if chosen.has_log_prob:
                x = step.mean + step.std * self._randn(x.shape)
                log_probs.append(gaussian_log_prob(x, step))
            elif sampler.has_log_prob:
                log_probs.append(torch.full((len(x),), torch.inf, device=x.device))
            if keep_states:
                states.append(x)
        return Samples(
            x0=x,
            sigmas=sigmas,
            states=torch.stack(states, dim=1) if keep_states else None,
            log_prob=torch.stack(log_probs, dim=1) if log_probs else None,
        )

    def transition(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        sigma_next: torch.Tensor,
        cond: Conditioning,
        weights: str = "current",
    ) -> Step:
        """The Gaussian of the training sampler's step from x (R, C, h, w) at sigma (R,) to sigma_next (R,)."""
        return self.sampler.step(x, self.guided_velocity(x, sigma, cond, weights), sigma, sigma_next, self.eta)

    def denoise(self, x: torch.Tensor, sigmas: torch.Tensor, cond: Conditioning, noise: torch.Tensor) -> torch.Tensor:
        """The image latents x0 that the training sampler reaches from x (R, C, h, w) along sigmas (K + 1,).

        Unlike `rollout` with gradient, through all K steps. noise (R, K, C, h, w) is that of a stochastic sampler.
        """
        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            step = self.transition(x, sigma.expand(len(x)), sigma_next.expand(len(x)), cond)
            x = step.mean + step.std * noise[:, k] if self.sampler.has_log_prob else step.mean
        return x

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1]; differentiable when gradients are on."""
        config = self.vae.config
        z = (latents / config.scaling_factor + config.shift_factor).to(next(self.vae.parameters()).dtype)
        if torch.is_grad_enabled() and z.requires_grad and z.is_cuda:
            image = torch.utils.checkpoint.checkpoint(self._decode, z, use_reentrant=False)
        else:
            image = self._decode(z)
        return (image.float() / 2 + 0.5).clamp(0, 1).contiguous()  # as rewards expect, not as the VAE keeps it

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z, return_dict=False)[0]

    def draw_integers(self, high: int, n: int) -> torch.Tensor:
        """n uniform integers in [0, high)."""
        return torch.randint(high, (n,), generator=self.generator).to(self.device)

    def _randn(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        # Drawn on the CPU whatever the device, so that a seed means the same noise everywhere.
        return torch.randn(shape, generator=self.generator).to(self.device)


def load_pipeline(preset: ModelPreset, device: torch.device) -> StableDiffusion3Pipeline:
    """Load the preset's pipeline from its folder or hub id.

    Raises RunError when its weights cannot be found or read.
    """
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, preset.dtype)
    absent = {} if preset.has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    source = preset.resolve_source()
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            source, revision=preset.revision, dtype=dtype, use_safetensors=True, **absent
        )
    except (OSError, ValueError) as error:  # diffusers raises ValueError for a folder that does not exist
        reason = shorten(str(error), 140, placeholder=" ...")
        raise RunError(f"model '{preset.name}' cannot be loaded from '{source}': {reason}; {preset.remedy}") from error
    pipeline.vae.to(memory_format=torch.channels_last)  # decodes in three quarters of the time on a CPU
    return pipeline
