"""Pictures on demand: a prompt drawn by base and tuned model, and the testbed's world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flowbench.errors import UsageError
from flowbench.experiments.run import load_tuned
from flowbench.models.devices import pick_device
from flowbench.models.families import load_pipeline
from flowbench.models.families.plane import on_plane
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.names import distinct_name
from flowbench.outputs import check_file
from flowbench.prompts import load_split, spread
from flowbench.reporting.frontier import sample_picture
from flowbench.reporting.plots import sample_grid
from flowbench.seeding import generator_for


@torch.no_grad()
def draw_images(policy: Policy, prompts: list[str], n: int, seed: int, weights: str) -> torch.Tensor:
    """Images (P, n, 3, H, W) of each prompt; a seed means the same noise for every model."""
    texts = [p for p in prompts for _ in range(n)]
    policy.generator = generator_for(seed, "sample")
    samples = policy.rollout(policy.encode(texts), policy.draw_noise(len(texts)), weights=weights)
    images = policy.decode(samples.x0).cpu()
    return images.reshape(len(prompts), n, *images.shape[1:])


def sample_side_by_side(folder: Path, prompt: str, n: int, seed: int, device: str, output: Path | None) -> Path:
    """Write a PNG with n images of the base model and n of the tuned one; returns its path.

    output: the file, or a folder that gets a file for each prompt and seed; None is the run's samples/. Raises
    UsageError, before anything is loaded, when it cannot be written.
    """
    path = _file_for(prompt, seed, output or folder / "samples")
    policy, _ = load_tuned(folder, pick_device(device), [[prompt], [""]])
    columns = {
        name: draw_images(policy, [prompt], n, seed, w) for name, w in (("base", "reference"), ("tuned", "current"))
    }
    if on_plane(policy):
        sample_picture(path, {model: points.reshape(n, -1) for model, points in columns.items()}, prompt)
    else:
        sample_grid(path, columns, [prompt])
    return path


def _file_for(prompt: str, seed: int, output: Path) -> Path:
    """The PNG of a prompt; different prompts never have the same one in a folder."""
    path = (
        output
        if output.suffix.lower() == ".png" and not output.is_dir()
        else output / (f"{distinct_name(prompt)}-{seed}.png")
    )
    if output.suffix.lower() not in ("", ".png") and not output.is_dir():
        raise UsageError(f"--output '{output}' is neither a PNG file nor a folder; write {output.with_suffix('.png')}")
    check_file("--output", path)
    return path


def show_testbed(path: Path, seed: int, rows: int = 12, n: int = 4) -> Path:
    """Write a PNG with rendered scenes of test prompts beside mini-sd3's samples for them; returns its path."""
    from flowbench.testbeds.shapes.world import parse, render, sample_scenes

    preset = load_preset("mini-sd3")
    policy = Policy(load_pipeline(preset, torch.device("cpu")), preset)
    prompts = [p.text for p in spread(load_split("shapes", "test"), rows)]
    captions = [parse(p) for p in prompts for _ in range(n)]
    scenes = torch.from_numpy(render(sample_scenes(captions, np.random.default_rng(seed))))
    drawn = draw_images(policy, prompts, n, seed, "reference")
    sample_grid(path, {"the world": scenes.reshape(len(prompts), n, 3, 32, 32), "mini-sd3": drawn}, prompts)
    return path
