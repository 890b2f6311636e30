"""What tells the files of a model from those of another."""

from __future__ import annotations

from pathlib import Path

from flowbench.caches import file_identity
from flowbench.models.presets import AnalyticPreset, ModelPreset
from flowbench.reading.checksums import content_sha256

DECIDING = (".safetensors", ".json", ".txt", ".model")  # endings of a pipeline's files that decide what it makes


def source_identity(preset: ModelPreset, parts: tuple[str, ...] = ("",)) -> str | None:
    """The identity of a pipeline's files, without reading them: of folders whose names begin with one of `parts`.

    None for a model that is not on this machine, or has no files: a formula, or random weights.
    """
    folder = None if _has_no_files(preset) else _folder(preset)
    if folder is None:
        return None
    found = [place.name for place in folder.iterdir() if place.is_dir() and place.name.startswith(parts)]
    return file_identity(folder, *sorted(found)) if found else None


def source_sha256(preset: ModelPreset) -> str | None:
    """SHA-256 of what a pipeline's files hold, wherever they lie; "" for a model without files.

    None for a model that is not on this machine, or whose files cannot be read.
    """
    if _has_no_files(preset):
        return ""
    folder = _folder(preset)
    if folder is None:
        return None
    from flowbench.models.families import family_class

    absent = family_class(preset.family).left_out(preset)
    parts = [place for place in sorted(folder.iterdir()) if place.is_dir() and place.name not in absent]
    files = [file for part in parts for file in sorted(part.iterdir()) if file.suffix in DECIDING and file.is_file()]
    try:
        return content_sha256(files, folder)
    except OSError:
        return None


def _has_no_files(preset: ModelPreset) -> bool:
    return isinstance(preset, AnalyticPreset) or getattr(preset, "random_init", False)


def _folder(preset: ModelPreset) -> Path | None:
    """A pipeline's folder, also that of the hub's cache."""
    folder = Path(preset.resolve_source())
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(preset.source, "model_index.json", revision=preset.revision)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(index).parent if isinstance(index, str) else None
