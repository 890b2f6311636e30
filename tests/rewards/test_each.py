"""What is particular to each native reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, SIDE, loaded, pil, scramble, smooth_images

from flowbench.errors import RunError, UsageError
from flowbench.reward import checked_score
from flowbench.rewards.aesthetic import Aesthetic
from flowbench.rewards.clip import Clip
from flowbench.rewards.hpsv2 import HpsV2
from flowbench.rewards.imagereward import ImageReward
from flowbench.rewards.pickscore import PickScore
from flowbench.rewards.vqa import Vqa
from flowbench.scoring.towers.blip import BlipReward, official_tensors
from flowbench.scoring.towers.heads import Layers

PROMPTS = ("a red circle", "a photo of a cat", "on the left")

# --- hpsv2 --------------------------------------------------------------------------------------------------------


def test_hpsv2_is_the_cosine_of_the_padded_picture(hpsv2: HpsV2, hpsv2_folder: Path):
    """By hand: a tensor resized by torch alone, a black square, open_clip's model and tokenizer."""
    images = smooth_images(3, 40, 60)
    model = open_clip.create_model("tiny")
    model.load_state_dict(load_file(str(hpsv2_folder / "HPS_v2.1_compressed.safetensors")))
    squares = torch.zeros(3, 3, SIDE, SIDE)
    squares[:, :, 4:20] = torch.nn.functional.interpolate(images, (16, SIDE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        image = model.eval().encode_image((squares - mean) / std, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny")(list(PROMPTS)), normalize=True)
    assert torch.allclose(checked_score(hpsv2, images, PROMPTS), (image * text).sum(1), atol=1e-5)


def test_the_versions_of_hpsv2_are_different_files_and_never_mixed(hpsv2: HpsV2, hpsv2_folder: Path):
    images = smooth_images(3, SIDE, SIDE)
    old = loaded(HpsV2("v2.0", str(hpsv2_folder)))
    assert not torch.allclose(checked_score(old, images, PROMPTS), checked_score(hpsv2, images, PROMPTS), atol=1e-3)
    assert old.provenance()["version"] == "v2.0"
    with pytest.raises(UsageError, match=r"reward 'hpsv2' has no version 'v3'; there are: v2.0, v2.1"):
        HpsV2("v3")
    with pytest.raises(UsageError, match=r"HPS_v2_compressed.safetensors' is version v2.0; set version to v2.0"):
        HpsV2("v2.1", str(hpsv2_folder / "HPS_v2_compressed.safetensors"))
    direct = loaded(HpsV2("v2.0", str(hpsv2_folder / "HPS_v2_compressed.safetensors")))
    assert torch.equal(checked_score(direct, images, PROMPTS), checked_score(old, images, PROMPTS))


def test_hpsv2_of_another_architecture_is_refused(hpsv2: HpsV2, hpsv2_folder: Path, tmp_path: Path):
    tensors = load_file(str(hpsv2_folder / "HPS_v2.1_compressed.safetensors"))
    tensors["visual.conv1.weight"] = torch.zeros(32, 3, 4, 4)
    save_file(tensors, str(tmp_path / "HPS_v2.1_compressed.safetensors"))
    with pytest.raises(RunError, match=r"has weight 'visual.conv1.weight' of shape \(32, 3, 4, 4\); the model's is"):
        loaded(HpsV2("v2.1", str(tmp_path)))


# --- imagereward --------------------------------------------------------------------------------------------------


def test_the_official_networks_weights_are_accounted_for_by_name_and_shape():
    with torch.device("meta"):
        module = BlipReward()
    tensors = official_tensors(module)
    assert len(tensors) == 620
    for name, shape in {
        "blip.visual_encoder.cls_token": (1, 1, 1024),
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "blip.visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
        "blip.visual_encoder.blocks.0.mlp.fc1.bias": (4096,),
        "blip.visual_encoder.norm.weight": (1024,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
        "blip.text_encoder.encoder.layer.0.attention.output.LayerNorm.bias": (768,),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.weight": (1, 16),
    }.items():
        assert tuple(tensors[name].shape) == shape, name


@pytest.fixture
def changed_imagereward(imagereward_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(imagereward_folder, tmp_path / "changed"))


def edit(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Add, replace or (None) remove weights; "__" stands for a dot."""
    path = folder / "ImageReward.safetensors"
    content = load_file(str(path))
    for name, value in tensors.items():
        name = name.replace("__", ".")
        content.pop(name, None)
        if value is not None:
            content[name] = value
    save_file(content, str(path))
    return folder


def test_weights_of_blips_pretraining_are_left_out(imagereward: ImageReward, changed_imagereward: Path):
    unused = {
        "blip__vision_proj__weight": torch.zeros(4, 32),
        "blip__text_proj__bias": torch.zeros(4),
        "blip__text_encoder__embeddings__position_ids": torch.arange(40)[None],
    }
    images = smooth_images(3, SIDE, SIDE)
    scores = checked_score(loaded(ImageReward(str(edit(changed_imagereward, **unused)))), images, PROMPTS)
    assert torch.equal(scores, checked_score(imagereward, images, PROMPTS))


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"mlp__layers__0__bias": None}, "lacks 1 weight, such as 'head.layers.0.bias'"),
        ({"blip__visual_encoder__blocks__1__norm1__bias": None}, "lacks 1 weight, such as 'vision.encoder.layers.1"),
        ({"blip__surprise": torch.zeros(1)}, "has 1 weight that the model lacks, such as 'blip.surprise'"),
        ({"mlp__layers__2__weight": torch.zeros(1, 9)}, r"of shape \(1, 9\); the model's is \(1, 8\)"),
    ],
    ids=["head", "vision", "extra", "shape"],
)
def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(
    tensors: dict, complaint: str, changed_imagereward: Path
):
    with pytest.raises(RunError, match=complaint):
        loaded(ImageReward(str(edit(changed_imagereward, **tensors))))


def test_settings_that_would_silently_change_the_reward_do_change_it(
    imagereward: ImageReward, changed_imagereward: Path
):
    """Negative controls: a wrong number of text heads, or an attention to padding, is no rounding error."""
    images = smooth_images(3, SIDE, SIDE)
    right = checked_score(imagereward, images, PROMPTS)
    path = changed_imagereward / "imagereward_config.json"
    config = json.loads(path.read_text())
    config["text"]["num_attention_heads"] = 4
    path.write_text(json.dumps(config))
    wrong = checked_score(loaded(ImageReward(str(changed_imagereward))), images, PROMPTS)
    assert (right - wrong).abs().max() > 1e-3
    tokens = imagereward.tokenizer(list(PROMPTS), padding="max_length", max_length=35, return_tensors="pt")
    pixels = imagereward.preprocess(images)
    every = imagereward.model(pixels, tokens.input_ids, torch.ones_like(tokens.attention_mask))
    masked = imagereward.model(pixels, tokens.input_ids, tokens.attention_mask)
    assert (every - masked).abs().max() > 1e-3


def test_a_configuration_that_describes_no_network_is_named(changed_imagereward: Path):
    (changed_imagereward / "imagereward_config.json").write_text('{"visoin": {}}')
    with pytest.raises(RunError, match=r"imagereward_config.json' describes no network: .*visoin"):
        loaded(ImageReward(str(changed_imagereward)))


def test_the_score_is_normalised_by_the_authors_mean_and_deviation(imagereward: ImageReward):
    images = smooth_images(3, SIDE, SIDE)
    scores = checked_score(imagereward, images, PROMPTS)
    mean, std = imagereward.mean, imagereward.std
    assert (mean, std) == (0.16717362830052426, 1.0333394966054072)
    imagereward.mean, imagereward.std = 0.0, 1.0
    try:
        assert torch.allclose(checked_score(imagereward, images, PROMPTS), scores * std + mean, atol=1e-5)
    finally:
        imagereward.mean, imagereward.std = mean, std


# --- pickscore ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 24), (40, 61), (33, 30)], ids=str)
def test_pickscore_is_transformers_own_logit(pickscore: PickScore, size: tuple[int, int]):
    """By CLIPModel.forward and CLIPImageProcessor, as the authors score."""
    from transformers import CLIPImageProcessor

    images = smooth_images(3, *size)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor([pil(image) for image in images], return_tensors="pt").pixel_values
    tokens = pickscore.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = pickscore.model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    # transformers resizes with torchvision's 8-bit kernel where this takes PIL's: they differ in the last bit.
    tolerance = 1e-4 if size == (24, 24) else 0.02 * logits.std().item() + 0.02
    assert torch.allclose(checked_score(pickscore, images, PROMPTS), logits, atol=tolerance)


def test_a_pickscore_without_all_its_weights_is_refused(pickscore_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pickscore_folder, tmp_path / "changed"))
    content = load_file(str(folder / "model.safetensors"))
    content.pop("visual_projection.weight")
    save_file(content, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks 1 weight, such as 'visual_projection.weight'"):
        loaded(PickScore(str(folder)))


# --- aesthetic ----------------------------------------------------------------------------------------------------


def test_aesthetic_is_the_head_on_the_unit_embedding(aesthetic: Aesthetic, clip_folder: Path, head_file: Path):
    images = smooth_images(3, SIDE, SIDE)
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        x = model.encode_image((images - mean) / std)
    x = x / x.norm(dim=1, keepdim=True)
    weights = load_file(str(head_file))
    for place in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{place}.weight"].T + weights[f"layers.{place}.bias"]
    assert torch.allclose(checked_score(aesthetic, images, PROMPTS), x[:, 0], atol=1e-5)


def test_the_older_linear_head_fits_too(clip_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 1)
    save_file(linear.state_dict(), str(tmp_path / "linear.safetensors"))
    reward = loaded(Aesthetic(str(clip_folder), None, str(tmp_path / "linear.safetensors")))
    images = smooth_images(2, SIDE, SIDE)
    with torch.no_grad():
        expected = linear(reward.towers.embed_images(images))[:, 0]
    assert torch.allclose(checked_score(reward, images, PROMPTS[:2]), expected, atol=1e-6)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layers.0.weight": torch.zeros(1, 17), "layers.0.bias": torch.zeros(1)},
        {"layers.0.weight": torch.zeros(4, 16), "layers.0.bias": torch.zeros(4)},
        {"scale": torch.zeros(1)},
    ],
    ids=["width", "two-dimensional", "other"],
)
def test_a_head_that_does_not_fit_is_named(tensors: dict, clip_folder: Path, tmp_path: Path):
    save_file(tensors, str(tmp_path / "head.safetensors"))
    with pytest.raises(RunError, match=r"head.safetensors' holds no head for embeddings of width 16"):
        loaded(Aesthetic(str(clip_folder), None, str(tmp_path / "head.safetensors")))


def test_a_head_without_a_bias_is_named(clip_folder: Path, tmp_path: Path):
    tensors = Layers((16, 4, 1)).state_dict()
    tensors.pop("layers.1.bias")
    save_file(tensors, str(tmp_path / "head.safetensors"))
    with pytest.raises(RunError, match=r"lacks 1 weight, such as 'layers.1.bias'"):
        loaded(Aesthetic(str(clip_folder), None, str(tmp_path / "head.safetensors")))


@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "pickscore"])
def test_a_reward_says_which_prompts_it_cuts(name: str, request: pytest.FixtureRequest):
    made = request.getfixturevalue(name)
    assert not any(made.cuts(prompt) for prompt in PROMPTS)
    assert made.cuts("red " * 90)


# --- vqa ----------------------------------------------------------------------------------------------------------


def test_vqa_is_the_models_probability_of_yes_against_no(vqa: Vqa):
    images = smooth_images(1, SIDE, SIDE)
    text = f"<image> {vqa.question.format(prompt='a red circle')} "
    inputs = vqa.processor(text=[text], images=[pil(images[0])], return_tensors="pt")
    with torch.no_grad():
        logits = vqa.model(**inputs).logits[0, -1]
    ids = vqa.processor.tokenizer.convert_tokens_to_ids(["Yes", "yes", "No", "no"])
    odds = logits[ids].exp()
    expected = odds[:2].sum() / odds.sum()
    assert torch.allclose(checked_score(vqa, images, ("a red circle",))[0], expected, atol=1e-5)


def test_a_question_must_name_the_prompt():
    with pytest.raises(UsageError, match=r"the question 'Is it nice\?' has no \{prompt\} in it"):
        Vqa(question="Is it nice?")


# --- clip ---------------------------------------------------------------------------------------------------------


def test_clip_crops_where_hpsv2_pads(clip_folder: Path):
    wide = smooth_images(2, SIDE, 2 * SIDE)
    clip, hps = loaded(Clip(str(clip_folder))), loaded(HpsV2(model=str(clip_folder)))
    middle = wide[..., SIDE // 2 : SIDE // 2 + SIDE]
    assert torch.allclose(checked_score(clip, wide, PROMPTS[:2]), checked_score(clip, middle, PROMPTS[:2]), atol=1e-5)
    assert not torch.allclose(checked_score(hps, wide, PROMPTS[:2]), checked_score(clip, wide, PROMPTS[:2]), atol=1e-4)
    square = smooth_images(2, SIDE, SIDE)
    assert torch.allclose(checked_score(hps, square, PROMPTS[:2]), checked_score(clip, square, PROMPTS[:2]), atol=1e-6)


# --- at full size -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_official_hpsv2_architecture_loads_strictly_and_scores(tmp_path: Path):
    model = open_clip.create_model("ViT-H-14")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    assert len(tensors) == 686
    save_file(tensors, str(tmp_path / "HPS_v2.1_compressed.safetensors"))
    reward = loaded(HpsV2("v2.1", str(tmp_path)))
    images = smooth_images(2, 320, 200)
    with torch.no_grad():
        text = model.eval().encode_text(open_clip.get_tokenizer("ViT-H-14")(list(PROMPTS[:2])), normalize=True)
    assert torch.allclose(reward.towers.embed_prompts(PROMPTS[:2]), text, atol=1e-5)
    assert checked_score(reward, images, PROMPTS[:2]).abs().max() <= 1


@pytest.mark.slow
def test_the_official_imagereward_network_scores_and_passes_gradients(tmp_path: Path, imagereward_folder: Path):
    torch.manual_seed(0)
    save_file(official_tensors(scramble(BlipReward(), 1.0)), str(tmp_path / "ImageReward.safetensors"))
    reward = loaded(ImageReward(str(tmp_path), str(imagereward_folder)))
    images = smooth_images(1, 256, 256).requires_grad_()
    (gradient,) = torch.autograd.grad(checked_score(reward, images, PROMPTS[:1]).sum(), images)
    assert gradient.abs().sum() > 0
    assert reward.model.vision.config.layer_norm_eps == 1e-6
    assert reward.model.text.config.num_attention_heads == 12
    assert torch.device(reward.device) == CPU
