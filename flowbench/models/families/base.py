"""The contract of a family: everything about a diffusers pipeline that the rest of flowbench need not know."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
import torch.utils.checkpoint

from flowbench.errors import RunError, UsageError
from flowbench.models.families import family_entry, family_of
from flowbench.models.loading import brief, load_networks
from flowbench.models.lora import save_adapter

if TYPE_CHECKING:
    from flowbench.models.presets import ModelPreset

NamedTensors: TypeAlias = Mapping[str, torch.Tensor]
Parts: TypeAlias = Literal["all", "text", "rest"]  # of a pipeline: text encoders, or all that is not one


class Family(ABC):
    """One pipeline and how to use it, in SD3's convention: v = eps - x0, sigma = 1 is noise, x_0 = x - sigma v.

    name: its key in the registry; lora_targets: endings of the names of the layers that LoRA adapts, () for none;
    text_encoders: names of the pipeline's text encoders; classifier_free: whether guidance takes a second velocity, of
    the negative prompt, or is an input of the model; spaced_evenly: whether the pipeline's own call spaces its sigmas
    evenly and ignores the scheduler's spacing. Latents have the shape (B, C, h, w) outside, whatever a transformer
    makes of them inside.
    """

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = ()
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    classifier_free: ClassVar[bool] = True
    spaced_evenly: ClassVar[bool] = False

    def __init__(self, pipeline: Any, preset: ModelPreset) -> None:
        self.pipeline, self.preset = pipeline, preset

    # --- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, preset: ModelPreset, device: torch.device, parts: Parts = "all") -> Any:
        """The preset's pipeline, or the named parts of it; those that it or the preset leaves out are None.

        Both "text" and "rest" have the tokenizers and the scheduler.

        Raises UsageError for a folder of another family, RunError when its weights cannot be found or read, or are not
        all there.
        """
        import diffusers
        from diffusers.utils import logging
        from transformers.utils import logging as text_logging

        logging.disable_progress_bar()
        text_logging.disable_progress_bar()
        logging.set_verbosity_error()
        text_logging.set_verbosity_error()
        source = preset.resolve_source()
        kind = getattr(diffusers, cls._pipeline_class(preset, source))
        dtype = getattr(torch, preset.cpu_dtype if device.type == "cpu" else preset.dtype)
        unwanted = {"all": (), "text": ("transformer", "vae"), "rest": cls.text_encoders}[parts]
        absent = dict.fromkeys((*cls.left_out(preset), *unwanted))
        try:
            folder = Path(source)
            if not folder.is_dir():
                folder = Path(kind.download(source, revision=preset.revision, use_safetensors=True, **absent))
            networks = load_networks(folder, kind._get_signature_keys(kind)[0], dtype, without=absent)
            pipeline = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **absent, **networks)
        except RunError as error:
            raise RunError(f"model '{preset.name}': {error}") from error
        except (OSError, ValueError) as error:  # diffusers raises ValueError for a folder that does not exist
            raise RunError(
                f"model '{preset.name}' cannot be loaded from '{source}': {brief(error)}; {preset.remedy}"
            ) from error
        if pipeline.vae is not None:
            pipeline.vae.to(memory_format=torch.channels_last)  # decodes in three quarters of the time on a CPU
        return pipeline

    @classmethod
    def left_out(cls, preset: ModelPreset) -> tuple[str, ...]:
        """Names of the pipeline's parts that the preset does without."""
        return ()

    @classmethod
    def _pipeline_class(cls, preset: ModelPreset, source: str) -> str:
        """The diffusers class to load with: the one that the folder names, if this family serves it."""
        served, index = family_entry(cls.name).pipelines, Path(source) / "model_index.json"
        if not index.is_file():
            return served[0]
        named = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if named not in served:
            fitting = family_of(str(named))
            remedy = f"set family: {fitting}" if fitting else "no family of flowbench serves it"
            raise UsageError(f"model '{preset.name}' is a {named}, not of the family '{cls.name}'; {remedy}")
        return str(named)

    def save(self, folder: Path, lora: bool) -> None:
        """Write the tuned weights in diffusers' own format: LoRA weights, or the transformer's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        if lora:
            save_adapter(self.pipeline, folder)
        else:
            self.transformer.save_pretrained(folder / "transformer")

    @property
    def transformer(self) -> Any:
        """The module that is tuned."""
        return self.pipeline.transformer

    def modules(self) -> list[torch.nn.Module]:
        """All parts of the pipeline that have weights."""
        return [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]

    # --- text -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device) -> list[NamedTensors]:
        """Named tensors of each prompt, encoded on `device`; lengths of tokens may differ between prompts.

        Where they do, one of the tensors is the mask (L,) of true tokens, which padding extends with False.
        """

    def encode_negative(self, device: torch.device) -> NamedTensors | None:
        """What classifier-free guidance leads away from; None is the empty prompt, encoded as any other."""
        return None

    def place_text_encoders(self, device: torch.device) -> None:
        """Move the text encoders to a device."""
        for name in self.text_encoders:
            encoder = getattr(self.pipeline, name, None)
            if encoder is not None:
                encoder.to(device)

    @property
    @abstractmethod
    def text_width(self) -> int:
        """D of a summary."""

    @abstractmethod
    def summarize(self, text: NamedTensors) -> torch.Tensor:
        """One vector per prompt, (P, D), for critics."""

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the prompt has, special ones included; those beyond `token_limit` are not read."""
        return len(self._tokenizer()(prompt).input_ids)

    def cuts(self, prompt: str) -> bool:
        """Whether the text encoders do not read the prompt's end; False where there are no tokenizers to tell."""
        return (
            bool(self.text_encoders) and self._tokenizer() is not None and self.count_tokens(prompt) > self.token_limit
        )

    @property
    def token_limit(self) -> int:
        """The most tokens that the text encoder with the longest memory reads."""
        return self.preset.max_sequence_length

    def _tokenizer(self) -> Any:
        """The tokenizer that `token_limit` counts for."""
        return self.pipeline.tokenizer

    # --- velocity -------------------------------------------------------------------------------------------------

    def velocity(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """v (R, C, h, w) float32 of a weight view `module`; x (R, C, h, w), sigma (R,), text with R rows.

        scale: the guidance that is an input, for families whose guidance is not classifier-free.
        """
        dtype = next(module.parameters()).dtype  # of what stands in for the weights, if anything does
        text = {name: t.to(dtype) if t.is_floating_point() else t for name, t in text.items()}
        with self._precision(dtype, x.device):
            v = self.predict(module, x.to(dtype), sigma, text, scale)
        return v.float()

    @abstractmethod
    def predict(
        self, module: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: NamedTensors, scale: float
    ) -> torch.Tensor:
        """As `velocity`, with x and text in the weights' dtype: the module's own call, its time and its sign."""

    def last_norm(self, module: torch.nn.Module) -> torch.nn.Module | None:
        """The layer of a weight view whose output (R, L, D) the velocity is a linear function of, for critics."""
        layer: torch.nn.Module | None = getattr(module, "norm_out", None)
        return layer

    def guide(self, v: torch.Tensor, v_negative: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance: the prompt's velocity (R, C, h, w), led away from that of the negative prompt."""
        return v_negative + scale * (v - v_negative)

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype

    def lower_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """This precision, if it is lower than that of the weights, else None.

        Raises UsageError where the family has no other than its own.
        """
        return dtype if dtype.itemsize < self.model_dtype.itemsize else None

    def _precision(self, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
        # LoRA weights stay float32 beside half-precision base weights; autocast joins the two.
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    # --- latents --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent at the preset's resolution."""

    def latent_size(self, patch: int = 2) -> tuple[int, int]:
        """(h, w) of a latent that the transformer reads in squares of `patch` by `patch`.

        Raises UsageError for a resolution that is no whole number of such squares.
        """
        preset, scale = self.preset, self.pipeline.vae_scale_factor
        check_multiple(preset, patch * scale)
        return preset.height // scale, preset.width // scale

    @classmethod
    def multiple(cls, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
        """Pixels of a side of what the transformer reads as one token, by the configurations of the two networks."""
        scale: int = 2 ** (len(vae["block_out_channels"]) - 1)
        return 2 * scale

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampler's sigmas (num_steps + 1,) float32, from 1 to 0, as the pipeline's own call makes them.

        They are spaced as the preset's `sigma_spacing` says, and then shifted as the model's scheduler says.
        """
        scheduler = self.pipeline.scheduler
        if self.spaced_evenly or self.preset.sigma_spacing == "linspace":
            scheduler.set_timesteps(sigmas=even_sigmas(num_steps), **self.shift_arguments())
        else:
            scheduler.set_timesteps(num_steps, **self.shift_arguments())
        sigmas: torch.Tensor = scheduler.sigmas.float()
        return sigmas

    def shift_arguments(self) -> dict[str, float]:
        """What the scheduler's `set_timesteps` is told of the shift, beside its own configuration."""
        return {}

    def call_arguments(self, num_steps: int, scale: float) -> dict[str, Any]:
        """The arguments with which the pipeline's own call, in plain diffusers, samples as this family does."""
        size = {"height": self.preset.height, "width": self.preset.width}
        arguments: dict[str, Any] = {**size, "num_inference_steps": num_steps}
        if self.preset.sigma_spacing == "linspace":
            arguments["sigmas"] = even_sigmas(num_steps)
        return {**arguments, "guidance_scale": scale, "max_sequence_length": self.preset.max_sequence_length}

    def decode(self, latents: torch.Tensor, checkpoint: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] of latents (B, C, h, w); differentiable when gradients are on.

        checkpoint: where a gradient is needed, decode images one by one, each of them again in the backward pass.
        """
        vae = self.pipeline.vae
        z = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(next(vae.parameters()).dtype)
        if checkpoint and torch.is_grad_enabled() and z.requires_grad:
            # One checkpoint around all of them saves nothing: the backward pass decodes them all again at once.
            again = partial(torch.utils.checkpoint.checkpoint, self._decode, use_reentrant=False)
            image = torch.cat([again(one) for one in z.split(1)])
        else:
            image = self._decode(z)
        return (image.float() / 2 + 0.5).clamp(0, 1).contiguous()  # as rewards expect, not as the VAE keeps it

    def _decode(self, z: torch.Tensor) -> Any:
        return self.pipeline.vae.decode(z, return_dict=False)[0]


def check_multiple(preset: ModelPreset, multiple: int) -> None:
    """Raise UsageError for a resolution whose sides are no multiples of so many pixels."""
    for name, pixels in (("height", preset.height), ("width", preset.width)):
        if pixels % multiple:
            below = pixels // multiple * multiple
            nearest = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise UsageError(
                f"model '{preset.name}': its resolution's {name} of {pixels} is no multiple of {multiple}; "
                f"use {nearest}"
            )


def even_sigmas(num_steps: int) -> list[float]:
    """1, ..., 2 / num_steps, 1 / num_steps: the noise levels of `num_steps` equal steps that end at 0, unshifted."""
    return [k / num_steps for k in range(num_steps, 0, -1)]


def shift_for(scheduler: Any, tokens: int) -> float:
    """mu of a scheduler's dynamic shift: linear in the number of image tokens between its two given points."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)
