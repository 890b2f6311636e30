"""Where the embedded weights lie."""

from __future__ import annotations

from pathlib import Path

MODELS = ("mini-sd3", "mini-clip")  # what the embedded preference models are built from


def weights_folder() -> Path:
    """The folder with one subfolder per embedded model."""
    return Path(__file__).parent / "weights"


def embedded_models() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(folder.name for folder in weights_folder().iterdir() if folder.is_dir())
