"""`flowbench rewards parity NAME`: does flowbench's own backend of a reward equal the package that defines it?

Both get the same weights, images and prompts. Negative controls are mistakes that are easily made and raise no error;
the comparison is worth something only if it notices them.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowbench.errors import RunError, UsageError, did_you_mean
from flowbench.escape import markdown
from flowbench.models.devices import pick_device
from flowbench.registry import rewards
from flowbench.reward import Reward, checked_score
from flowbench.scoring.checkpoints import find_file, read_json
from flowbench.scoring.preprocess import crop_shortest_side, pad_longest_side
from flowbench.scoring.workers.environment import Environment
from flowbench.scoring.workers.reward import make_reward

SCORE_LIMIT = 1e-6  # absolute
GRADIENT_LIMIT = 1e-5  # of the largest value
CONTROL_LIMIT = 1e-5  # a control must change a score by more than this
SIZES = ((224, 224), (384, 640))  # height and width: as the models take them, and one that must be fitted
PROMPTS = (
    "a red circle left of a blue square",
    "Ein Mädchen mit Perlenohrring, 4k -- naïve café & <b>crème</b>!!",
    "an extremely detailed painting of " + "a castle, a dragon, a knight and a river, " * 12,
    "three green crosses",
)
REDUCED_VISION = {"image_size": 224, "patch_size": 56}

Say = Callable[[str], None]
Score = Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """One comparison: the largest difference found, and the limit that it must keep, or, as a control, exceed."""

    what: str
    difference: float
    limit: float
    control: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is as it should be."""
        return self.difference > self.limit if self.control else self.difference <= self.limit


@dataclass(frozen=True)
class Case:
    """What is particular to a reward.

    make: writes random weights to a folder, full-size or reduced, and returns the constructor's arguments;
    controls: mistakes by name, as scores of the native backend with that mistake.
    """

    make: Callable[[Path, bool], dict[str, Any]]
    controls: Callable[[Any, dict[str, Any], Path], Iterator[tuple[str, Score]]]


def compare(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    reduced: bool = False,
    images: int = 2,
    seed: int = 0,
    device: str = "cpu",
    say: Say = lambda note: None,
) -> list[Finding]:
    """Compare both backends of a reward on `images` images per size; random weights unless arguments name some.

    Raises UsageError for a reward without a package backend, RunError when that or weights are not there.
    """
    if name not in CASES:
        rewards.require(name)
        raise UsageError(f"reward '{name}' has no package to be compared with{did_you_mean(name, CASES)}")
    torch.manual_seed(seed)
    package = make_reward(name, {"backend": "package", **(arguments or {})})
    Environment(package.info.requirements).check(package.info.name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments is None:
            say("writing random weights")
            arguments = CASES[name].make(folder / "weights", reduced)
            package = make_reward(name, {"backend": "package", **arguments})
        say("loading both backends")
        native = make_reward(name, arguments)
        where = pick_device(device)
        native.load(where)
        package.load(where)
        return list(_findings(name, native, package, dict(arguments), folder, images, seed, say))


def given_weights(
    name: str, weights: Path | None, tokenizer: Path | None, version: str | None, reduced: bool
) -> dict[str, Any] | None:
    """Constructor arguments for weights that the user names; None for random ones.

    Raises UsageError for options that do not go together.
    """
    if weights is None:
        if tokenizer or version:
            raise UsageError("--tokenizer and --version belong to --weights; random weights have their own")
        return None
    if reduced:
        raise UsageError("--reduced makes random weights; give it or --weights, not both")
    given = {"tokenizer": str(tokenizer) if tokenizer else None, "version": version}
    allowed = {"hpsv2": "version", "imagereward": "tokenizer"}.get(name)
    for option, value in given.items():
        if value and option != allowed:
            raise UsageError(f"--{option} says nothing to reward '{name}'")
    return {"model": str(weights), **{k: v for k, v in given.items() if v}}


def verdict(name: str, findings: Sequence[Finding]) -> None:
    """Raises RunError, naming the first deviation, unless all findings are as they should be."""
    bad = [f for f in findings if not f.ok]
    if bad:
        what = "went unnoticed" if bad[0].control else f"differ by {bad[0].difference:.1e}"
        raise RunError(f"the backends of reward '{name}' are not shown to be equal: {bad[0].what}: {what}")


def to_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a table."""
    lines = ["| what | largest difference | must be | |", "| --- | --- | --- | --- |"]
    for f in findings:
        bound = f"{'>' if f.control else '<='} {f.limit:.0e}" if f.limit else "0"
        kind = "control: " if f.control else ""
        lines.append(f"| {markdown(kind + f.what)} | {f.difference:.1e} | {bound} | {'ok' if f.ok else 'FAILS'} |")
    return "\n".join(lines) + "\n"


def _findings(
    name: str,
    native: Reward,
    package: Reward,
    arguments: dict[str, Any],
    folder: Path,
    count: int,
    seed: int,
    say: Say,
) -> Iterator[Finding]:
    truth = {}
    for number, size in enumerate(SIZES):
        images, prompts = _pictures(count, size, seed + number), _prompts(count, number)
        spelled = f"{size[1]} x {size[0]}"
        say(f"scores at {spelled}")
        scores = truth[size] = checked_score(package, images, prompts)
        yield Finding(f"scores, {spelled}", _distance(checked_score(native, images, prompts), scores), SCORE_LIMIT)
        say(f"gradients at {spelled}")
        (mine, slope), (theirs, expected) = (_gradient(r, images, prompts) for r in (native, package))
        yield Finding(f"scores with gradient, {spelled}", _distance(mine, theirs), SCORE_LIMIT)
        relative = _distance(slope, expected) / expected.abs().max().clamp(min=1e-30).item()
        yield Finding(f"gradients, {spelled}, relative", relative, GRADIENT_LIMIT)
    identity = native.provenance()["sha256"], package.provenance()["sha256"]
    yield Finding("hash of the weights", float(identity[0] != identity[1]), 0.0)
    size = SIZES[-1]  # where a wrong fit shows too
    images, prompts = _pictures(count, size, seed + len(SIZES) - 1), _prompts(count, len(SIZES) - 1)
    swapped: tuple[str, Score] = ("prompts swapped", lambda x, p: native.score(x, (*p[1:], p[0])))
    with torch.no_grad():
        for control, score in (swapped, *CASES[name].controls(native, arguments, folder)):
            say(f"control: {control}")
            yield Finding(control, _distance(score(images, prompts), truth[size]), CONTROL_LIMIT, control=True)


def _pictures(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Images (count, 3, *size): smooth colours with some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return (smooth + 0.1 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 1)


def _prompts(count: int, number: int) -> tuple[str, ...]:
    return tuple(PROMPTS[(number * count + i) % len(PROMPTS)] for i in range(count))


def _gradient(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x = images.clone().requires_grad_()
    scores = checked_score(reward, x, prompts)
    weights = torch.linspace(0.5, 1.5, len(scores), device=scores.device)
    (gradient,) = torch.autograd.grad((scores * weights).sum(), x)
    return scores.detach(), gradient


def _randomize(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights under which a score depends on everything: the usual initialisations leave biases at 0 and let
    little of the image through to the score.

    Embeddings stay small, as at the beginning of training, since there a layer norm's epsilon counts.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=(0.02 if "embed" in name else 1.0) * p[0].numel() ** -0.5)
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return {name: value.contiguous() for name, value in module.state_dict().items()}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()


# --- HPSv2 ------------------------------------------------------------------------------------------------------------


def _make_hpsv2(folder: Path, reduced: bool) -> dict[str, Any]:
    import open_clip
    from safetensors.torch import save_file

    from flowbench.rewards.hpsv2 import ARCHITECTURE, FILES

    folder.mkdir()
    version = "v2.1"
    if not reduced:
        network = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
        save_file(_randomize(network), folder / f"{FILES[version]}.safetensors")
        return {"version": version, "model": str(folder)}
    model: dict[str, Any] = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 16, **REDUCED_VISION},
        "text_cfg": {"width": 48, "heads": 4, "layers": 2},
    }
    config = {"model_cfg": model, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_randomize(open_clip.CLIP(**model)), folder / "open_clip_model.safetensors")
    return {"version": version, "model": str(folder)}


def _hpsv2_controls(native: Any, arguments: dict[str, Any], folder: Path) -> Iterator[tuple[str, Score]]:
    cropped = replace(native.preprocess, fit=crop_shortest_side)
    yield "cropped instead of padded", _altered(native, preprocess=cropped).score
    half = torch.full_like(native.towers.mean, 0.5)
    yield "pixels normalised to [-1, 1]", _altered(native, towers=_altered(native.towers, mean=half, std=half)).score


def _altered(thing: Any, **attributes: Any) -> Any:
    """A shallow copy with other attributes."""
    other = copy.copy(thing)
    vars(other).update(attributes)
    return other


# --- ImageReward ------------------------------------------------------------------------------------------------------


def _make_imagereward(folder: Path, reduced: bool) -> dict[str, Any]:
    from safetensors.torch import save_file

    from flowbench.rewards.imagereward import CONFIG
    from flowbench.scoring.towers.blip import TEXT, VISION, BlipReward, official_tensors

    folder.mkdir()
    settings: dict[str, Any] = {}
    if reduced:
        small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        vision = {**VISION, **small, **REDUCED_VISION, "num_attention_heads": 4}
        settings = {"vision": vision, "text": {**TEXT, **small}}
        (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    module = BlipReward(**settings)
    _randomize(module)
    save_file({k: v.contiguous() for k, v in official_tensors(module).items()}, folder / "ImageReward.safetensors")
    _write_vocabulary(folder)
    return {"model": str(folder), "tokenizer": str(folder)}


def _write_vocabulary(folder: Path) -> None:
    """A vocabulary of BERT's size and form: letters, their continuations, and its special tokens in their places."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = [f"[unused{i}]" for i in range(30522)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1000 : 1000 + 2 * len(letters)] = [*letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _imagereward_controls(native: Any, arguments: dict[str, Any], folder: Path) -> Iterator[tuple[str, Score]]:
    padded = replace(native.preprocess, fit=pad_longest_side)
    yield "padded instead of cropped", _altered(native, preprocess=padded).score
    yield "no mask over padding tokens", _altered(native, tokenizer=_without_mask(native.tokenizer)).score
    for mistake, section, key, value in (
        ("vision layer norm's epsilon 1e-5", "vision", "layer_norm_eps", 1e-5),
        ("8 text heads instead of 12", "text", "num_attention_heads", 8),
    ):
        place = _misdescribed(Path(tempfile.mkdtemp(dir=folder)), arguments["model"], section, key, value)
        wrong = make_reward("imagereward", {**arguments, "model": str(place)})
        wrong.load(native.device)
        yield mistake, wrong.score


def _without_mask(tokenizer: Any) -> Callable[..., Any]:
    def tokenize(*args: Any, **kwargs: Any) -> Any:
        tokens = tokenizer(*args, **kwargs)
        tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
        return tokens

    return tokenize


def _misdescribed(folder: Path, model: str, section: str, key: str, value: float) -> Path:
    """The folder, filled with the model's weights and a configuration with one wrong value."""
    from flowbench.rewards.imagereward import CONFIG
    from flowbench.scoring.towers.blip import TEXT, VISION

    weights = find_file("imagereward", model, "ImageReward.safetensors")
    own = weights.with_name(CONFIG)
    settings = read_json("imagereward", own) if own.is_file() else {"vision": dict(VISION), "text": dict(TEXT)}
    settings[section][key] = value
    (folder / "ImageReward.safetensors").symlink_to(weights.resolve())
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return folder


CASES = {
    "hpsv2": Case(_make_hpsv2, _hpsv2_controls),
    "imagereward": Case(_make_imagereward, _imagereward_controls),
}
