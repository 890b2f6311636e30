"""`flowbench evaluate`: score a run, LoRA or other weights, a diffusers pipeline, or a folder of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel

from flowbench.config import EvaluationConfig, RunConfig, evaluation_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.exact_study import exact_study
from flowbench.evaluation.images import ImageScore, has_prompts, read_gallery, score_gallery
from flowbench.evaluation.judges import build_judges, reads_oracle, training_reward, usable
from flowbench.evaluation.pairs import Pair, compare, evaluate_pairs, evaluated_texts
from flowbench.evaluation.protocol import count_images, score_split
from flowbench.experiments.defaults import MODEL
from flowbench.experiments.inputs import kept_split
from flowbench.experiments.kept import make_album, save_table
from flowbench.experiments.run import CONFIG, RECORD, base_policy, load_tuned, run_config
from flowbench.files import write_atomically
from flowbench.models.adapters import load_lora, lora_file
from flowbench.models.devices import pick_device
from flowbench.models.loading import load_network
from flowbench.models.policy import Policy
from flowbench.models.presets import AnalyticPreset, ModelPreset, load_preset
from flowbench.models.processes import ALONE
from flowbench.prompts import PromptSplit, load_split, locate, present_splits, whole_file
from flowbench.prompts.needs import check_needs
from flowbench.reading.checksums import SUMS, check_listed
from flowbench.reading.tensors import TensorError, fill
from flowbench.record import Score, load_record
from flowbench.registry import rewards
from flowbench.terms import plain_metric, term_names

Progress = Callable[[int, int], None]  # images done, of all images


@dataclass(frozen=True)
class Evaluation:
    """Scores of two models, keyed as in a record, or of images by metric.

    trained_on: the reward that the scored run trained on; held_out: names of the judges; both unknown for weights of
    unknown origin.
    """

    title: str
    scores: dict[str, Score] = field(default_factory=dict)
    images: dict[str, ImageScore] = field(default_factory=dict)
    trained_on: str | None = None
    held_out: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        scores: dict[str, BaseModel] = {**self.scores, **self.images}
        content = {name: score.model_dump(mode="json") for name, score in scores.items()}
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def evaluate(
    path: Path,
    overrides: dict[str, Any],
    model: str | None,
    device: str,
    progress: Progress,
    prompts: str | None = None,
    images: Path | None = None,
) -> Evaluation:
    """Score whatever lies at `path`; `model` is the preset that it belongs to, except for a run, which knows its own.

    prompts: a set's name, folder or file in place of the run's or model's own; all prompts of a file are one split,
    named by its stem; images: a folder for the images that are scored, with a table of them. Raises UsageError for a
    path that holds nothing to score, an override of anything but the evaluation, or prompts that cannot be used;
    RunError for weights that cannot be loaded.
    """
    for key in overrides:
        if not key.startswith("evaluation."):
            raise UsageError(f"cannot change '{key}' of a finished run; only evaluation.* settings")
    where = pick_device(device)
    if (path / CONFIG).is_file():
        if model is not None:
            raise UsageError(f"'{path}' is a run of its own model; leave out --model")
        return _evaluate_run(path, overrides, where, progress, prompts, images)
    preset = load_preset(model or MODEL)
    if isinstance(preset, AnalyticPreset):
        raise UsageError(f"model '{preset.name}' is a formula without weights or images; of it only runs are evaluated")
    protocol = evaluation_config(preset, overrides)
    if has_prompts(path):
        if prompts is not None:
            raise UsageError(f"the images in '{path}' were made for prompts of their own; leave out --prompts")
        if images is not None:
            raise UsageError(f"the images in '{path}' are there already; leave out --keep-images")
        return _evaluate_images(path, preset, protocol, where, progress)
    load = _loader(path)
    if load is None:
        raise UsageError(
            f"'{path}' is no run folder, LoRA, diffusers folder, or folder of images with prompts.tsv or prompts.jsonl"
        )
    splits, config = _chosen(prompts, _no_run(preset, protocol), overrides)
    splits = splits or [load_split(preset.prompts, name) for name in protocol.splits]
    return _evaluate_weights(path, load, preset, config, splits, where, progress, images)


def _evaluate_run(
    folder: Path,
    overrides: dict[str, Any],
    device: torch.device,
    progress: Progress,
    prompts: str | None,
    images: Path | None,
) -> Evaluation:
    """Base and tuned model of a run, with its own protocol and the judges of its record, or changed ones."""
    config, preset = run_config(folder)
    if images and isinstance(preset, AnalyticPreset):
        raise UsageError(f"model '{preset.name}' makes points and no images; leave out --keep-images")
    if overrides:
        protocol = evaluation_config(preset, {**_flat(config.evaluation), **overrides}, config.reward)
        config = config.model_copy(update={"evaluation": protocol})
    own = config.prompt_set(preset)
    splits, config = _chosen(prompts, config, overrides)
    splits = splits or [kept_split(folder, own, name) for name in config.evaluation.splits]
    prompt_set = config.prompt_set(preset)
    check_needs([rewards.describe(name) for name in term_names(config.reward)], prompt_set, splits)
    if config.evaluation.judges is None and "evaluation.judges" not in overrides and (folder / RECORD).is_file():
        # What is a judge by default may have changed since.
        judged = {"judges": _judges_of(folder, prompt_set, splits)}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=judged)})
    policy, _ = load_tuned(folder, device, evaluated_texts(splits, config.evaluation))
    reward = training_reward(config, preset, device)
    judges = build_judges(config, reward, preset, device, splits)
    protocol = config.evaluation if _one_noise(folder) else config.protocol()
    album = make_album(images, ALONE) if images else None
    scores = compare(evaluate_pairs(policy, splits, judges, protocol, progress, album))
    if album:
        save_table(album, protocol.seed, ALONE)
    if study := exact_study(policy, reward, config):
        scores |= study.scores(config.evaluation.splits)
    title = f"{config.algorithm} on {config.reward}, seed {config.seed}"
    return Evaluation(title, scores, trained_on=config.reward, held_out=judges.held_out)


def _chosen(prompts: str | None, config: RunConfig, overrides: dict[str, Any]) -> tuple[list[PromptSplit], RunConfig]:
    """The splits of the prompts asked for, and the configuration with both; no splits where none were asked for."""
    if prompts is None:
        return [], config
    located = locate(prompts)
    if Path(located).is_file():
        if "evaluation.splits" in overrides:
            raise UsageError(f"all prompts of the file '{prompts}' are one split; leave out evaluation.splits")
        splits = [whole_file(Path(located))]
    else:
        wanted = config.evaluation.splits
        names = wanted if "evaluation.splits" in overrides else present_splits(located, wanted)
        splits = [load_split(located, name) for name in names]
    protocol = config.evaluation.model_copy(update={"splits": tuple(split.name for split in splits)})
    return splits, config.model_copy(update={"prompts": located, "evaluation": protocol})


def _judges_of(folder: Path, prompt_set: str, splits: Sequence[PromptSplit]) -> tuple[str, ...] | None:
    judges = load_record(folder / RECORD).judges
    if not judges:
        return None
    return (*usable(judges, prompt_set, splits), *(("oracle",) if reads_oracle(prompt_set) else ()))


def _one_noise(folder: Path) -> bool:
    """Whether the run was evaluated when all seeds had the same noise."""
    return (folder / RECORD).is_file() and load_record(folder / RECORD).version < 2


def _flat(protocol: EvaluationConfig) -> dict[str, Any]:
    return {f"evaluation.{name}": value for name, value in protocol.model_dump().items()}


def _evaluate_weights(
    path: Path,
    load: Loader,
    preset: ModelPreset,
    config: RunConfig,
    splits: list[PromptSplit],
    device: torch.device,
    progress: Progress,
    images: Path | None,
) -> Evaluation:
    """The preset's base model against other weights, on the same prompts and noise."""
    protocol = config.evaluation
    texts = evaluated_texts(splits, protocol)
    base, tuned = load(path, preset, lambda wanted: base_policy(wanted, device, texts))
    judges = build_judges(config, None, preset, device, splits)
    album = make_album(images, ALONE) if images else None
    if base is tuned:
        pairs = evaluate_pairs(tuned, splits, judges, protocol, progress, album)
    else:
        tick = _Counter(progress, 2 * count_images(base, splits, protocol))
        pairs = {}
        for split in splits:
            pair = [
                score_split(
                    *(policy, "reference", split, judges, protocol, tick), page=album.of(name) if album else None
                )
                for name, policy in (("base", base), ("tuned", tuned))
            ]
            for scores in pair:  # two pipelines need not share the latents in which velocities could be compared
                for metric in [m for m in scores.scores if plain_metric(m) == "w2"]:
                    del scores.scores[metric]
            pairs[split.name] = Pair(pair[0], pair[1])
    if album:
        save_table(album, protocol.seed, ALONE)
    return Evaluation(f"{path.name} against {preset.name}", compare(pairs), held_out=judges.held_out)


def _evaluate_images(
    folder: Path, preset: ModelPreset, protocol: EvaluationConfig, device: torch.device, progress: Progress
) -> Evaluation:
    gallery = read_gallery(folder)
    # For messages alone: which prompts the images were made for.
    split = PromptSplit("images", gallery.prompts, "")
    judges = build_judges(_no_run(preset, protocol), None, preset, device, [split])
    scores = score_gallery(gallery, judges, protocol.batch, device, _Counter(progress, len(gallery)))
    return Evaluation(f"{len(gallery)} images in {folder.name}", images=scores, held_out=judges.held_out)


class _Counter:
    """Adds up the images of the batches."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        self.progress(self.done, self.total)


def _no_run(preset: ModelPreset, protocol: EvaluationConfig) -> RunConfig:
    """Stands for the run of weights whose training is unknown: it trained on no reward known here."""
    return RunConfig(algorithm="", reward="unknown", model=preset.name, evaluation=protocol)


# --- weights of other origin --------------------------------------------------------------------------------------

Make: TypeAlias = Callable[[ModelPreset], Policy]
Loader: TypeAlias = Callable[[Path, ModelPreset, Make], tuple[Policy, Policy]]


def _loader(path: Path) -> Loader | None:
    if lora_file(path) is not None:
        return _load_lora
    if (path / "model_index.json").is_file():
        return _load_pipelines
    if any((folder / "config.json").is_file() for folder in (path, path / "transformer")):
        return _load_transformer
    return None


def _load_lora(path: Path, preset: ModelPreset, make: Make) -> tuple[Policy, Policy]:
    """A policy whose current weights are the base with the LoRA, and whose reference is the base."""
    file = lora_file(path)
    assert file is not None
    check_listed(file, file.with_name(SUMS))
    policy = make(preset)
    load_lora(policy.pipeline, file, preset.name)
    return policy, policy


def _load_transformer(path: Path, preset: ModelPreset, make: Make) -> tuple[Policy, Policy]:
    """A policy whose current weights are the folder's transformer, and whose reference is the base."""
    folder = path if (path / "config.json").is_file() else path / "transformer"
    for file in folder.glob("*"):  # of a run's own weights it is known what they were
        check_listed(file, folder.parent / SUMS)
    policy = make(preset)
    try:
        other = load_network(type(policy.transformer), folder, policy.model_dtype)
        fill(policy.transformer, other.state_dict())
    except (TensorError, RunError) as error:
        raise RunError(f"'{folder}' is no transformer of model '{preset.name}': {error}") from error
    return policy, policy


def _load_pipelines(path: Path, preset: ModelPreset, make: Make) -> tuple[Policy, Policy]:
    """Two policies: the base, and the folder as a whole, whose text encoders and VAE may differ too."""
    other = preset.model_copy(update={"source": str(path.resolve()), "revision": None})
    return make(preset), make(other)
