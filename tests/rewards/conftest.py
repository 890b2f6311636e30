"""Small, randomly initialised models of the real classes, saved in the real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import SIDE, loaded, scramble

from flowbench.reward import Reward
from flowbench.rewards.aesthetic import Aesthetic
from flowbench.rewards.hpsv2 import HpsV2
from flowbench.rewards.imagereward import ImageReward
from flowbench.rewards.pickscore import PickScore
from flowbench.rewards.vqa import Vqa
from flowbench.scoring.towers.blip import BlipReward, official_tensors
from flowbench.scoring.towers.heads import Layers
from flowbench.testbeds.shapes.weights import weights_folder

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 8}
WORDS = ["a", "photo", "of", "red", "blue", "circle", "square", "cat", "dog", "on", "the", "left", "[DEC]", "[ENC]"]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model in open_clip's own format."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    model = scramble(open_clip.CLIP(**CLIP_CONFIG))
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "open_clip_model.safetensors"))
    return folder


@pytest.fixture(scope="session")
def hpsv2_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of HPSv2's repository with both converted checkpoints, of the architecture "tiny"."""
    folder = tmp_path_factory.mktemp("HPSv2")
    (folder / "tiny.json").write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(folder / "tiny.json")
    for seed, name in enumerate(["HPS_v2_compressed", "HPS_v2.1_compressed"]):
        torch.manual_seed(seed)
        tensors = {
            k: v.contiguous() for k, v in scramble(open_clip.create_model("tiny"), 1 + seed / 4).state_dict().items()
        }
        save_file(tensors, str(folder / f"{name}.safetensors"))
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aesthetic head with the official file's names, for embeddings of width 16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.safetensors"
    save_file(Layers((16, 8, 6, 4, 3, 1), (0, 2, 4, 6, 7)).state_dict(), str(path))
    return path


@pytest.fixture(scope="session")
def imagereward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of another size with ImageReward's names, and BERT's tokenizer with a vocabulary of few words."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-imagereward")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    text = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40, "layer_norm_eps": 1e-12}
    config = {"vision": {**VISION, "layer_norm_eps": 1e-6}, "text": text, "head": [8, 1], "head_places": [0, 2]}
    (folder / "imagereward_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(official_tensors(scramble(BlipReward(**config))), str(folder / "ImageReward.safetensors"))
    return folder


@pytest.fixture(scope="session")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' CLIPModel with a CLIP tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("tiny-pickscore")
    tokenizer = AutoTokenizer.from_pretrained(weights_folder() / "mini-clip")
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    scramble(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("tiny-vqa")
    words = [
        "<unk>",
        "<image>",
        "Yes",
        "No",
        "Does",
        "this",
        "image",
        "show",
        "?",
        '"',
        "Answer",
        "yes",
        "or",
        "no",
        ".",
    ]
    words = list(dict.fromkeys([*words, *WORDS]))
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=1, vision_feature_layer=-1
    )
    scramble(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def hpsv2(hpsv2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> HpsV2:
    monkeypatch.setattr("flowbench.rewards.hpsv2.ARCHITECTURE", "tiny")
    return loaded(HpsV2("v2.1", str(hpsv2_folder)))


@pytest.fixture(scope="session")
def imagereward(imagereward_folder: Path) -> ImageReward:
    return loaded(ImageReward(str(imagereward_folder)))


@pytest.fixture(scope="session")
def pickscore(pickscore_folder: Path) -> PickScore:
    return loaded(PickScore(str(pickscore_folder)))


@pytest.fixture(scope="session")
def aesthetic(clip_folder: Path, head_file: Path) -> Aesthetic:
    return loaded(Aesthetic(str(clip_folder), None, str(head_file)))


@pytest.fixture(scope="session")
def vqa(vqa_folder: Path) -> Vqa:
    return loaded(Vqa(str(vqa_folder)))


@pytest.fixture(params=["hpsv2", "imagereward", "pickscore", "aesthetic", "vqa"])
def reward(request: pytest.FixtureRequest) -> Reward:
    """Each native reward in turn."""
    return request.getfixturevalue(request.param)
