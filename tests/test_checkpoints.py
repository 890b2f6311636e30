from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowbench.errors import RunError
from flowbench.scoring.checkpoints import convert, find_file, fingerprint, load_strictly, read_json, read_tensors


def linear(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def test_a_fingerprint_is_that_of_names_and_values():
    assert fingerprint(linear()) == fingerprint(linear())
    assert fingerprint(linear()) != fingerprint(linear(1))
    changed = linear()
    changed.weight.data[0, 0] += 1e-7
    assert fingerprint(changed) != fingerprint(linear())
    assert fingerprint(torch.nn.Sequential(linear())) != fingerprint(linear())


def test_every_weight_must_be_there_with_its_shape_and_no_other(tmp_path: Path):
    own, path = linear(), tmp_path / "x.safetensors"
    tensors = {k: v + 1 for k, v in own.state_dict().items()}
    for wrong, complaint in [
        ({"weight": tensors["weight"]}, "lacks 1 weight, such as 'bias'"),
        ({**tensors, "extra": torch.zeros(1)}, "has 1 weight that the model lacks, such as 'extra'"),
        ({**tensors, "bias": torch.zeros(3)}, r"has weight 'bias' of shape \(3,\); the model's is \(2,\)"),
        (
            {**tensors, "bias": torch.full((2,), torch.nan)},
            "values that are not finite in 1 weight, such as 'bias'",
        ),
        ({**tensors, "bias": torch.zeros(2, dtype=torch.int64)}, "has weight 'bias' of type torch.int64"),
        (
            {"weigth": tensors["weight"], "bias": tensors["bias"]},
            ".* 'weight', and has 1 .*'weigth'.*renamed",
        ),
    ]:
        before = fingerprint(own)
        with pytest.raises(RunError, match=rf"reward 'r': '.*x.safetensors'.*{complaint}"):
            load_strictly("r", path, own, wrong)
        assert fingerprint(own) == before
    load_strictly("r", path, own, {k: v.half() for k, v in tensors.items()})
    assert own.weight.dtype == torch.float32
    assert torch.allclose(own.weight, tensors["weight"], atol=1e-3)


def test_a_pickle_is_not_loaded_and_the_conversion_is_named(tmp_path: Path):
    torch.save(linear().state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        RunError, match=r"w.pt' is a pickle, .*; convert it once with 'flowbench rewards convert .*w.pt'"
    ):
        read_tensors("r", tmp_path / "w.pt")
    with pytest.raises(RunError, match="is a pickle, which flowbench does not load"):
        find_file("r", str(tmp_path), "w.safetensors", pickle="w.pt")


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not safetensors at all"], ids=["empty", "zeros", "text"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"reward 'r': '.*w.safetensors' is no safetensors file: .*; fetch it again"):
        read_tensors("r", tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"], ids=["broken", "list", "bytes"])
def test_a_configuration_that_is_no_json_object_is_named(content: str, tmp_path: Path):
    (tmp_path / "c.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"reward 'r': '.*c.json' (is not JSON|holds no JSON object)"):
        read_json("r", tmp_path / "c.json")


def test_a_file_is_found_by_itself_in_a_folder_and_below_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "owner" / "name" / "w.safetensors"
    place.parent.mkdir(parents=True)
    save_file(linear().state_dict(), str(place))
    assert find_file("r", str(place), "w.safetensors") == place
    assert find_file("r", str(place.parent), "w.safetensors") == place
    with pytest.raises(RunError, match=r"reward 'r' has no w.safetensors in 'owner/name'; fetch it with 'hf download"):
        find_file("r", "owner/name", "w.safetensors")
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(tmp_path))
    assert find_file("r", "owner/name", "w.safetensors") == place


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "module"])
def test_a_converted_checkpoint_holds_the_same_tensors(wrapped: str | None, tmp_path: Path):
    state: dict[str, Any] = dict(linear().state_dict())
    state["view"] = state["weight"][:, :2]  # shares memory, which safetensors would refuse
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "w.pt")
    assert convert(tmp_path / "w.pt", tmp_path / "out" / "w.safetensors") == 3
    read = load_file(str(tmp_path / "out" / "w.safetensors"))
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["w.safetensors"]


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("trap-was-sprung"),))


def test_conversion_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("w.pt", "plain.pt"):
        with pytest.raises(RunError, match="is no checkpoint of plain tensors"):
            convert(tmp_path / name, tmp_path / "w.safetensors")
    assert not (tmp_path / "trap-was-sprung").exists()
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1, 2], {"state_dict": {"a": "text"}}], ids=str)
def test_what_holds_no_weights_is_not_converted(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RunError, match="is no checkpoint of plain tensors; there is nothing to convert"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"absent.pt' does not exist"):
        convert(tmp_path / "absent.pt", tmp_path / "w.safetensors")
