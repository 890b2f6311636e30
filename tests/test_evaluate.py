"""`flowbench evaluate` on what is no run: LoRA, transformer, pipeline, images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.errors import RunError, UsageError
from flowbench.experiments.reevaluate import Evaluation
from flowbench.experiments.reevaluate import evaluate as evaluate_path
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import load_preset
from flowbench.testbeds.shapes.world import parse, render, sample_scenes

PROTOCOL = {"evaluation.prompts": 3, "evaluation.images_per_prompt": 2, "evaluation.splits": ["test"]}


def evaluate(path: Path, preset_file: str, **overrides: Any) -> Evaluation:
    changed = {f"evaluation.{name}": value for name, value in overrides.items()}
    return evaluate_path(path, {**PROTOCOL, **changed}, preset_file, "cpu", lambda done, total: None)


def perturb(policy: Policy, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in policy.trainable_parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, pipeline: Any, preset: Any) -> Path:
    import copy

    torch.manual_seed(0)
    policy = Policy(copy.deepcopy(pipeline), preset, Tuning("lora", lora_rank=4))
    perturb(policy, 0.05)
    folder = tmp_path_factory.mktemp("lora")
    policy.save(folder)
    return folder


def test_a_lora_is_scored_against_its_base(lora: Path, preset_file: str):
    result = evaluate(lora, preset_file)
    assert set(result.scores) >= {"clip/test", "oracle_exact/test", "w2/test", "diversity/test"}
    assert result.scores["w2/test"].base == 0
    assert result.scores["w2/test"].tuned > 0
    assert result.held_out == tuple(sorted(load_preset("mini-sd3").rewards))
    assert result.trained_on is None
    file = evaluate(next(lora.glob("*.safetensors")), preset_file)
    assert file.scores == result.scores


def test_a_transformer_folder_with_the_bases_weights_scores_as_the_base(
    tmp_path: Path, make_policy: Callable, preset_file
):
    make_policy().save(tmp_path / "same")
    for folder in (tmp_path / "same", tmp_path / "same" / "transformer"):
        scores = evaluate(folder, preset_file).scores
        assert scores["w2/test"].tuned == 0
        assert scores["clip/test"].base == scores["clip/test"].tuned


def test_a_pipeline_is_scored_whole_and_without_a_distance_of_velocities(
    tmp_path: Path, make_policy: Callable[..., Policy], preset_file: str
):
    policy = make_policy()
    policy.pipeline.vae.decoder.conv_out.bias.data += 0.2  # a change that no transformer weights would show
    policy.pipeline.save_pretrained(tmp_path / "pipeline")
    scores = evaluate(tmp_path / "pipeline", preset_file).scores
    assert not any(name.startswith("w2") for name in scores)
    assert scores["diversity/test"].base == pytest.approx(scores["diversity/test"].tuned, rel=1e-5)
    assert scores["clip/test"].base != scores["clip/test"].tuned


def test_weights_that_do_not_fit_are_named(tmp_path: Path, lora: Path, preset_file: str):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors")
    with pytest.raises(RunError, match=r"LoRA '.*broken.safetensors' does not fit model 'tiny'"):
        evaluate(broken, preset_file)
    (file,) = lora.glob("*.safetensors")
    text = tmp_path / "text.safetensors"
    save_file({"text_encoder." + k: v for k, v in load_file(str(file)).items()}, str(text))
    with pytest.raises(RunError, match="also changes the text encoders"):
        evaluate(text, preset_file)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(RunError, match="is no transformer of model 'tiny'"):
        evaluate(tmp_path, preset_file)


def test_an_empty_folder_is_nothing_to_score(tmp_path: Path, preset_file: str):
    with pytest.raises(UsageError, match="is no run folder, LoRA, diffusers folder, or folder of images with"):
        evaluate(tmp_path, preset_file)
    with pytest.raises(UsageError, match=r"cannot change 'training\.images'"):
        evaluate_path(tmp_path, {"training.images": 3}, preset_file, "cpu", lambda done, total: None)


# --- images -------------------------------------------------------------------------------------------------------

CAPTIONS = ("a red circle", "three green crosses")


def gallery(folder: Path, per_prompt: int = 2, table: str = "tsv") -> list[tuple[str, str]]:
    """Rendered scenes of each caption, right ones, with their prompts in a file."""
    captions = [parse(text) for text in CAPTIONS for _ in range(per_prompt)]
    pixels = (render(sample_scenes(captions, np.random.default_rng(0))) * 255).round().astype(np.uint8)
    lines = []
    for i, (caption, image) in enumerate(zip(captions, pixels, strict=True)):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
        lines.append((f"{i}.png", caption.text))
    if table == "tsv":
        text = "".join(f"{name}\t{prompt}\n" for name, prompt in lines)
    else:
        text = "".join(json.dumps({"file": name, "prompt": prompt}) + "\n" for name, prompt in lines)
    (folder / f"prompts.{table}").write_text(text, encoding="utf-8")
    return lines


@pytest.mark.parametrize("table", ["tsv", "jsonl"])
def test_rendered_truth_in_a_folder_is_found_right_by_the_oracle(table: str, tmp_path: Path, preset_file: str):
    gallery(tmp_path, table=table)
    result = evaluate(tmp_path, preset_file)
    assert result.images["oracle_exact"].mean == 1.0
    assert set(result.images) == {"oracle_exact", "oracle_soft", *load_preset("mini-sd3").rewards}
    assert result.images["clip"].prompts == 2
    assert result.images["clip"].images == 4


def test_a_prompt_counts_once_however_many_images_it_has(tmp_path: Path, preset_file: str):
    gallery(tmp_path)
    both = evaluate(tmp_path, preset_file).images["clip"].mean
    (tmp_path / "prompts.tsv").write_text(
        "0.png\ta red circle\n2.png\tthree green crosses\n3.png\tthree green crosses\n"
    )
    (tmp_path / "1.png").unlink()
    few = evaluate(tmp_path, preset_file).images["clip"]
    first, rest = (evaluate_one(tmp_path, preset_file, names) for names in (["0.png"], ["2.png", "3.png"]))
    assert few.mean == pytest.approx((first + rest) / 2, abs=1e-6)
    assert few.mean != both


def evaluate_one(folder: Path, preset_file: str, names: list[str]) -> float:
    """CLIP's mean over some images of a gallery, from a folder of their own."""
    other = folder / f"only-{len(names)}"
    other.mkdir()
    prompts = dict(line.split("\t") for line in (folder / "prompts.tsv").read_text().splitlines())
    for name in names:
        (other / name).write_bytes((folder / name).read_bytes())
    (other / "prompts.tsv").write_text("".join(f"{n}\t{prompts[n]}\n" for n in names))
    return evaluate(other, preset_file).images["clip"].mean


def test_images_of_several_sizes_are_scored_without_the_oracle(tmp_path: Path, preset_file: str):
    gallery(tmp_path)
    with Image.open(tmp_path / "0.png") as image:
        large = image.resize((48, 80))
    large.save(tmp_path / "0.png")
    assert evaluate(tmp_path, preset_file, judges=["clip"]).images["clip"].images == 4
    with pytest.raises(
        RunError, match=r"the oracle reads images of shape .*; name other judges with evaluation.judges"
    ):
        evaluate(tmp_path, preset_file)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("0.png a red circle\n", r"prompts.tsv line 1 is not 'file<TAB>prompt'"),
        ("0.png\t \n", r"line 1: the prompt is empty"),
        ("absent.png\ta red circle\n", r"line 1: there is no image 'absent.png' in the folder"),
        ("../x.png\ta red circle\n", r"there is no image '../x.png' in the folder"),
        ("0.png\ta\n0.png\tb\n", r"line 2: '0.png' is listed twice"),
        ("\n", r"lists no image"),
        ("0.png\ta red circle\n", r"has no prompt for 3 images in the folder, such as '1.png'"),
    ],
)
def test_a_wrong_table_of_prompts_is_one_line(content: str, complaint: str, tmp_path: Path, preset_file: str):
    folder = tmp_path / "images"
    folder.mkdir()
    gallery(folder)
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    (folder / "prompts.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=complaint) as raised:
        evaluate(folder, preset_file)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"file": "0.png"}', '{"file": 1, "prompt": "a"}'])
def test_a_wrong_line_of_json_is_named(content: str, tmp_path: Path, preset_file: str):
    (tmp_path / "prompts.jsonl").write_text(content + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"prompts.jsonl line 1 (is not|has no prompt)"):
        evaluate(tmp_path, preset_file)


def test_a_file_that_is_no_image_is_named(tmp_path: Path, preset_file: str):
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "prompts.tsv").write_text("0.png\ta red circle\n")
    with pytest.raises(RunError, match=r"0.png' cannot be read as an image"):
        evaluate(tmp_path, preset_file)
