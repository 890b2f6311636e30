from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowbench.services import parity
from flowbench.services.parity import Finding


def test_convert_writes_safetensors_beside_the_checkpoint(
    flowbench_main: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, tmp_path / "w.pt")
    assert flowbench_main("rewards", "convert", tmp_path / "w.pt") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'w.safetensors'}: 1 tensors\n"
    assert torch.equal(load_file(str(tmp_path / "w.safetensors"))["w"], torch.arange(3.0))
    assert flowbench_main("rewards", "convert", tmp_path / "absent.pt") == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "code"), [(1e-7, 0), (1e-3, 1)])
def test_parity_prints_and_writes_its_table_and_ends_with_the_verdict(
    flowbench_main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    difference: float,
    code: int,
):
    findings = [Finding("scores, 224 x 224", difference, 1e-6), Finding("prompts swapped", 1.0, 1e-5, control=True)]
    monkeypatch.setattr(parity, "compare", lambda *args, **kwargs: findings)
    assert flowbench_main("rewards", "parity", "hpsv2", "--output", tmp_path / "table.md") == code
    printed = capsys.readouterr()
    assert "control: prompts swapped" in printed.out
    assert ("differ by 1.0e-03" in printed.err) == bool(code)
    assert len((tmp_path / "table.md").read_text(encoding="utf-8").splitlines()) == 4


def test_the_commands_refuse_what_they_do_not_know(
    flowbench_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    for arguments, complaint in (
        (["parity", "hpsv"], "did you mean 'hpsv2"),
        (["parity", "jpeg"], "has no package to be compared with"),
        (["parity", "hpsv2", "--reduced", "--weights", "w"], "not both"),
        (["install", "imagerewrd"], "did you mean 'imagereward"),
        (["serve", "jpg"], "did you mean 'jpeg'"),
        (["serve", "jpeg", "--model", "mini"], "unknown model"),
        (["serve", "jpeg", "--port", "70000"], "--port"),
        (["instal"], "No such command"),
    ):
        assert flowbench_main("rewards", *arguments) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
