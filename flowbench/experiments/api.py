"""The Python API: `flowbench.run` and its like do what the commands of the same names do, with the same defaults.

The command line calls these functions too. Importing this module is cheap; torch is imported when something runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from flowbench.errors import RunInterruptedError, TerminatedError, UsageError
from flowbench.experiments.defaults import DEVICE, MODEL, OUTPUT, REWARD
from flowbench.outputs import check_file, check_folder

if TYPE_CHECKING:
    from flowbench.config import RunConfig
    from flowbench.experiments.reevaluate import Evaluation
    from flowbench.experiments.run import Listener
    from flowbench.record import Record


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves: its record, and the folder with everything else (README, "What a run leaves").

    before: whether it was finished already, and nothing was done.
    """

    record: Record
    folder: Path
    before: bool = False


def resolve(
    algorithm: str,
    reward: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    images: int | None = None,
    device: str = DEVICE,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    prompts: str | None = None,
    random_init: bool = False,
) -> RunConfig:
    """The full configuration of a run, from arguments as in `run`: they come before `config`, and that before defaults.

    random_init: of the model with random weights, whose name ends with " (random)".
    Raises UsageError for an unknown name or key, a wrong type or range, or needs that sampler or reward cannot meet.
    """
    from flowbench.config import resolve_config
    from flowbench.record import RANDOM
    from flowbench.requirements import warn_of_warmup
    from flowbench.settings import read_config_file, with_budget

    _load(plugins)
    given = read_config_file(Path(config)) if config else {}
    if (meant := given.pop("algorithm", None)) is not None and meant != algorithm:
        raise UsageError(
            f"configuration file '{config}' is of algorithm '{meant}', whose settings are not those of '{algorithm}'; "
            "take out its algorithm and hyperparameters, or name that algorithm"
        )
    plain = {name: given.pop(name, None) for name in ("reward", "model", "seed", "device", "prompts")}
    named = model or plain["model"] or MODEL
    if random_init and not named.endswith(RANDOM):
        named += RANDOM
    resolved = resolve_config(
        algorithm,
        reward or plain["reward"] or REWARD,
        named,
        overrides={**given, **with_budget(settings or {}, images)},
        seed=seed if seed is not None else plain["seed"] or 0,
        device=device if device != DEVICE else plain["device"] or DEVICE,
        prompts=prompts or plain["prompts"],
    )
    warn_of_warmup(resolved)
    return resolved


def run(
    algorithm: str,
    reward: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    images: int | None = None,
    device: str = DEVICE,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    output: str | Path = OUTPUT,
    resume: bool = False,
    prompts: str | None = None,
    track: Sequence[str] = (),
    memory_limit: str | None = None,
    random_init: bool = False,
    keep_images: bool = False,
    overwrite: bool = False,
    keep: int | None = None,
    *,
    listener: Listener | None = None,
) -> RunResult:
    """Fine-tune a model on a reward, evaluate it against its base, and write a record: `flowbench run`.

    Args:
        algorithm: a name of `flowbench list algorithms`, or one that `plugins` register.
        reward: a reward, a weighted sum such as "clip:0.5+jpeg:0.5", or a server's address; None is "clip".
        model: a preset's name or YAML file; None is "mini-sd3".
        seed: of everything random in the run, at least 0; None is 0.
        images: the budget: images generated for training, at least 1; None is the model's default.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        settings: overrides such as {"training.learning_rate": 1e-4, "algorithm.tau": 2.0}.
        config: a YAML file with settings, such as a run's config.yaml; all other arguments come before it.
        plugins: Python files that register algorithms or rewards.
        output: the folder of run folders.
        resume: continue an interrupted run from its checkpoint; a finished one is given back as it is.
        prompts: a prompt set's name, a folder with a file per split, or one file; None is the model's set.
        track: experiment trackers that are told of the run, such as "tensorboard" or "wandb".
        memory_limit: "24GiB": the work is divided so that every phase fits; results stay the same.
        random_init: the model's real configuration with random weights, to measure and never to compare.
        keep_images: keep the evaluation's images below images/ in the run folder, with a table of their scores.
        overwrite: begin anew where a run is, finished or not; only what flowbench wrote is removed.
        keep: how many checkpoints to keep; None is the last, and until the run is finished the one before.
        listener: is told how far the run is.

    Raises:
        UsageError: the request is wrong, or its run is finished already; nothing was computed.
        BusyError: another process makes the same run.
        RunError: it could not be carried out. Whatever is raised, the last good iteration is saved, and a note of the
            error (`__notes__`) says where.
    """
    if keep_images:
        settings = {**(settings or {}), "evaluation.keep_images": True}
    if keep is not None:
        settings = {**(settings or {}), "training.keep_checkpoints": keep}
    resolved = resolve(algorithm, reward, model, seed, images, device, settings, config, plugins, prompts, random_init)
    if memory_limit is not None:
        from flowbench.experiments.planning.plan import divided, parse_memory, plan

        resolved = divided(resolved, plan(resolved, parse_memory(memory_limit)).division)
    trackers = choose_trackers(track)
    options = {"reward": reward, "model": model, "seed": seed, "images": images, "device": device, "config": config}
    options |= {"prompts": prompts, "track": ",".join(trackers) or None, "memory-limit": memory_limit}
    command = _command(algorithm, settings, plugins, random_init, **options, output=output)
    return carry_out(resolved, command, output, resume, listener, trackers, overwrite)


def carry_out(
    config: RunConfig,
    command: str,
    output: str | Path = OUTPUT,
    resume: bool = False,
    listener: Listener | None = None,
    trackers: Sequence[str] = (),
    overwrite: bool = False,
) -> RunResult:
    """Make the run of a resolved configuration below `output`; `command` is what its record says it was made with.

    trackers: as `choose_trackers` gives them.

    Raises UsageError and RunError as `run` does.
    """
    if resume and overwrite:
        raise UsageError("--resume continues a run and --overwrite begins it anew; use one of them")
    from flowbench.experiments.folder import finished_record, run_folder
    from flowbench.experiments.run import Listener, execute
    from flowbench.record import RANDOM
    from flowbench.scoring.checkpoints import random_weights

    check_folder("--output", Path(output))
    folder, told = run_folder(Path(output), config), listener or Listener()
    if resume and (record := finished_record(folder)):
        return RunResult(record, folder, before=True)
    with random_weights(config.model.endswith(RANDOM)), _interruptible():
        if not trackers:
            return RunResult(execute(config, folder, command, resume, told, overwrite), folder)
        from flowbench.experiments.trackers import tracked

        with tracked(trackers, config, folder, told) as told:
            return RunResult(execute(config, folder, command, resume, told, overwrite), folder)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within it, a signal that ends the run at once is an interruption as any other; what was noted of it stays."""
    try:
        yield
    except (KeyboardInterrupt, TerminatedError) as error:
        interrupted = RunInterruptedError("interrupted", getattr(error, "signal", SIGINT))
        for note in getattr(error, "__notes__", ()):
            interrupted.add_note(note)
        raise interrupted from error


def choose_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The experiment trackers that are named, each once; a name may be several with commas between them.

    Raises UsageError for one that accelerate does not know or whose package is not installed.
    """
    if not names:
        return ()
    from flowbench.experiments.trackers import choose_trackers as choose

    return choose(names)


def evaluate(
    path: str | Path,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = DEVICE,
    plugins: Sequence[str | Path] = (),
    output: str | Path | None = None,
    prompts: str | None = None,
    keep_images: bool = False,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run's base and tuned model again, or other weights or images: `flowbench evaluate`.

    Args:
        path: run folder, LoRA file or folder, diffusers folder, or folder of images with prompts.tsv or prompts.jsonl.
        model: the preset that weights or images belong to, None is "mini-sd3"; a run knows its own.
        settings: overrides of evaluation.* settings.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        plugins: Python files that register rewards.
        output: a JSON file to write the scores to.
        prompts: a prompt set's name, a folder with a file per split, or one file, in place of the path's own.
        keep_images: keep the images, with a table of their scores: of a run below images/ in its folder, of other
            weights in <output>-images, beside the file of the scores.
        progress: is called with the images scored, and all of them.

    Raises:
        UsageError: the path holds nothing to score, or a setting is wrong.
        RunError: weights cannot be loaded.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError(f"'{place}' does not exist")
    from flowbench.experiments.reevaluate import evaluate as evaluate_path

    if output is not None:
        check_file("--output", Path(output))
    _load(plugins)
    told = progress or (lambda done, total: None)
    given = dict(settings or {})
    keep_images = bool(given.pop("evaluation.keep_images", False)) or keep_images
    images = _images_of(place, output) if keep_images else None
    result = evaluate_path(place, given, model, device, told, prompts, images)
    if output is not None:
        result.save(Path(output))
    return result


def load_records(*places: str | Path) -> list[Record]:
    """The records below these files and folders, "runs" if none is named, in the order of their paths.

    Raises UsageError when a place does not exist or a file is no record.
    """
    from flowbench.record import find_records

    return find_records([Path(place) for place in places or (OUTPUT,)])


def _images_of(path: Path, output: str | Path | None) -> Path:
    """Where the images go that an evaluation keeps."""
    from flowbench.experiments.kept import IMAGES
    from flowbench.experiments.run import CONFIG

    if (path / CONFIG).is_file():
        return path / IMAGES
    if output is None:
        raise UsageError(f"'{path}' is no run folder: say with --output where scores, and with them images, shall go")
    return Path(output).with_name(f"{Path(output).stem}-{IMAGES}")


def _load(plugins: Sequence[str | Path]) -> None:
    from flowbench.registry import load_plugin_file

    for file in plugins:
        load_plugin_file(Path(file))


def _command(
    algorithm: str,
    settings: Mapping[str, Any] | None,
    plugins: Sequence[str | Path],
    random_init: bool = False,
    **options: Any,
) -> str:
    """The request as a command that can be typed; options that are None were not given."""
    from flowbench.experiments.study import spell

    words = ["flowbench", "run", algorithm]
    words += [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    words += ["--random-init"] if random_init else []
    words += [part for file in plugins for part in ("--plugin", str(file))]
    words += [part for key, value in (settings or {}).items() for part in ("--set", f"{key}={spell(value)}")]
    return shlex.join(words)
