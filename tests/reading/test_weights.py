"""Weights are whole and those of their model, or refused with the first that is not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowbench.errors import RunError, UsageError
from flowbench.models.adapters import load_lora, lora_file
from flowbench.models.families import load_pipeline
from flowbench.models.loading import load_network
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.models.sources import source_sha256
from flowbench.reading.tensors import TensorError, read_tensors
from flowbench.scoring.checkpoints import convert
from flowbench.testbeds.shapes.weights import check_shipped, embedded_models, weights_folder, write_shipped_sums

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
NAN = float("nan")


def changed(tensors: Tensors, how: str, name: str) -> Tensors:
    """A file's tensors with one of them damaged."""
    value = tensors[name]
    if how == "missing":
        return {n: t for n, t in tensors.items() if n != name}
    if how == "renamed":
        return {(f"{n[:-1]}x" if n == name else n): t for n, t in tensors.items()}
    damaged = {
        "unexpected": lambda: {f"{name}_more": value.clone()},
        "nan": lambda: {name: value.index_fill(0, torch.tensor([0]), NAN)},
        "infinite": lambda: {name: value.index_fill(0, torch.tensor([0]), float("inf"))},
        "integers": lambda: {name: value.long()},
        "double": lambda: {name: value.double()},
        "shape": lambda: {name: value[:-1].clone()},
    }[how]()
    return {**tensors, **damaged}


DAMAGES = ("missing", "renamed", "unexpected", "nan", "infinite", "integers", "double", "shape")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of mini-sd3."""
    folder = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(weights_folder() / "mini-sd3", folder)
    return folder


@pytest.mark.parametrize(
    ("part", "how"), [*((part, how) for part in ("text_encoder", "vae") for how in DAMAGES), ("transformer", "missing")]
)
def test_no_network_of_a_pipeline_is_left_with_other_weights_than_its_files(how: str, part: str, copied: Path):
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModelWithProjection, "vae": AutoencoderKL, "transformer": SD3Transformer2DModel}
    folder = copied / part
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    tensors = load_file(str(file))
    name = sorted(n for n, t in tensors.items() if t.ndim >= 2)[0]
    save_file(changed(tensors, how, name), str(file), metadata={"format": "pt"})
    try:
        with pytest.raises(RunError, match=rf"{part}.*'") as raised:
            load_network(kinds[part], folder, torch.float32)
    finally:
        file.write_bytes(whole)
    assert "\n" not in str(raised.value)


def test_a_pipeline_that_lacks_a_weight_is_refused_by_model_part_and_weight(copied: Path):
    file = copied / "text_encoder" / "model.safetensors"
    whole = file.read_bytes()
    save_file(changed(load_file(str(file)), "missing", "text_projection.weight"), str(file), metadata={"format": "pt"})
    preset = load_preset("mini-sd3").model_copy(update={"source": str(copied)})
    try:
        with pytest.raises(RunError, match=r"model 'mini-sd3': '.*text_encoder' lacks 1 weight, such as 'text_proj"):
            load_pipeline(preset, CPU)
    finally:
        file.write_bytes(whole)


def test_shipped_files_are_as_they_were_shipped_to_the_last_bit(tmp_path: Path):
    for model in embedded_models():
        check_shipped(weights_folder() / model)
    home = tmp_path / "weights"
    (home / "mini").mkdir(parents=True)
    (home / "mini" / "w.safetensors").write_bytes(b"abc")
    write_shipped_sums(home)
    check_shipped(home / "mini" / "w.safetensors", home)
    check_shipped(tmp_path / "elsewhere", home)
    (home / "mini" / "w.safetensors").write_bytes(b"abb")
    with pytest.raises(RunError, match=r"w\.safetensors' is not the file that flowbench ships .*; install flowbench"):
        check_shipped(home / "mini", home)
    (home / "mini" / "w.safetensors").unlink()
    with pytest.raises(RunError, match=r"w\.safetensors' is missing"):
        check_shipped(home / "mini", home)


def test_a_models_hash_is_that_of_its_content_wherever_it_lies(copied: Path, tmp_path: Path):
    preset = load_preset("mini-sd3")
    there = preset.model_copy(update={"source": str(copied)})
    assert source_sha256(there) == source_sha256(preset)
    other = tmp_path / "other"
    shutil.copytree(copied, other)
    file = other / "transformer" / "config.json"
    file.write_text(file.read_text() + " ")
    assert source_sha256(preset.model_copy(update={"source": str(other)})) != source_sha256(preset)
    assert source_sha256(preset.model_copy(update={"source": str(tmp_path / "absent")})) is None
    assert source_sha256(load_preset("mixture")) == ""


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pipeline: Any, preset: ModelPreset) -> Path:
    """A LoRA of rank 4 and alpha 12 in diffusers' own form."""
    import copy

    torch.manual_seed(0)
    policy = Policy(copy.deepcopy(pipeline), preset, Tuning("lora", lora_rank=4, lora_alpha=12.0))
    for p in policy.trainable_parameters():
        p.data += 0.05 * torch.randn(p.shape)
    folder = tmp_path_factory.mktemp("saved")
    policy.save(folder)
    return folder


@pytest.fixture
def strength(pipeline: Any) -> Callable[[Path], float]:
    """The scaling with which a LoRA is computed with, after it was loaded and every tensor was found in the model."""
    import copy

    def scaling(path: Path) -> float:
        file, own = lora_file(path), copy.deepcopy(pipeline)
        assert file is not None
        load_lora(own, file, "tiny")
        (value,) = {s for m in own.transformer.modules() for s in getattr(m, "scaling", {}).values()}
        return float(value)

    return scaling


def peft_form(folder: Path, target: Path, **settings: Any) -> Path:
    """The same LoRA as peft saves it."""
    tensors = load_file(str(folder / "pytorch_lora_weights.safetensors"))
    named = {f"base_model.model.{name.removeprefix('transformer.')}": t for name, t in tensors.items()}
    target.mkdir(exist_ok=True)
    save_file(named, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_k"], "bias": "none"}
    layers = sorted({name.removeprefix("transformer.").split(".lora_")[0] for name in tensors})
    config |= {"target_modules": layers, **settings}
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_lora_has_the_strength_that_its_file_says(
    saved: Path, strength: Callable[[Path], float], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tensors = load_file(str(saved / "pytorch_lora_weights.safetensors"))
    assert strength(saved) == 3
    assert strength(peft_form(saved, tmp_path / "peft")) == 3
    assert strength(peft_form(saved, tmp_path / "stable", use_rslora=True)) == 6
    file = tmp_path / "old.safetensors"
    names = {n: n.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.") for n in tensors}
    alphas = {f"{n.split('.lora_')[0]}.alpha": torch.tensor(2.0) for n in tensors}
    save_file({**{names[n]: t for n, t in tensors.items()}, **alphas}, str(file))
    assert strength(file) == 0.5
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        save_file(tensors, str(file))
        assert strength(file) == 1
    assert "does not say its alpha; its rank is taken" in caplog.text


@pytest.mark.parametrize(
    ("how", "with_metadata"), [*((how, True) for how in DAMAGES), ("missing", False), ("shape", False)]
)
def test_a_lora_of_which_a_tensor_is_damaged_is_refused(
    how: str, with_metadata: bool, saved: Path, strength: Callable[[Path], float], tmp_path: Path
):
    from flowbench.reading.tensors import read_metadata

    whole = saved / "pytorch_lora_weights.safetensors"
    tensors = load_file(str(whole))
    name = sorted(tensors)[1]
    file = tmp_path / "damaged.safetensors"
    save_file(changed(tensors, how, name), str(file), metadata=read_metadata(whole) if with_metadata else None)
    with pytest.raises(RunError, match=r"LoRA '.*damaged.safetensors' does not fit model 'tiny': it ") as raised:
        strength(file)
    assert "\n" not in str(raised.value)


def test_a_lora_without_a_layer_that_its_settings_name_is_refused(
    saved: Path, strength: Callable[[Path], float], tmp_path: Path
):
    whole = saved / "pytorch_lora_weights.safetensors"
    tensors = load_file(str(whole))
    layer = sorted(tensors)[0].split(".lora_")[0]
    (peft_form(saved, tmp_path) / "adapter_model.safetensors").unlink()
    left = {f"base_model.model.{n.removeprefix('transformer.')}": t for n, t in tensors.items() if layer not in n}
    save_file(left, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(RunError, match=r"lacks 1 weight, such as '.*lora_A\.weight'"):
        strength(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=r"there is no adapter_config\.json beside it that says its alpha"):
        strength(tmp_path)
    for settings in ({"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"r": 8}, {"r": "many"}):
        with pytest.raises(RunError, match="does not fit model 'tiny'"):
            strength(peft_form(saved, tmp_path, **settings))


# --- conversion -------------------------------------------------------------------------------------------------------


def test_a_conversion_never_writes_over_its_input(tmp_path: Path):
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(2)}, str(file), metadata={"made": "by hand"})
    whole = file.read_bytes()
    (tmp_path / "linked.pt").symlink_to(file)
    for source, target in ((file, file), (tmp_path / "linked.pt", file), (file, tmp_path / "new.safetensors")):
        with pytest.raises(UsageError, match=r"never overwritten|is a safetensors file already"):
            convert(source, target)
    assert file.read_bytes() == whole
    (tmp_path / "x").write_bytes(whole[:-3])
    with pytest.raises(TensorError, match="is no safetensors file"):
        read_tensors(tmp_path / "x")
