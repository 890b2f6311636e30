from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbench.training.state import load_state, save_state


def test_a_tree_comes_back_bit_for_bit(tmp_path: Path):
    tree = {
        "half": torch.randn(3, 2).bfloat16(),
        "nested": [{"a": torch.arange(4)}, [torch.tensor(1e-45), 0.1 + 0.2, None, True, "text"]],
        7: {"integer keys": torch.empty(0, 3)},
        "empty": {"dict": {}, "list": []},
    }
    save_state(tmp_path / "state.safetensors", tree)
    back = load_state(tmp_path / "state.safetensors")
    assert list(back) == list(tree)
    assert_identical(back["half"], tree["half"])
    assert_identical(back["nested"][0]["a"], tree["nested"][0]["a"])
    assert_identical(back["nested"][1][0], tree["nested"][1][0])
    assert back["nested"][1][1:] == [0.1 + 0.2, None, True, "text"]
    assert_identical(back[7]["integer keys"], tree[7]["integer keys"])
    assert back["empty"] == {"dict": {}, "list": []}


def test_an_optimizer_continues_bit_for_bit_from_its_saved_state(tmp_path: Path):
    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer, range(5))
    save_state(tmp_path / "s", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(5, 10))

    resumed, resumed_optimizer = start()
    state = load_state(tmp_path / "s")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    for key, value in resumed_optimizer.state_dict()["state"][0].items():
        assert_identical(value, state["optimizer"]["state"][0][key])
    train(resumed, resumed_optimizer, range(5, 10))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_identical(a, b)


def test_views_of_one_memory_are_saved_apart(tmp_path: Path):
    base = torch.arange(6.0)
    save_state(tmp_path / "s", [base[:3], base[3:], base.view(2, 3).T])
    first, second, transposed = load_state(tmp_path / "s")
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4, 5]
    assert transposed.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_save_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s"
    save_state(path, {"value": torch.ones(2)})

    def full_disk(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowbench.training.state.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"value": torch.zeros(2)})
    assert load_state(path)["value"].tolist() == [1, 1]


def test_a_missing_state_is_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "absent")


def assert_identical(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a, b)
