"""Where the embedded weights lie."""

from __future__ import annotations

from pathlib import Path

MODELS = ("mini-sd3", "mini-clip")


def weights_folder() -> Path:
    """The folder with one subfolder per embedded model."""
    return Path(__file__).parent / "weights"
