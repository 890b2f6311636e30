"""`flowbench doctor`: what is installed, which device is there, which weights can be reached."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.models.presets import AnalyticPreset, load_preset, preset_names, resolve_weights
from flowbench.record import package_versions
from flowbench.scoring.workers.reward import make_reward


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is there, in words, and what to do if not."""

    part: str
    ok: bool
    state: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at packages, device and weights; nothing is downloaded."""
    findings = [
        Finding(name, state != "absent", state, "" if state != "absent" else f"pip install {name}")
        for name, state in package_versions().items()
    ]
    return [*findings, _device(), *_weights()]


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("device", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GB")
    return Finding("device", True, f"cpu, {torch.get_num_threads()} threads; no GPU (fine for mini-sd3)")


def _weights() -> list[Finding]:
    findings = []
    for name in preset_names():
        preset = load_preset(name)
        if isinstance(preset, AnalyticPreset):
            findings.append(Finding(f"model {name}", True, "a formula, no weights"))
            continue
        findings.append(_located(f"model {name}", preset.source, preset.licence, preset.remedy))
        for reward, arguments in preset.rewards.items():
            findings.append(_reward(f"reward {reward} for {name}", reward, arguments))
    return findings


def _reward(part: str, name: str, arguments: dict[str, Any]) -> Finding:
    reward = make_reward(name, arguments)
    needed = reward.weights()
    sources = ", ".join(w.source for w in needed) or "no weights"
    remedies = [r for w in needed if (r := w.missing())]
    return Finding(part, not remedies, f"{sources}; {reward.info.licence}", "; ".join(remedies))


def _located(part: str, source: str, licence: str, remedy: str) -> Finding:
    folder = Path(resolve_weights(source))
    if folder.is_dir():
        return Finding(part, True, f"{_megabytes(folder):.0f} MB, {licence}")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "model_index.json"), str):
        return Finding(part, True, f"in the hub's cache, {licence}")
    mirror = os.environ.get("FLOWBENCH_WEIGHTS")
    return Finding(part, False, f"{source}, {licence}" + (f"; not below {mirror}" if mirror else ""), remedy)


def _megabytes(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
