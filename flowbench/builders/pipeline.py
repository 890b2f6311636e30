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

from flowbench.builders import clip, preferences, rewards, text, transformer, vae
from flowbench.builders.card import write_cards
from flowbench.builders.fit import Progress
from flowbench.builders.reward_card import write_reward_cards
from flowbench.builders.stages import chosen_stages
from flowbench.builders.tokenizer import build_tokenizer
from flowbench.files import write_atomically
from flowbench.models.devices import pick_device
from flowbench.models.families import load_pipeline
from flowbench.models.loading import load_network
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.testbeds.shapes.weights import MODELS, weights_folder, write_shipped_sums


def build(output: Path | None, work: Path, only: Sequence[str], seed: int, device: str, progress: Progress) -> Path:
    """Train the stages that are not finished and write mini-sd3, mini-clip and the reward models; returns their folder.

    `only` retrains these stages and takes the others from the shipped weights.
    Raises UsageError for an unknown stage.
    """
    stages, where = chosen_stages(only), pick_device(device)
    folder = output or weights_folder()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(work / "tokenizer")
    if "clip" in stages:
        clip.save_clip(clip.train_clip(tokenizer, work, seed, where, progress), tokenizer, folder / "mini-clip")
    if {"vae", "text", "transformer"} & set(stages):
        pipeline = _assemble(tokenizer, folder, work, stages, seed, where, progress)
        if "transformer" in stages:
            data = transformer.load_data(pipeline, work, seed, progress)
            transformer.train_transformer(pipeline.transformer, data, work, seed, progress)
            transformer.distil_guidance(pipeline.transformer, data, work, seed, progress)
        save_pipeline(pipeline, folder / "mini-sd3")
    if set(stages) - {"rewards"}:
        write_cards(folder)
    if output is None:  # now, because the reward models are built from what was just written
        write_shipped_sums(folder)
    if "rewards" in stages:
        _build_rewards(folder, work, seed, where, progress)
        if output is None:
            write_shipped_sums(folder)
    return folder


def _build_rewards(folder: Path, work: Path, seed: int, device: torch.device, progress: Progress) -> None:
    """Train the reward models on samples of mini-sd3, from mini-clip; of these, what `folder` lacks is shipped."""
    sources = {name: folder / name if (folder / name).is_dir() else weights_folder() / name for name in MODELS}
    preset = load_preset("mini-sd3").model_copy(update={"source": str(sources["mini-sd3"])})
    policy = Policy(load_pipeline(preset, device), preset, device=device)
    pictures = preferences.training_pictures(policy, work, seed, progress)
    fresh = preferences.fresh_pictures(policy, load_split("shapes", "test"), work, seed, progress)
    locked = open_clip.create_model(f"local-dir:{sources['mini-clip']}").eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(sources["mini-clip"])
    materials = rewards.Materials(pictures, locked, tokenizer, work, seed, device, progress)
    for name, train in rewards.TRAINERS.items():
        train(materials, folder / f"mini-{name}")
    write_reward_cards(folder, sources["mini-clip"], fresh, seed)


def _assemble(
    tokenizer: CLIPTokenizer,
    folder: Path,
    work: Path,
    stages: Sequence[str],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> StableDiffusion3Pipeline:
    """The pipeline with each part trained now, taken from the shipped weights, or (the transformer) still untrained."""
    shipped = weights_folder() / "mini-sd3"
    if "vae" in stages:
        autoencoder = vae.train_vae(work, seed, device, progress)
    else:
        autoencoder = load_network(AutoencoderKL, shipped / "vae", torch.float32).to(device)
    if "text" in stages:
        clip_folder = folder if (folder / "mini-clip").is_dir() else weights_folder()
        locked = open_clip.create_model(f"local-dir:{clip_folder / 'mini-clip'}").eval().to(device)
        towers = text.train_text_towers(tokenizer, locked, work, seed, device, progress)
        first, second = towers.first, towers.second
    else:
        first, second = (
            load_network(CLIPTextModelWithProjection, shipped / name, torch.float32).to(device)
            for name in ("text_encoder", "text_encoder_2")
        )
    torch.manual_seed(seed + 3)
    new = transformer.new_transformer(2 * text.WIDTH)
    backbone = new if "transformer" in stages else load_network(type(new), shipped / "transformer", torch.float32)
    return StableDiffusion3Pipeline(
        transformer=backbone.to(device),
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
    """Write the folder that `StableDiffusion3Pipeline.from_pretrained` loads; its transformer becomes float16."""
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.transformer.half()  # half the size in the package; loading gives float32 again
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Where a part was loaded from is nobody's business.
    for path in (folder / "model_index.json", *folder.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
