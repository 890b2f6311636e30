"""What tells the files of a model from those of another."""

from __future__ import annotations

from pathlib import Path

from flowbench.caches import file_identity
from flowbench.models.presets import AnalyticPreset, ModelPreset


def source_identity(preset: ModelPreset, parts: tuple[str, ...] = ("",)) -> str | None:
    """The identity of a pipeline's files, without reading them: of folders whose names begin with one of `parts`.

    None for a model that is not on this machine, or has no files: a formula, or random weights.
    """
    if isinstance(preset, AnalyticPreset) or getattr(preset, "random_init", False):
        return None
    folder = Path(preset.resolve_source())
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(preset.source, "model_index.json", revision=preset.revision)
        if not isinstance(index, str):
            return None
        folder = Path(index).parent
    found = [place.name for place in folder.iterdir() if place.is_dir() and place.name.startswith(parts)]
    return file_identity(folder, *sorted(found)) if found else None
