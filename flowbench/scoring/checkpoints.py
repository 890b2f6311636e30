"""Weights of reward models: where they lie, how they are read, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowbench.errors import RunError, UsageError
from flowbench.files import write_atomically
from flowbench.models.loading import brief, quiet
from flowbench.models.presets import EMBEDDED, resolve_weights
from flowbench.reading import tensors
from flowbench.reading.tensors import TensorError
from flowbench.testbeds.shapes.weights import check_shipped

if TYPE_CHECKING:
    from torch import nn

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


_RANDOM: ContextVar[bool] = ContextVar("random weights", default=False)


@contextmanager
def random_weights(wanted: bool = True) -> Iterator[None]:
    """Within it, rewards are built with their real configuration and random weights, and no file is looked for."""
    token = _RANDOM.set(wanted)
    try:
        yield
    finally:
        _RANDOM.reset(token)


def are_random() -> bool:
    """Whether weights are random here."""
    return _RANDOM.get()


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 over the names and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            if value.is_meta:  # no content: a plan is made of shapes
                digest.update(str(tuple(value.shape)).encode())
                continue
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_file(reward: str, source: str, name: str, pickle: str | None = None, origin: str | None = None) -> Path:
    """The safetensors file `name` of a source: a local folder, a hub id mirrored below FLOWBENCH_WEIGHTS, or the cache.

    `source` may also be the file itself. `pickle` is the official file's name, where that needs conversion, and
    `origin` says where it is published, if not on the hub under `source`. Nothing is downloaded.
    Raises RunError with the remedy when it is nowhere.
    """
    place = Path(resolve_weights(source))
    if place.is_file() or are_random():
        return place
    if found := _locate(place, source, name):
        return found
    if pickle and (found := _locate(place, source, pickle)):
        raise RunError(_pickled(reward, found))
    raise RunError(f"reward '{reward}' has no {name} in '{source}'; {remedy(source, pickle or name, origin)}")


@dataclass(frozen=True)
class Weights:
    """What a reward reads: any one of the files `names` of a source; `pickle` and `origin` as in `find_file`.

    whole: whether all weights and settings beside that file are read with it.
    """

    source: str
    names: tuple[str, ...]
    pickle: str | None = None
    origin: str | None = None
    whole: bool = False

    def files(self) -> list[Path]:
        """Those of the files that are on this machine; none if they are not, or random weights stand for them."""
        place = Path(resolve_weights(self.source))
        if are_random():
            return []
        if place.is_file():
            return [place]
        found = next(filter(None, (_locate(place, self.source, name) for name in self.names)), None)
        if found is None or not self.whole:
            return [] if found is None else [found]
        return sorted(file for file in found.parent.iterdir() if file.suffix in (".safetensors", ".json", ".txt"))

    def missing(self) -> str | None:
        """What to do, if none of the files is on this machine; None if one is."""
        place = Path(resolve_weights(self.source))
        if are_random() or place.is_file() or any(_locate(place, self.source, name) for name in self.names):
            return None
        return remedy(self.source, self.pickle or self.names[0], self.origin)


def _locate(place: Path, source: str, name: str) -> Path | None:
    if (place / name).is_file():
        return place / name
    if place.is_dir() or source.startswith(EMBEDDED):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def remedy(source: str, name: str = "", origin: str | None = None) -> str:
    """What to do when weights are missing."""
    if source.startswith(EMBEDDED):
        return "rebuild it with 'flowbench testbed build'"
    fetch = f"get {name} from {origin}" if origin else f"fetch it with '{f'hf download {source} {name}'.strip()}'"
    if name.endswith(PICKLES):
        fetch += f" and convert it with 'flowbench rewards convert {name}'"
    mirror = os.environ.get("FLOWBENCH_WEIGHTS")
    below = f"put it into {Path(mirror) / source}" if mirror else "set FLOWBENCH_WEIGHTS to a folder that contains it"
    return f"{fetch}, {'then' if origin else 'or'} {below}"


def _pickled(reward: str, path: Path) -> str:
    return (
        f"reward '{reward}': '{path}' is a pickle, which flowbench does not load; convert it once with "
        f"'flowbench rewards convert {path}'"
    )


def read_tensors(reward: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises RunError, with the remedy, for a file in another format (a pickle can run code when it is loaded), broken, or
    with values that weights do not have.
    """
    if are_random():
        return {}
    if path.name.endswith(PICKLES):
        raise RunError(_pickled(reward, path))
    check_shipped(path)
    try:
        return tensors.read_tensors(path)
    except TensorError as error:
        raise RunError(f"reward '{reward}': '{path}' {error}; fetch it again") from error


def load_pretrained(reward: str, kind: Any, source: str) -> Any:
    """A transformers model (float32, frozen, every weight accounted for) or tokenizer from a folder or hub id.

    Raises RunError, with the remedy, when it is missing or does not fit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if are_random():
        from flowbench.scoring.random_models import random_pretrained

        return random_pretrained(reward, kind, source)
    place = resolve_weights(source)
    check_shipped(Path(place))
    is_model = hasattr(kind, "base_model_prefix") or kind.__name__.startswith("AutoModel")
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        for file in sorted(Path(place).glob("*.safetensors")) if is_model else ():
            tensors.check_dtypes(file)
        with quiet():
            loaded = kind.from_pretrained(place, **(options if is_model else {}))
    except TensorError as error:
        raise RunError(f"reward '{reward}': '{source}' {error}; fetch it again") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"reward '{reward}' cannot load '{source}': {brief(error)}; {remedy(source)}") from error
    if not is_model:
        return loaded
    model, info = loaded
    try:
        tensors.check_keys(info["missing_keys"], info["unexpected_keys"])
        if names := sorted(map(str, info["mismatched_keys"])):
            raise TensorError(f"has {len(names)} weights of another shape, such as {names[0]}")
        tensors.check_values(model.state_dict())
    except TensorError as error:
        raise RunError(f"reward '{reward}': '{source}' {error}; fetch it again") from error
    return model.eval().requires_grad_(False)


def load_strictly(
    reward: str, path: Path, module: nn.Module, weights: Mapping[str, torch.Tensor], unused: Collection[str] = ()
) -> None:
    """Fill a module; every weight must be in `weights` with its shape, but those `unused`, and nothing else may be.

    Raises RunError that names the first deviation.
    """
    if are_random():
        return
    try:
        tensors.fill(module, weights, unused)
    except TensorError as error:
        raise RunError(f"reward '{reward}': '{path}' {error}; is it another model's file?") from error


def read_json(reward: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises RunError for a file that is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"reward '{reward}': '{path}' is not JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise RunError(f"reward '{reward}': '{path}' holds no JSON object")
    return content


def convert(source: Path, target: Path) -> int:
    """Rewrite a checkpoint (.pt, .pth, .bin) as safetensors; returns the number of tensors.

    Read with `weights_only`, so that a pickle cannot run code. A checkpoint that keeps its weights under "state_dict",
    "model" or "module" is unwrapped.
    Raises UsageError for a target that is the source itself, or a source that is safetensors already; RunError for a
    file that is missing, or holds something else.
    """
    import pickle

    from safetensors.torch import save_file

    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"'{target}' is the checkpoint itself, which is never overwritten; name another file")
    if source.suffix == ".safetensors":
        raise UsageError(f"'{source}' is a safetensors file already; use it as it is")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"'{source}' does not exist") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise RunError(f"'{source}' is no checkpoint of plain tensors: {brief(error)}") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()) or not content:
        raise RunError(f"'{source}' is no checkpoint of plain tensors; there is nothing to convert")
    # Cloned, because tensors that share memory cannot be saved.
    tensors = {k: v.contiguous().clone() for k, v in content.items()}
    write_atomically(target, lambda place: save_file(tensors, place, metadata=_metadata(source)))
    return len(content)


def _metadata(source: Path) -> dict[str, str]:
    """What a file says beside its tensors, if it is safetensors under another name, which torch reads too."""
    try:
        return {"format": "pt", **tensors.read_metadata(source)}
    except TensorError:
        return {"format": "pt"}
