"""The command line: parse, call one library function, print."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flowbench import __version__
from flowbench.cli import bench as cli_bench
from flowbench.cli import leaderboard as cli_leaderboard
from flowbench.cli import page as cli_page
from flowbench.cli import planning as cli_planning
from flowbench.cli import probe as cli_probe
from flowbench.cli import rewards as cli_rewards
from flowbench.cli import studies as cli_studies
from flowbench.cli import submit as cli_submit
from flowbench.cli import suites as cli_suites
from flowbench.cli import testbed as cli_testbed
from flowbench.cli import tune as cli_tune
from flowbench.cli.options import (
    LARGEST_SEED,
    MOST,
    DeviceOption,
    JsonOption,
    KeepImagesOption,
    MemoryLimitOption,
    OutputOption,
    PlaceOption,
    PluginOption,
    PromptsOption,
    RandomInitOption,
    SettingsOption,
    TflopsOption,
    TrackOption,
    new_file,
    say,
)
from flowbench.errors import (
    PeerError,
    RunError,
    RunInterruptedError,
    TerminatedError,
    UsageError,
    described,
    raised_at,
    shortened,
)
from flowbench.escape import plain
from flowbench.experiments import api
from flowbench.experiments.defaults import DEVICE, MODEL, OUTPUT, REWARD
from flowbench.launch import check_alone, is_main
from flowbench.training.interrupt import ended_by_signals

INTERRUPTED, SIGNALLED = 130, 128  # exit statuses as shells have them: after Ctrl-C, and what a signal's number adds to
LONGEST_LINE = 900  # characters of an error line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Benchmark of reward fine-tuning for flow-matching text-to-image models.",
)
app.add_typer(cli_testbed.app, name="testbed")
app.add_typer(cli_rewards.app, name="rewards")
app.add_typer(cli_suites.app, name="suite")


@app.command()
def run(
    algorithm: Annotated[str, typer.Argument(help="Algorithm; see 'flowbench list algorithms'.")],
    reward: Annotated[str | None, typer.Option(help=f"Reward to train on; default {REWARD}.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Model preset or preset file; default {MODEL}.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the run; default 0.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Budget: images generated for training.")] = None,
    prompts: PromptsOption = None,
    device: DeviceOption = DEVICE,
    settings: SettingsOption = [],  # noqa: B006 - typer wants the default itself
    config: Annotated[list[Path], typer.Option(help="YAML file with settings, such as a run's config.yaml.")] = [],  # noqa: B006
    plugin: PluginOption = [],  # noqa: B006
    output: OutputOption = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the same run is.")] = False,
    keep: Annotated[int | None, typer.Option(min=1, max=MOST, help="Checkpoints to keep; default: the last.")] = None,
    track: TrackOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and its cost.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="With --dry-run: also compute memory and time.")] = False,
    memory_limit: MemoryLimitOption = None,
    tflops: TflopsOption = None,
    random_init: RandomInitOption = False,
    keep_images: KeepImagesOption = False,
    json_: JsonOption = None,
) -> None:
    """Fine-tune a model on a reward, evaluate it against its base, and write a record."""
    from flowbench.cli.display import runs as display
    from flowbench.settings import parse_assignments

    if len(config) > 1:
        raise UsageError(f"--config is given {len(config)} times, and a run has one; put all settings into one file")
    given = parse_assignments(settings) | ({"evaluation.keep_images": True} if keep_images else {})
    given |= {} if keep is None else {"training.keep_checkpoints": keep}
    file = config[0] if config else None
    resolved = api.resolve(algorithm, reward, model, seed, images, device, given, file, plugin, prompts, random_init)
    resolved, planned = cli_planning.planned(resolved, dry_run, memory, memory_limit, tflops, json_)
    trackers = api.choose_trackers(track)
    if dry_run:
        display.dry_run(resolved, planned)
        return
    from flowbench.cli.display.progress import RunProgress

    with RunProgress(resolved) as progress:
        result = api.carry_out(resolved, _command(), output, resume, progress.listener(), trackers, overwrite)
    if result.before:
        typer.echo(f"this run is finished: {result.folder}")
        return
    display.scores(result.record, result.folder)


@app.command()
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="Run folder, LoRA file or folder, diffusers folder, or folder of images with prompts.tsv or .jsonl."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Model preset that weights or images belong to.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override evaluation.* settings.")
    ] = [],  # noqa: B006
    prompts: PromptsOption = None,
    device: DeviceOption = DEVICE,
    plugin: PluginOption = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option(callback=new_file, help="Write the scores to this JSON file.")] = None,
    keep_images: KeepImagesOption = False,
) -> None:
    """Score a run's base and tuned model again with the run's own protocol, or score other weights or images."""
    from flowbench.cli.display import runs as display
    from flowbench.cli.display.progress import EvaluationProgress
    from flowbench.settings import parse_assignments

    with EvaluationProgress() as progress:
        result = api.evaluate(
            *(path, model, parse_assignments(settings), device, plugin, output, prompts, keep_images),
            progress=progress,
        )
    display.evaluation(result)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="RUN", exists=True, help="Run folder.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    images: Annotated[int, typer.Option(min=1, max=MOST, help="Images per model.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")] = 0,
    device: DeviceOption = DEVICE,
    output: Annotated[Path | None, typer.Option(help="PNG, or the folder for it; default: the run's samples.")] = None,
) -> None:
    """Draw a prompt with the base and the tuned model, side by side, from the same noise."""
    from flowbench.experiments.sampling import sample_side_by_side

    say(sample_side_by_side(folder, prompt, images, seed, device, output))


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="algorithms, rewards, models, prompts, workloads, defaults or runs.")
    ] = "algorithms",
    plugin: PluginOption = [],  # noqa: B006
    output: PlaceOption = OUTPUT,
) -> None:
    """List what there is."""
    from flowbench.cli.display.listing import listing
    from flowbench.registry import load_plugin_file

    for file in plugin:
        load_plugin_file(file)
    listing(what, output)


app.command()(cli_leaderboard.leaderboard)
app.command()(cli_tune.tune)
app.command()(cli_page.page)
app.command()(cli_submit.submit)
app.command()(cli_studies.ablate)
app.command()(cli_studies.check)
app.command()(cli_suites.compare)
app.command()(cli_probe.probe)
app.command()(cli_bench.bench)


@app.command()
def doctor() -> None:
    """Show what is installed, which device is there, and which weights can be reached."""
    from flowbench.cli.display.listing import doctor as show
    from flowbench.cli.doctor import examine

    show(examine())


def _version(value: bool) -> None:
    if value:
        typer.echo(f"flowbench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""
    if context.invoked_subcommand != "run":
        check_alone(f"'flowbench {context.invoked_subcommand}'")


def _command() -> str:
    """The command as it can be typed again."""
    return shlex.join(["flowbench", *sys.argv[1:]])


def main() -> None:
    """Entry point: one line per error, exit code 2 for wrong usage and 1 for failure; `--debug` shows tracebacks."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch and diffusers are a million objects, no garbage: looking for it took two seconds of their import, and three
    # of the interpreter's end.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    try:
        if not is_main():
            logging.getLogger("flowbench").setLevel(logging.ERROR)  # main warns
        _refuse_empty(arguments)
        with ended_by_signals():
            code = typer.main.get_command(app)(args=arguments, prog_name="flowbench", standalone_mode=False)
        if code == INTERRUPTED:  # typer's way to pass on a Ctrl-C
            raise KeyboardInterrupt
    except (Exception, SystemExit) as error:  # nothing of flowbench exits on its own: foreign code did
        if isinstance(error, SystemExit) and _nobody_reads(error):
            raise
        if debug:
            raise
        message, status = _explain(error)
        message += _notes(error)
        if is_main() or not isinstance(error, (UsageError, RunInterruptedError, PeerError)):  # else main says it
            print(f"flowbench: {_cut(plain(message))}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt:
        print("flowbench: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except TerminatedError as error:
        print("flowbench: terminated", file=sys.stderr)
        sys.exit(SIGNALLED + error.signal)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty(words: list[str]) -> None:
    """Raise UsageError for an empty word: a shell's variable without a value, which would stand for a default."""
    for before, word in zip(["", *words], words, strict=False):
        if not word and (before.startswith("--") or words[0] != "sample"):  # an empty prompt is one
            raise UsageError(f"an empty word stands behind '{before or 'flowbench'}'; give a value, or leave it out")
        if word.startswith("--") and word.endswith("=") and word.count("=") == 1:
            raise UsageError(f"nothing stands behind '{word}'; give a value, or leave it out")


def _cut(line: str) -> str:
    """A line as long as people read one: what is left out of foreign text is its middle, the remedy stays."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def _nobody_reads(error: SystemExit) -> bool:
    """Whether typer ended a command because its output is closed (`| head`), and no run was cut short by it."""
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno == errno.EPIPE and not _notes(error)


def _notes(error: BaseException) -> str:
    """What was noted of an error on the way: where the last good iteration is, and how to go on."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


class _OneLine(logging.Formatter):
    """A warning as one line of text, whatever names it repeats."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return plain(record.message)


def _explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for an error."""
    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, RunInterruptedError):
        return str(error), SIGNALLED + error.signal
    if isinstance(error, RunError):
        return str(error), 1
    if hasattr(error, "format_message"):  # typer's own: unknown command or option, missing argument
        return " ".join(error.format_message().split()) + " (see --help)", 2
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return "the disk is full; free some space", 1
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; lower training.microbatch or training.decode_batch", 1
    if isinstance(error, MemoryError):
        return "out of memory; lower training.microbatch and training.rollout_batch", 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else 1
        if _notes(error):
            return "the program was ended on the way", code
        return f"code of another package ended the program, sys.exit({error.code!r}){raised_at(error, None)}", 1
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{shortened(error.filename)} is no path that can be: {str(error.strerror).lower()}; check its name", 2
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"'{error.filename}': {error.strerror.lower()}; check the path and its permissions", 1
    return f"{described(error)} (run with --debug for the traceback)", 1


if __name__ == "__main__":
    main()
