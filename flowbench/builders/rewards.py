"""Stage 5: small counterparts of the real preference models, trained on the choices of simulated annotators.

Each has the classes and the file format of the real one: `hpsv2` is open_clip's CLIP fine-tuned on choices, `pickscore`
transformers' CLIP with a softmax over two pictures, `imagereward` BLIP with cross-attention and a ranking loss,
`aesthetic` a head on the embedding of mini-clip. Their annotators and captions differ, so that they agree in part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from flowbench.builders.clip import clip_config, contrastive_batch, info_nce
from flowbench.builders.fit import FitPlan, Progress, fit, step_generator
from flowbench.builders.hf_clip import clip_model, copy_clip, copy_vision, copy_words
from flowbench.builders.preferences import Annotators, Choices, Pictures, draw_choices, population
from flowbench.builders.tokenizer import MAX_TOKENS
from flowbench.files import write_atomically
from flowbench.rewards.aesthetic import HEAD as AESTHETIC_FILE
from flowbench.rewards.imagereward import CONFIG as BLIP_CONFIG
from flowbench.scoring.preprocess import normalize
from flowbench.scoring.towers.blip import BlipReward, official_tensors
from flowbench.scoring.towers.heads import Layers
from flowbench.testbeds.shapes.world import Caption

NAMES = ("hpsv2", "imagereward", "pickscore", "aesthetic")
PLANS = {
    "hpsv2": FitPlan("hpsv2", steps=500, lr=3e-4, warmup=30, weight_decay=0.05, checkpoint_every=50),
    "blip": FitPlan("blip", steps=400, lr=1e-3, lr_end=5e-4, warmup=50, weight_decay=0.05, checkpoint_every=100),
    "imagereward": FitPlan("imagereward", steps=800, lr=7e-4, warmup=30, weight_decay=0.05, checkpoint_every=100),
    "blip-whole": FitPlan("blip-whole", steps=250, lr=3e-4, warmup=30, weight_decay=0.05, checkpoint_every=50),
    "pickscore": FitPlan("pickscore", steps=500, lr=5e-4, warmup=30, weight_decay=0.05, checkpoint_every=50),
    "aesthetic": FitPlan("aesthetic", steps=3000, lr=3e-3, warmup=50, weight_decay=1e-3, checkpoint_every=1000),
}
PAIRS = 48  # choices per step
MATCHES = 48  # captions told from wrong ones per step
RATINGS = 256
CAPTIONS_SEEN = 0.7  # share of the captions that one model's annotators were shown

BLIP_VISION: dict[str, Any] = {  # of mini-clip's widths
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
BLIP_VISION |= {"image_size": 32, "patch_size": 4, "layer_norm_eps": 1e-6}
BLIP_TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
BLIP_TEXT |= {"max_position_embeddings": MAX_TOKENS, "layer_norm_eps": 1e-12}
BLIP_HEAD = (32, 1)

Score = Callable[[torch.Tensor, list[str]], torch.Tensor]  # images (B, 3, 32, 32) in [0, 1] and B captions to (B,)


@dataclass(frozen=True)
class Materials:
    """What the reward models are trained from: pictures, mini-clip with its tokenizer, and where to work."""

    pictures: Pictures
    clip: open_clip.CLIP
    tokenizer: CLIPTokenizer
    work: Path
    seed: int
    device: torch.device
    progress: Progress

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """(B, MAX_TOKENS)."""
        encoded = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return encoded.input_ids.to(self.device)

    def shown(self, name: str) -> Pictures:
        """The pictures of the captions that one model's annotators see."""
        order = torch.randperm(len(self.pictures.captions), generator=step_generator(self.seed, sum(name.encode())))
        rows = order[: int(CAPTIONS_SEEN * len(order))]
        p = self.pictures
        return Pictures(
            tuple(p.captions[i] for i in rows), p.images[rows], p.truth[rows], p.clean[rows], p.traits[rows]
        )

    def matching(self, name: str, step: int) -> tuple[torch.Tensor, list[Caption], list[Caption]]:
        """MATCHES rendered scenes with their captions, and these with one attribute changed."""
        images, right, wrong = contrastive_batch(MATCHES, np.random.default_rng([self.seed, sum(name.encode()), step]))
        return images.to(self.device), right, wrong


def choice_loss(
    score: Score, pictures: Pictures, choices: Choices, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Bradley and Terry's negative log-likelihood of the choices, from the scores of both pictures."""
    both = torch.cat([pictures.images[choices.row, choices.first], pictures.images[choices.row, choices.second]])
    captions = [pictures.captions[i] for i in choices.row]
    first, second = score(shifted(both.float() / 255, generator).to(device), captions * 2).chunk(2)
    return F.binary_cross_entropy_with_logits(first - second, choices.chosen.to(device))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All images moved by the same -1, 0 or 1 pixels along each axis, so that a network learns none by heart."""
    x, y = torch.randint(3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, y : y + 32, x : x + 32]


def train_on_choices(
    name: str,
    module: nn.Module,
    score: Score,
    materials: Materials,
    plan: FitPlan,
    beside: Callable[[int], torch.Tensor] = lambda step: torch.zeros(()),
    begin: int = 0,
) -> None:
    """Fit `module` to the choices of the population of that name, plus the loss `beside(step)`; steps from `begin`."""
    pictures, annotators = materials.shown(name), population(name, materials.seed)

    def loss(step: int) -> torch.Tensor:
        generator = step_generator(materials.seed + 1 + sum(name.encode()), begin + step)
        choices = draw_choices(pictures, annotators, PAIRS, generator)
        return choice_loss(score, pictures, choices, materials.device, generator) + beside(begin + step)

    fit(module, loss, plan, materials.work, materials.progress)


# --- hpsv2: CLIP, fine-tuned --------------------------------------------------------------------------------------


def open_clip_score(model: open_clip.CLIP, materials: Materials) -> Score:
    """exp(logit_scale) times the cosine."""

    def score(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        image = model.encode_image(images * 2 - 1, normalize=True)
        text = model.encode_text(materials.tokens(captions), normalize=True)
        return model.logit_scale.exp() * (image * text).sum(1)

    return score


def train_hpsv2(materials: Materials, folder: Path, plan: FitPlan = PLANS["hpsv2"]) -> None:
    """Fine-tune mini-clip on choices and write it in open_clip's format, in half precision."""
    model = open_clip.CLIP(**clip_config(len(materials.tokenizer))).to(materials.device)
    model.load_state_dict(materials.clip.state_dict())
    train_on_choices("hpsv2", model, open_clip_score(model, materials), materials, plan)
    materials.tokenizer.save_pretrained(folder)
    normalised = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "longest"}
    config = {"model_cfg": clip_config(len(materials.tokenizer)), "preprocess_cfg": normalised}
    _write_json(folder / "open_clip_config.json", config)
    weights = {k: v for k, v in model.state_dict().items() if k != "attn_mask"}
    _save_half(weights, folder / "open_clip_model.safetensors")


# --- pickscore: a smaller CLIP, trained on choices and on captions --------------------------------------------------


def transformers_clip_score(model: CLIPModel, materials: Materials) -> Score:
    """exp(logit_scale) times the cosine."""

    def score(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        image, text = _embed(model, materials, images, captions)
        return model.logit_scale.exp() * (image * text).sum(1)

    return score


def _embed(
    model: CLIPModel, materials: Materials, images: torch.Tensor, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    image = model.visual_projection(model.vision_model(pixel_values=normalize(images)).pooler_output)
    text = model.text_projection(model.text_model(input_ids=materials.tokens(captions)).pooler_output)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def train_pickscore(materials: Materials, folder: Path, plan: FitPlan = PLANS["pickscore"]) -> None:
    """Train some of mini-clip's layers on choices and on captions, and write them in transformers' format."""
    torch.manual_seed(materials.seed + 11)
    model = clip_model(materials.tokenizer).to(materials.device)
    copy_clip(materials.clip, model)

    def contrast(step: int) -> torch.Tensor:
        images, right, wrong = materials.matching("pickscore", step)
        captions = [c.text for c in right + wrong]
        image, text = _embed(model, materials, images, captions)
        return 0.3 * info_nce(image, text, materials.tokens(captions), model.logit_scale)

    train_on_choices("pickscore", model, transformers_clip_score(model, materials), materials, plan, contrast)
    model.half().save_pretrained(folder)
    materials.tokenizer.save_pretrained(folder)


# --- imagereward: BLIP ----------------------------------------------------------------------------------------------


def blip_score(model: BlipReward, materials: Materials) -> Score:
    """The head's value. There may be several times as many captions as images: the images are then seen once."""

    def score(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        encoded = materials.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        encoded = encoded.to(materials.device)
        seen = model.see(normalize(images)).repeat(len(captions) // len(images), 1, 1)
        return model.rate(seen, encoded.input_ids, encoded.attention_mask)

    return score


def train_imagereward(materials: Materials, folder: Path, plan: FitPlan = PLANS["imagereward"]) -> None:
    """Train BLIP to rank captions of a picture, then pictures of a caption too; write it with the official names.

    At once, the choices' gradient would drown the one by which the cross-attention first finds anything.
    """
    tokenizer = materials.tokenizer
    text = {**BLIP_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(materials.seed + 12)
    model = BlipReward(BLIP_VISION, text, BLIP_HEAD, None).to(materials.device)
    copy_vision(materials.clip, model.vision)
    copy_words(materials.clip, model.text)
    # As ImageReward fixes most of its layers; half the time, and the cross-attention finds its first hold much sooner.
    # The last steps train them too, because annotators care for more than captions say.
    model.vision.requires_grad_(False)
    score = blip_score(model, materials)

    def match(step: int, name: str = "imagereward") -> torch.Tensor:
        """BLIP's image-text matching, as a ranking of captions: the counterpart of its pre-training.

        The wrong captions are the right one with an attribute changed, and another image's: an easy one, without which
        learning takes long to begin.
        """
        images, right, wrong = materials.matching(name, step)
        captions = [c.text for c in right]
        good, close, other = score(images, captions + [c.text for c in wrong] + captions[-1:] + captions[:-1]).chunk(3)
        return F.softplus(close - good).mean() + F.softplus(other - good).mean()

    fit(model, lambda step: match(step, "blip"), PLANS["blip"], materials.work, materials.progress)
    train_on_choices("imagereward", model, score, materials, plan, match)
    model.vision.requires_grad_(True)
    train_on_choices("imagereward", model, score, materials, PLANS["blip-whole"], match, begin=plan.steps)
    values = scores_of(score, materials.pictures, materials.device)
    config = {"vision": BLIP_VISION, "text": text, "head": BLIP_HEAD, "head_places": None, "max_tokens": MAX_TOKENS}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / BLIP_CONFIG, {**config, "mean": values.mean().item(), "std": values.std().item()})
    _save_half(official_tensors(model), folder / "ImageReward.safetensors")
    tokenizer.save_pretrained(folder)


# --- aesthetic: a head on mini-clip -------------------------------------------------------------------------------


def train_aesthetic(materials: Materials, folder: Path, plan: FitPlan = PLANS["aesthetic"]) -> None:
    """Regress annotators' ratings, about 1 to 10, on mini-clip's embedding; the annotators see no caption."""
    pictures, annotators = materials.shown("aesthetic"), population("aesthetic", materials.seed)
    images = pictures.images.flatten(0, 1)
    with torch.no_grad():
        parts = [x.to(materials.device).float() / 127.5 - 1 for x in images.split(256)]
        embeddings = torch.cat([materials.clip.encode_image(x, normalize=True) for x in parts])
    torch.manual_seed(materials.seed + 13)
    head = Layers((embeddings.shape[1], 32, 1)).to(materials.device)

    def loss(step: int) -> torch.Tensor:
        generator = step_generator(materials.seed + 14, step)
        rows = torch.randint(len(embeddings), (RATINGS,), generator=generator)
        ratings = draw_ratings(pictures, annotators, rows, generator).to(materials.device)
        return (head(embeddings[rows]) - ratings).square().mean()

    fit(head, loss, plan, materials.work, materials.progress)
    folder.mkdir(parents=True, exist_ok=True)
    _save_half(head.state_dict(), folder / f"{AESTHETIC_FILE}.safetensors")


def draw_ratings(
    pictures: Pictures, annotators: Annotators, rows: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Ratings (N,) of the pictures `rows` (N,), counted through all captions, by fresh annotators; 5 on average."""
    individual = torch.randn(len(rows), 1, pictures.traits.shape[-1], generator=generator)
    k = pictures.images.shape[1]
    utility = annotators.utilities(pictures, individual, rows // k).gather(1, (rows % k)[:, None])[:, 0]
    average = annotators.utilities(pictures, torch.zeros_like(individual[:1]), torch.arange(len(pictures.captions)))
    error = torch.randn(len(rows), generator=generator)
    return (5 + (utility - average.mean()) / average.std() + 0.3 * error).clamp(1, 10)


TRAINERS: dict[str, Callable[[Materials, Path], None]] = {
    "hpsv2": train_hpsv2,
    "imagereward": train_imagereward,
    "pickscore": train_pickscore,
    "aesthetic": train_aesthetic,
}


@torch.no_grad()
def scores_of(score: Score, pictures: Pictures, device: torch.device) -> torch.Tensor:
    """(P, K)."""
    captions = [c for c in pictures.captions for _ in range(pictures.images.shape[1])]
    images = pictures.images.flatten(0, 1)
    parts = [
        score(images[i : i + 128].to(device).float() / 255, captions[i : i + 128]) for i in range(0, len(images), 128)
    ]
    return torch.cat(parts).cpu().view(pictures.images.shape[:2])


def _save_half(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Half the size; the readers compute in single precision."""
    half = {k: v.detach().cpu().half().contiguous() for k, v in weights.items()}
    write_atomically(path, lambda place: save_file(half, place, metadata={"format": "pt"}))


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
