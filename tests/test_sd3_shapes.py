"""SD3's real component types at reduced width: the same classes load, sample, tune and save them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from tiny_pipelines import SIDE, sd3
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flowbench.config import EvaluationConfig, resolve_config
from flowbench.errors import RunError
from flowbench.evaluation.judges import build_reward
from flowbench.evaluation.protocol import Judges, count_images, score_split
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.families import load_pipeline
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split
from flowbench.registry import algorithms
from flowbench.reward import Reward
from flowbench.rewards.clip import Clip
from flowbench.training.trainer import IterationLog, Trainer

HUB_ID = "stabilityai/stable-diffusion-3-medium-diffusers"
PROMPTS = ["a photo of a red bench", "a photo of two cats"]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for FLOWBENCH_WEIGHTS: the hub's file layout below the hub's id."""
    root = tmp_path_factory.mktemp("weights")
    folder = root / HUB_ID
    pipeline = sd3()
    pipeline.save_pretrained(folder)
    # The hub's folder has T5 in two shards, the tokenizers in CLIP's own two files, and this name of T5's class.
    pipeline.text_encoder_3.save_pretrained(folder / "text_encoder_3", max_shard_size="20KB")
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    for name in ("tokenizer", "tokenizer_2"):
        content = json.loads((folder / name / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
        (folder / name / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / name / "tokenizer.json").unlink()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip ViT: its configuration by name, and its weights as open_clip's own training writes them."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"width": 32, "layers": 2}
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 16, **tower},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **tower},
    }
    (folder / "ViT-tiny-8-32.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    model = open_clip.create_model("ViT-tiny-8-32", load_weights=False)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "weights.pt")
    return folder


@pytest.fixture
def write_preset(
    tmp_path: Path, mirror: Path, clip_files: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes sd3-medium's own preset with small images, few steps and the tiny CLIP, and what else is given."""
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(mirror))
    return lambda **changed: written_preset(tmp_path / "tiny-sd3.yaml", clip_files, changed)


@pytest.fixture
def preset_file(write_preset: Callable[..., Path]) -> Path:
    return write_preset()


def written_preset(path: Path, clip_files: Path, changed: dict[str, Any]) -> Path:
    content = load_preset("sd3-medium").model_dump(exclude={"name"})
    assert content["source"] == HUB_ID
    content |= {"resolution": SIDE, "num_steps": 3, "max_sequence_length": 24, **changed}
    content["rewards"] = {"clip": {"model": "ViT-tiny-8-32", "pretrained": str(clip_files / "weights.pt")}}
    small = {"images": 8, "prompts_per_iteration": 2, "images_per_prompt": 2, "lora_rank": 4, "lora_alpha": 8.0}
    content["training"] |= small
    content["evaluation"] = {"prompts": 2, "images_per_prompt": 2, "num_steps": 3}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def policy_of(preset_file: Path, kind: str) -> Policy:
    preset, cpu = load_preset(str(preset_file)), torch.device("cpu")
    torch.manual_seed(2)
    return Policy(load_pipeline(preset, cpu), preset, Tuning(kind, 4, 8.0))


def moved(policy: Policy) -> Policy:
    """The policy with its trainable weights changed."""
    for p in policy.trainable_parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    return policy


class Shade(Reward):
    info = type("Info", (), {"name": "shade", "truth": False})

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mean((1, 2, 3))


# --- the claims -------------------------------------------------------------------------------------------------------


def test_the_preset_file_loads_sd3s_real_component_types(preset_file: Path) -> None:
    parts = load_pipeline(load_preset(str(preset_file)), torch.device("cpu")).components
    assert {name: type(part) for name, part in parts.items() if part is not None} == {
        "transformer": SD3Transformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder_3": T5EncoderModel,
        "tokenizer_3": T5TokenizerFast,
    }


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_guided_ode_rollout_equals_the_plain_pipelines_output(preset_file: Path, mirror: Path, tuning: str) -> None:
    policy = policy_of(preset_file, tuning)
    noise = policy.draw_noise(2)
    ours = policy.rollout(policy.encode(PROMPTS), noise).x0
    plain = StableDiffusion3Pipeline.from_pretrained(mirror / HUB_ID)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        guidance_scale=policy.preset.guidance_scale,
        max_sequence_length=24,
        latents=noise,
        output_type="latent",
    ).images
    assert policy.preset.guidance_scale > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_evaluation_scores_with_the_models_guidance_and_without(preset_file: Path) -> None:
    policy, split = moved(policy_of(preset_file, "lora")), load_split("objects", "test")

    def score(weights: str = "current", **settings: object) -> dict[str, list[float]]:
        config = EvaluationConfig(prompts=2, images_per_prompt=2, num_steps=2, **settings)
        done: list[int] = []
        scores = score_split(policy, weights, split, Judges({"shade": Shade()}, oracle=False), config, done.append)
        assert sum(done) == count_images(policy, [split], config)
        assert scores.grid.shape[0] == 2
        return {name: values.tolist() for name, values in scores.scores.items()}

    both, own, none = score(), score(unguided=False), score(guidance_scale=1.0)
    assert set(own) == set(none) == {"shade", "diversity", "w2"}
    assert both == {**own, **{f"{name}@1": values for name, values in none.items()}}
    assert both["shade"] != both["shade@1"]
    assert both["diversity"] != both["diversity@1"]
    assert score("reference")["shade@1"] != both["shade@1"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_view_of_a_tuned_policy_equals_the_base(preset_file: Path, tuning: str) -> None:
    base = policy_of(preset_file, "full")
    policy = moved(policy_of(preset_file, tuning))
    x, sigma = policy.draw_noise(2), torch.tensor([0.9, 0.4])
    expected = base.velocity(x, sigma, base.encode(PROMPTS))
    cond = policy.encode(PROMPTS)
    assert torch.equal(policy.velocity(x, sigma, cond, "reference"), expected)
    assert not torch.allclose(policy.velocity(x, sigma, cond), expected)
    assert policy.velocity(x, sigma, cond).requires_grad


@pytest.mark.parametrize("algorithm", ["acflow", "ddpo", "orw-cfm-w2", "refl"])
def test_a_lora_run_finishes_with_a_record_and_weights_that_diffusers_reads(
    preset_file: Path, mirror: Path, tmp_path: Path, flowbench_main: Callable[..., int], algorithm: str
) -> None:
    extra = ["--set", "algorithm.warmup=1"] if algorithm == "acflow" else []
    output = tmp_path / "runs"
    # The algorithms' own defaults for models like this one win over those of its file.
    extra += [
        part for name in ("prompts_per_iteration", "images_per_prompt") for part in ("--set", f"training.{name}=2")
    ]
    command = ["run", algorithm, "--model", str(preset_file), "--device", "cpu", "--output", str(output), *extra]
    assert flowbench_main(*command) == 0
    (path,) = output.glob(f"tiny-sd3/clip/{algorithm}/*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["config"]["training"]["tuning"] == "lora"
    assert record["budget"]["images"] == 8
    metrics = {"clip", "w2", "diversity"}
    assert {name.split("/")[0] for name in record["scores"]} == metrics | {f"{metric}@1" for metric in metrics}
    assert set(record["scores"]) >= {"clip/test", "clip@1/test", "clip/compositional", "clip@1/compositional"}
    call = json.loads((path.parent / "checkpoints/tuned/pipeline_call.json").read_text(encoding="utf-8"))
    expected = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 4.5}
    assert call == {**expected, "max_sequence_length": 24}
    assert (path.parent / "DONE").exists()

    plain = StableDiffusion3Pipeline.from_pretrained(mirror / HUB_ID)
    plain.load_lora_weights(path.parent / "checkpoints" / "tuned")
    factors = [p for n, p in plain.transformer.named_parameters() if "lora_B" in n]
    assert len(factors) > 0
    assert any(p.abs().max() > 0 for p in factors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("algorithm", ["acflow", "flow-grpo", "nft", "refl"])
def test_a_lora_run_finishes_in_half_precision_on_the_gpu(
    preset_file: Path, tmp_path: Path, flowbench_main: Callable[..., int], algorithm: str
) -> None:
    """With the preset's own dtype and gradient checkpointing; the text encoders leave the GPU before training."""
    assert load_preset(str(preset_file)).dtype in ("bfloat16", "float16")
    extra = ["--set", "algorithm.warmup=1"] if algorithm == "acflow" else []
    command = ["run", algorithm, "--model", str(preset_file), "--device", "cuda", "--output", str(tmp_path / "runs")]
    assert flowbench_main(*command, *extra) == 0
    (path,) = (tmp_path / "runs").glob(f"tiny-sd3/clip/{algorithm}/*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["device"] == torch.cuda.get_device_name()
    assert record["scores"]["w2/test"]["tuned"] > 0


def test_the_saved_lora_weights_give_plain_diffusers_the_tuned_velocity(
    preset_file: Path, mirror: Path, tmp_path: Path
) -> None:
    policy = moved(policy_of(preset_file, "lora"))
    policy.save(tmp_path / "tuned")
    plain = StableDiffusion3Pipeline.from_pretrained(mirror / HUB_ID)
    plain.load_lora_weights(tmp_path / "tuned")
    x, cond = policy.draw_noise(2), policy.encode(PROMPTS)
    with torch.no_grad():
        theirs = plain.transformer(x, *cond.rows().values(), timestep=torch.full((2,), 500.0), return_dict=False)[0]
        ours = policy.velocity(x, torch.full((2,), 0.5), cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_part_of_the_pipeline_goes_to_the_policys_device(preset_file: Path) -> None:
    preset, meta = load_preset(str(preset_file)), torch.device("meta")
    policy = Policy(load_pipeline(preset, torch.device("cpu")), preset, Tuning("lora", 4, 8.0), meta)
    modules = [part for part in policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 5
    assert {p.device for module in modules for p in module.parameters()} == {meta}


def test_float32_lora_weights_train_beside_a_half_precision_base(preset_file: Path, mirror: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(mirror / HUB_ID, dtype=torch.bfloat16)
    policy = Policy(pipeline, load_preset(str(preset_file)), Tuning("lora", 4, 8.0), gradient_checkpointing=True)
    cond = policy.encode(PROMPTS)
    x0 = policy.rollout(cond, policy.draw_noise(2)).x0
    v = policy.velocity(x0, policy.draw_sigmas(2), cond)
    assert v.dtype == x0.dtype == policy.decode(x0).dtype == torch.float32
    assert policy.model_dtype == torch.bfloat16
    velocity_error(v, x0).mean().backward()
    gradients = [p.grad for p in policy.trainable_parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("algorithm", algorithms.names())
def test_every_algorithm_trains_a_lora_in_half_precision_beside_t5(
    write_preset: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    path = write_preset(cpu_dtype="bfloat16", num_steps=2, resolution=32)
    fields, training = algorithms.get(algorithm).cls.Config.model_fields, {"images": 4, "prompts_per_iteration": 2}
    training |= {"num_steps": 2, "images_per_prompt": 2, "minibatch": 4, "microbatch": 2, "auxiliary_steps": 1}
    few = {"warmup": 0, "states_per_image": 1, "states_per_pair": 1, "steps": 2}
    overrides = {f"training.{name}": value for name, value in training.items()}
    overrides |= {f"algorithm.{name}": value for name, value in few.items() if name in fields}
    config = resolve_config(algorithm, "clip", str(path), overrides=overrides, device="cpu")
    preset, cpu = load_preset(str(path)), torch.device("cpu")
    assert preset.has_t5
    assert config.training.tuning == "lora"
    reward, policy = build_reward("clip", preset, cpu), build_policy(config, preset, cpu)
    assert {p.dtype for p in policy.transformer.parameters()} == {torch.bfloat16, torch.float32}
    assert policy.model_dtype == torch.bfloat16
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    logs: list[IterationLog] = []
    prompts = load_split("objects", "train").prompts[:4]
    Trainer(config, policy, build_algorithm(config, reward), reward, prompts, tmp_path, logs.append).run()
    assert [log.images for log in logs] == [4]
    assert all(math.isfinite(value) for value in (logs[0].reward, *logs[0].metrics.values()))
    changed = [not torch.equal(p, b) for p, b in zip(policy.trainable_parameters(), before, strict=True)]
    assert sum(changed) >= len(changed) / 2  # of a factor whose partner is zero there is no gradient yet


def test_a_run_of_images_that_are_no_squares_is_trained_evaluated_and_sampled(
    write_preset: Callable[..., Path], tmp_path: Path, flowbench_main: Callable[..., int]
) -> None:
    path = write_preset(resolution=[SIDE, SIDE + 32], num_steps=2)
    command = ["run", "refl", "--model", str(path), "--device", "cpu", "--output", str(tmp_path / "runs")]
    assert flowbench_main(*command, "--set", "evaluation.splits=[test]", "--set", "evaluation.num_steps=2") == 0
    (record,) = (tmp_path / "runs").rglob("record.json")
    call = json.loads((record.parent / "checkpoints/tuned/pipeline_call.json").read_text(encoding="utf-8"))
    assert (call["height"], call["width"]) == (SIDE, SIDE + 32)
    drawn = tmp_path / "drawn.png"
    assert flowbench_main("sample", record.parent, PROMPTS[0], "--images", "1", "--output", drawn) == 0
    assert drawn.is_file()


@pytest.mark.parametrize("model", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_gated_weights_are_one_line_with_the_licences_page_and_what_to_do(
    model: str, tmp_path: Path, flowbench_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = load_preset(model).source

    def refused(*arguments: object, **settings: object) -> None:
        error = GatedRepoError.__new__(GatedRepoError)  # its constructor wants the hub's response
        OSError.__init__(error, f"403 Client Error. Access to model {source} is restricted.\nPlease log in.")
        raise error

    monkeypatch.setattr(DiffusionPipeline, "download", refused)
    command = ["run", "orw-cfm-w2", "--reward", "jpeg", "--model", model, "--device", "cpu", "--output", tmp_path]
    assert flowbench_main(*command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in (model, f"https://huggingface.co/{source}", "hf auth login", f"hf download {source}", "--model FOLDER"):
        assert part in line


def test_missing_weights_are_one_line_with_the_remedy_and_exit_code_1(
    tmp_path: Path, flowbench_main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for constants in ("huggingface_hub.constants", "diffusers.utils.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["run", "orw-cfm-w2", "--reward", "jpeg", "--model", "sd3-medium", "--device", "cpu"]
    assert flowbench_main(*command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "sd3-medium" in line
    assert f"hf download {HUB_ID}" in line
    assert "FLOWBENCH_WEIGHTS" in line


# --- the clip reward on an open_clip checkpoint -----------------------------------------------------------------------


def test_the_clip_reward_equals_open_clips_own_preprocessing_and_encoding(clip_files: Path) -> None:
    weights = str(clip_files / "weights.pt")
    reward = Clip("ViT-tiny-8-32", weights)
    reward.load(torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    ours = reward.score(pixels / 255, tuple(PROMPTS))

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-tiny-8-32", pretrained=weights)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("ViT-tiny-8-32")(PROMPTS), normalize=True)
    torch.testing.assert_close(ours, (image * text).sum(1))


def test_a_tags_hub_repository_is_read_below_flowbench_weights(
    clip_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    folder.mkdir(parents=True)
    config = {"model_cfg": json.loads((clip_files / "ViT-tiny-8-32.json").read_text(encoding="utf-8"))}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(tmp_path))
    reward = Clip("ViT-H-14", "laion2b_s32b_b79k")
    with pytest.raises(RunError, match=r"cannot load the weights of 'ViT-H-14'.*hf download laion/CLIP-ViT-H-14"):
        reward.load(torch.device("cpu"))
    weights = torch.load(clip_files / "weights.pt", weights_only=True)["state_dict"]
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    reward.load(torch.device("cpu"))
    assert torch.equal(reward.towers.model.visual.proj, weights["visual.proj"])


def test_the_clip_reward_sends_gradients_to_the_pixels_of_larger_images(clip_files: Path) -> None:
    reward = Clip("ViT-tiny-8-32", str(clip_files / "weights.pt"))
    reward.load(torch.device("cpu"))
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).requires_grad_()
    reward.score(images, tuple(PROMPTS)).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().flatten(1).sum(1) > 0).all()
