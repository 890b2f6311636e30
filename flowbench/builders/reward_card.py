"""Model cards of the embedded reward models: pairwise accuracy, agreement among them, and what they missed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from flowbench.builders.preferences import Pictures, draw_choices, population
from flowbench.builders.rewards import NAMES
from flowbench.files import write_atomically
from flowbench.reward import Reward
from flowbench.rewards.aesthetic import Aesthetic
from flowbench.rewards.clip import Clip
from flowbench.rewards.hpsv2 import HpsV2
from flowbench.rewards.imagereward import ImageReward
from flowbench.rewards.pickscore import PickScore

CHOICES = 20_000
CLEAR = 0.1  # difference of the oracle's verdicts from which one picture is called better


def load_rewards(folder: Path, clip_folder: Path) -> dict[str, Reward]:
    """The embedded reward models below `folder`, and mini-clip's, as runs load them."""
    clip = str(clip_folder)
    rewards: dict[str, Reward] = {
        "clip": Clip(clip),
        "hpsv2": HpsV2(model=str(folder / "mini-hpsv2")),
        "imagereward": ImageReward(str(folder / "mini-imagereward")),
        "pickscore": PickScore(str(folder / "mini-pickscore")),
        "aesthetic": Aesthetic(clip, None, str(folder / "mini-aesthetic")),
    }
    for reward in rewards.values():
        reward.load(torch.device("cpu"))
    return rewards


@torch.no_grad()
def score_pictures(reward: Reward, pictures: Pictures) -> torch.Tensor:
    """(P, K), by the path that runs report."""
    k = pictures.images.shape[1]
    captions = tuple(c for c in pictures.captions for _ in range(k))
    images = pictures.images.flatten(0, 1)
    parts = [reward.score(images[i : i + 128].float() / 255, captions[i : i + 128]) for i in range(0, len(images), 128)]
    return torch.cat(parts).view(-1, k)


def measure(scores: Mapping[str, torch.Tensor], pictures: Pictures, seed: int) -> dict[str, dict[str, float]]:
    """Per model: accuracy on fresh annotators' choices, accuracy against the oracle, agreement with each other model.

    All of them over pairs of pictures of one caption; but the aesthetic model's own annotators, who see no caption,
    compare any two pictures.
    """
    generator = torch.Generator().manual_seed(seed + 99)
    result: dict[str, dict[str, float]] = {}
    for name, values in scores.items():
        own: dict[str, float] = {}
        if name in NAMES:
            seen, asked = (_shuffled(values, pictures, generator)) if name == "aesthetic" else (values, pictures)
            choices = draw_choices(asked, population(name, seed), CHOICES, generator)
            preferred = seen[choices.row, choices.first] > seen[choices.row, choices.second]
            own["accuracy on choices of fresh annotators"] = _share(preferred == (choices.chosen > 0.5))
        first, second = _pairs(values)
        better, worse = _pairs(pictures.truth)
        clear = (better - worse).abs() > CLEAR
        own["accuracy against the oracle"] = _share(((first > second) == (better > worse))[clear])
        for other, others in scores.items():
            if other != name:
                a, b = _pairs(others)
                own[f"agreement with {other}"] = _share((first > second) == (a > b))
        result[name] = own
    return result


def _pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (P, K) of the first and of the second picture of every pair of one caption."""
    i, j = torch.triu_indices(values.shape[1], values.shape[1], offset=1)
    return values[:, i], values[:, j]


def _shuffled(values: torch.Tensor, pictures: Pictures, generator: torch.Generator) -> tuple[torch.Tensor, Pictures]:
    """The same pictures in groups that no longer belong to one caption."""
    order = torch.randperm(values.numel(), generator=generator)

    def mix(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)[order].view(x.shape)

    p = pictures
    return mix(values), Pictures(p.captions, mix(p.images), mix(p.truth), mix(p.clean), mix(p.traits))


def _share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()


def write_reward_cards(folder: Path, clip_folder: Path, pictures: Pictures, seed: int) -> None:
    """Measure the models below `folder` on pictures that none was trained on; write README.md and scores.json."""
    scores = {name: score_pictures(reward, pictures) for name, reward in load_rewards(folder, clip_folder).items()}
    for name, values in measure(scores, pictures, seed).items():
        if name == "clip":
            continue  # it has a card of its own
        place = folder / f"mini-{name}"
        write_atomically(place / "scores.json", json.dumps(values, indent=1) + "\n")
        table = "\n".join(f"| {measure} | {value:.3f} |" for measure, value in values.items())
        text = f"# mini-{name}\n{_TEXT[name]}{_COMMON}\n## Scores\n\n"
        write_atomically(place / "README.md", f"{text}| measure | value |\n| --- | --- |\n{table}\n")


_TEXT = {
    "hpsv2": """
The `hpsv2` reward of mini-sd3: mini-clip, open_clip's `CLIP` at small size, fine-tuned on choices between two pictures
of a caption, as HPSv2 is CLIP ViT-H/14 fine-tuned on human choices. In open_clip's own format.
""",
    "imagereward": """
The `imagereward` reward of mini-sd3: transformers' BLIP classes at small size, with cross-attention from caption to
picture and a head, trained to rank pictures of a caption and captions of a picture; its vision transformer is that of
mini-clip, less a layer, and learns in the last steps only. Its weights have the names of the official checkpoint.
""",
    "pickscore": """
The `pickscore` reward of mini-sd3: transformers' `CLIPModel` at small size, started from some of mini-clip's layers and
trained with a softmax over two pictures, and on captions beside.
""",
    "aesthetic": """
The `aesthetic` reward of mini-sd3: a head on the image embedding of mini-clip, as LAION's is one on CLIP ViT-L/14,
trained on ratings. It sees no caption.
""",
}

_COMMON = """
Trained on rendered and generated pictures of the world of shapes, some of them damaged, and on the simulated judgements
of a population of annotators of its own: they care for what the oracle finds true and cleanly drawn, have tastes (warm
colours, round shapes, large objects, few objects, light backgrounds) that differ between the models' populations and
between annotators, and err. It is a proxy on purpose. Licence Apache-2.0, like flowbench. Stored in half precision.

Rebuild: `flowbench testbed build --only rewards`.
"""
