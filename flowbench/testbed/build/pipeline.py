"""Builds all embedded models in order, each stage resumable, and writes their folders and model cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ...errors import UsageError, did_you_mean
from ...run import pick_device
from ...state import load_state
from ..weights import weights_folder
from . import clip, text, transformer, vae
from .card import write_cards
from .fit import Progress

STAGES = ("vae", "text", "transformer", "clip")


def build(output: Path | None, work: Path, only: Sequence[str], seed: int, device: str, progress: Progress) -> Path:
    """Train the stages that are not finished and write mini-sd3 and mini-clip; returns their folder.

    `only` retrains these stages and keeps what the work folder, or else the shipped weights, have of the others.
    Raises UsageError for an unknown stage.
    """
    for stage in only:
        if stage not in STAGES:
            raise UsageError(f"unknown stage '{stage}'{did_you_mean(stage, STAGES)}")
    stages, where = tuple(only) or STAGES, pick_device(device)
    folder = output or weights_folder()
    work.mkdir(parents=True, exist_ok=True)
    pipeline = _assemble(work, stages, seed, where, progress)
    if "transformer" in stages:
        transformer.train_transformer(pipeline, work, seed, progress)
    if {"vae", "text", "transformer"} & set(stages):
        save_pipeline(pipeline, folder / "mini-sd3")
    if "clip" in stages:
        model = clip.train_clip(pipeline.tokenizer, work, seed, where, progress)
        clip.save_clip(model, pipeline.tokenizer, folder / "mini-clip")
    write_cards(folder)
    return folder


def _assemble(
    work: Path, stages: Sequence[str], seed: int, device: torch.device, progress: Progress
) -> StableDiffusion3Pipeline:
    """The pipeline with its VAE and text towers, trained now or taken from the shipped weights."""
    shipped = weights_folder() / "mini-sd3"
    if "vae" in stages:
        autoencoder = vae.train_vae(work, seed, device, progress)
    else:
        autoencoder = AutoencoderKL.from_pretrained(shipped / "vae").to(device)
    if "text" in stages:
        tokenizer = text.build_tokenizer(work / "tokenizer")
        towers = text.train_text_towers(tokenizer, work, seed, device, progress)
        first, second = towers.first, towers.second
    else:
        tokenizer = CLIPTokenizer.from_pretrained(shipped / "tokenizer")
        first, second = (
            CLIPTextModelWithProjection.from_pretrained(shipped / name).to(device)
            for name in ("text_encoder", "text_encoder_2")
        )
    torch.manual_seed(seed + 3)
    return StableDiffusion3Pipeline(
        transformer=transformer.new_transformer(2 * text.WIDTH).to(device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the folder that `StableDiffusion3Pipeline.from_pretrained` loads."""
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("config.json"):  # where a part was loaded from is nobody's business
        config = {key: value for key, value in read_json(path).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checkpointed_clip(work: Path, tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """The mini CLIP as its last checkpoint has it, to look at it while it trains."""
    model = open_clip.CLIP(**clip.clip_config(len(tokenizer)))
    model.load_state_dict(load_state(work / "clip.safetensors")["module"])
    return model.eval()


def total_megabytes(folder: Path) -> float:
    """Size of all weight files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file."""
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content
