"""A run's life: whatever ends it, it goes on to the same log and record, and nobody else's files suffer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench import files
from flowbench.config import RunConfig, resolve_config
from flowbench.errors import BusyError, RunError, RunInterruptedError, UsageError
from flowbench.experiments import api
from flowbench.experiments.folder import run_folder
from flowbench.experiments.run import Listener, execute
from flowbench.locks import holder, locked
from flowbench.training.checkpoint import CHECKPOINT, checkpoint_files
from flowbench.training.state import load_state, save_state
from flowbench.training.trainer import Trainer
from flowbench.training.update import Updater

TINY = {
    "training.images": 96,
    "training.prompts_per_iteration": 4,
    "training.images_per_prompt": 4,
    "training.minibatch": 16,
    "training.num_steps": 4,
    "training.checkpoint_every": 2,
    "evaluation.num_steps": 4,
    "evaluation.prompts": 4,
    "evaluation.images_per_prompt": 2,
    "evaluation.points": 2,
}
TIMINGS = {"seconds", "timings", "evaluation_seconds", "overhead", "peak_memory_mb", "finished", "command", "checksum"}
Main = Callable[..., int]


def tiny(**changed: Any) -> RunConfig:
    """Six iterations on the plane: a tenth of a second of training."""
    settings = {**TINY, **{key.replace("__", "."): value for key, value in changed.items()}}
    return resolve_config("nft", "linear", "gaussian", overrides=settings, device="cpu")


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in TIMINGS and "seconds" not in key}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, Any]:
    """What a finished run says, timings aside."""
    assert (folder / "DONE").is_file()
    content = {"record": json.loads((folder / "record.json").read_text(encoding="utf-8"))}
    for name in ("metrics.jsonl", "points.jsonl"):
        content[name] = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    assert [line["iteration"] for line in content["metrics.jsonl"]] == list(range(1, 7))
    return timeless(content)


def weights(folder: Path) -> list[torch.Tensor]:
    return load_state(folder / CHECKPOINT)["policy"]["current"]


@pytest.fixture(scope="module", autouse=True)
def without_git() -> Iterator[None]:
    """Asking for the commit takes as long as a run of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowbench.experiments.outcome.code_commit", lambda: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    execute(tiny(), folder, "", resume=False)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert left(folder) == left(whole)
    for one, other in zip(weights(folder), weights(whole), strict=True):
        assert torch.equal(one, other)
    assert not [path for path in folder.rglob("*") if files.TEMPORARY in path.name]


# --- a crash at every write -------------------------------------------------------------------------------------------


class Crashed(BaseException):
    """The process is gone: nothing that is written after it counts."""


@contextmanager
def crash_at(k: int, moment: str) -> Iterator[list[str]]:
    """Within it, the k-th write ends the process: before it, half way through it, or when it is done."""
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = {name: getattr(os, name) for name in ("replace", "fsync")}

        def replace(source: Any, target: Any) -> None:
            if len(written) >= k:
                raise Crashed
            written.append(Path(target).name)
            if len(written) == k and moment != "after":
                if moment == "torn":  # what the disk has of it when the power goes
                    Path(source).write_bytes(Path(source).read_bytes()[:7]) if Path(source).is_file() else None
                raise Crashed
            real["replace"](source, target)
            if len(written) == k:
                raise Crashed

        append = files.append_line

        def torn_line(path: Path, line: str) -> None:
            if len(written) >= k:
                raise Crashed
            written.append(path.name)
            if len(written) < k or moment == "after":
                append(path, line)
            elif moment == "torn":
                with path.open("a", encoding="utf-8") as file:
                    file.write(line[: len(line) // 2])
            if len(written) == k:
                raise Crashed

        patch.setattr(os, "replace", replace)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr("flowbench.training.trainer.append_line", torn_line)
        yield written


def crashed_at(k: int, moment: str, folder: Path) -> bool:
    """Whether a run had a k-th write to crash at; its folder is as the crash leaves it."""
    with crash_at(k, moment):
        try:
            execute(tiny(), folder, "", resume=False)
        except Crashed:
            return True
    return False


def continued(folder: Path) -> None:
    """As the same command with --resume goes on, or without it where nothing is left that could be continued."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        execute(tiny(), folder, "", resume=folder.exists())


@pytest.mark.parametrize("moment", ["torn", pytest.param("after", marks=pytest.mark.slow)])
def test_a_run_that_crashes_at_any_write_is_continued_to_the_same_log_and_record(
    moment: str, whole: Path, tmp_path: Path
):
    k = 1
    while crashed_at(k, moment, folder := tmp_path / str(k)):
        continued(folder)
        assert_same(folder, whole)
        k += 1
    assert k > 16  # configuration, inputs, checkpoints, six lines, points, tuned weights, record, DONE


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_a_run_that_crashes_twice_is_continued_all_the_same(moment: str, whole: Path, tmp_path: Path):
    for k in range(4, 22, 3):
        for again in range(1, 12, 2):
            folder = tmp_path / f"{k}-{again}"
            assert crashed_at(k, moment, folder)
            with crash_at(again, moment), suppress(Crashed):
                execute(tiny(), folder, "", resume=True)
            continued(folder)
            assert_same(folder, whole)


# --- whatever is raised -----------------------------------------------------------------------------------------------


@contextmanager
def failing_in_iteration(which: int, where: Any, name: str, error: BaseException) -> Iterator[None]:
    """Within it, the k-th call of a method changes what it changes, and then raises."""
    calls = [0]
    method = getattr(where, name)

    def fail(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        result = method(*arguments, **named)
        if calls[0] == which:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, fail)
        yield


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("prepare", ValueError("two\nlines")),
        ("update", RunError("the loss is nan")),
        ("update", torch.OutOfMemoryError("CUDA out of memory")),
        ("update", SystemExit(0)),
        ("update", KeyboardInterrupt()),
        ("reward", AttributeError("of a plug-in")),
        ("listener", BrokenPipeError(32, "Broken pipe")),
    ],
)
def test_whatever_is_raised_the_last_good_iteration_is_saved_and_the_error_says_where(
    place: str, error: BaseException, whole: Path, tmp_path: Path
):
    from flowbench.algorithms.nft import Nft
    from flowbench.training.scored import ScoredImages

    config, folder, done = tiny(training__checkpoint_every=100, evaluation__points=0), tmp_path / "run", 4
    where: Any = {"prepare": (Nft, "prepare"), "reward": (ScoredImages, "proceed")}.get(place, (Updater, "update"))
    listener = Listener()
    if place == "listener":

        def break_off(log: Any) -> None:
            if log.iteration == done:
                raise error

        listener = Listener(on_iteration=break_off)
    with (
        failing_in_iteration(1000 if place == "listener" else done + 1, *where, error),
        pytest.raises(RunError if place == "prepare" else type(error)) as raised,  # a plug-in's hook is named
    ):
        execute(config, folder, "flowbench run nft --reward linear", False, listener)
    assert raised.value.__notes__ == [
        f"iteration 4 of 6 is saved in '{folder}'; continue with: flowbench run nft --reward linear --resume"
    ]
    assert load_state(folder / CHECKPOINT)["iteration"] == done
    execute(config, folder, "", resume=True)
    for one, other in zip(weights(folder), weights(whole), strict=True):
        assert torch.equal(one, other)


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "run"

    def full(log: Any) -> None:
        if log.iteration == 3:

            def no_space(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("flowbench.files.os.replace", no_space)

    with pytest.raises(OSError, match="No space left") as raised:
        execute(tiny(evaluation__points=0), folder, "", False, Listener(on_iteration=full))
    assert raised.value.__notes__[0].startswith("iteration 2 of 6 is saved in")
    monkeypatch.undo()
    assert load_state(folder / CHECKPOINT)["iteration"] == 2


@pytest.fixture
def nobody_handles_signals() -> Iterator[None]:
    """What a library of an earlier test left (Ray's handler of SIGTERM ends the process) is put aside."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("nobody_handles_signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_iteration_with_the_usual_exit_code(
    number: int, status: int, flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Path
):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    iterate = Trainer._iterate

    def signalled(trainer: Trainer) -> None:
        if trainer.iteration == 2:
            os.kill(os.getpid(), number)
        iterate(trainer)

    arguments = ["run", "nft", "--reward", "linear", "--model", "gaussian", "--device", "cpu", "--output", tmp_path]
    arguments += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    arguments += ["--keep", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_iterate", signalled)
        assert flowbench_main(*arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("flowbench: interrupted after iteration 3 of 6; iteration 3 of 6 is saved in '")
    assert said.rstrip().endswith("--resume")
    assert len(said.splitlines()) == 1
    assert {n: signal.getsignal(n) for n in before} == before
    assert flowbench_main(*arguments, "--resume") == 0
    (folder,) = (path.parent for path in tmp_path.rglob("DONE"))
    assert [load_state(path)["iteration"] for path in checkpoint_files(folder)] == [6, 4]
    assert_same_results(folder, whole)


def assert_same_results(folder: Path, whole: Path) -> None:
    one, other = left(folder), left(whole)
    assert one["metrics.jsonl"] == other["metrics.jsonl"]
    assert one["record"]["scores"] == other["record"]["scores"]


def test_a_second_signal_ends_an_iteration_at_once_and_loses_that_one_alone(tmp_path: Path):
    update = Updater.update

    def signalled(updater: Updater, batch: Any, iteration: int) -> Any:
        done = update(updater, batch, iteration)
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return done

    config = tiny(training__checkpoint_every=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", signalled)
        with pytest.raises(RunInterruptedError, match="interrupted") as raised:
            api.carry_out(config, "", tmp_path)
    assert raised.value.signal == signal.SIGINT
    assert raised.value.__notes__[0].startswith("iteration 3 of 6 is saved")
    assert load_state(run_folder(tmp_path, config) / CHECKPOINT)["iteration"] == 3


def test_a_closed_pipe_leaves_a_run_that_can_be_continued(tmp_path: Path):
    """`flowbench run ... | head -0`, in processes of their own."""
    words = [sys.executable, "-m", "flowbench", "run", "nft", "--reward", "linear", "--model", "gaussian"]
    words += ["--device", "cpu", "--output", str(tmp_path)]
    words += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=120) == 1
    line = next(line for line in said.splitlines() if line.startswith("flowbench: "))
    assert "of 6 is saved in" in line
    assert line.endswith("--resume")
    assert checkpoint_files(next(tmp_path.rglob("config.yaml")).parent)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def interrupted(folder: Path, after: int = 4, **changed: Any) -> RunConfig:
    config = tiny(**changed)

    def stop(log: Any) -> None:
        if log.iteration == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(config, folder, "", False, Listener(on_iteration=stop))
    return config


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = interrupted(tmp_path / "run")
    newest, before = checkpoint_files(tmp_path / "run")
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    execute(config, tmp_path / "run", "", resume=True)
    assert "is damaged: its content is not that of its checksum; the run goes on from the one before" in caplog.text
    assert "iteration 2" in caplog.text
    assert before.name == "iteration-000002.safetensors"
    assert_same(tmp_path / "run", whole)


def test_without_another_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path):
    config = interrupted(tmp_path / "run", training__keep_checkpoints=1)
    (newest,) = checkpoint_files(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(
        RunError, match=r"is damaged: .*no other to fall back on; begin anew with --overwrite"
    ) as raised:
        execute(config, tmp_path / "run", "", resume=True)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(("keep", "kept"), [(None, 1), (1, 1), (3, 3)])
def test_as_many_checkpoints_are_kept_as_were_asked_for(keep: int | None, kept: int, tmp_path: Path):
    config = tiny(training__checkpoint_every=1, training__keep_checkpoints=keep)
    assert config.hash() == tiny(training__checkpoint_every=1).hash()
    execute(config, tmp_path / "run", "", resume=False)
    assert [load_state(path)["iteration"] for path in checkpoint_files(tmp_path / "run")] == list(
        range(6, 6 - kept, -1)
    )


def test_the_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path: Path):
    config = interrupted(tmp_path / "run")
    good = load_state(tmp_path / "run" / CHECKPOINT)
    wrong = {
        "settings": {"config_hash": "0123456789"},
        "seed": {"seed": 5},
        "budget": {"iteration": 5},
        "model: weights current/0 are float64": {
            "policy": {"current": [t.double() for t in good["policy"]["current"]]}
        },
    }
    for what, changed in wrong.items():
        save_state(tmp_path / "run" / CHECKPOINT, {**good, **changed})
        with pytest.raises(UsageError, match=f"is the checkpoint of a run with another {what}") as raised:
            execute(config, tmp_path / "run", "", resume=True)
        assert len(str(raised.value).splitlines()) == 1


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.arange(3.0), "b": [1, {"c": torch.ones(2, dtype=torch.bfloat16)}]})
    content = path.read_bytes()
    for place in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="is damaged"):
            load_state(path)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_second_process_on_a_run_folder_gets_one_line_with_the_firsts_number_and_host(whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(BusyError) as raised:
        execute(tiny(), folder, "", resume=False)
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}; " in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (folder / "config.yaml").exists()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path):
    code = "import sys, time\nfrom pathlib import Path\nfrom flowbench.locks import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('mine', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        found = holder(tmp_path)
        assert found is not None
        assert found.pid == process.pid
        process.kill()
    deadline = time.monotonic() + 10
    while holder(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holder(tmp_path) is None


def test_a_finished_run_is_given_back_when_it_is_resumed(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny()
    folder = run_folder(tmp_path, config)
    record = execute(config, folder, "", resume=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert execute(config, folder, "", resume=True) == record
    assert api.carry_out(config, "", tmp_path, resume=True).before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    arguments = ["run", "nft", "--reward", "linear", "--model", "gaussian", "--device", "cpu", "--output", tmp_path]
    arguments += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    capsys.readouterr()
    assert flowbench_main(*arguments, "--resume") == 0
    assert capsys.readouterr().out.replace("\n", "") == f"this run is finished: {folder}"
    assert flowbench_main(*arguments) == 2
    assert "or begin anew with --overwrite" in capsys.readouterr().err
    assert flowbench_main(*arguments, "--overwrite") == 0
    assert folder.joinpath("DONE").stat().st_mtime_ns > before[folder / "DONE"]
    assert flowbench_main(*arguments, "--overwrite", "--resume") == 2


def test_resuming_what_is_not_there_names_the_nearest_run_and_what_differs(tmp_path: Path):
    made = tiny()
    execute(made, run_folder(tmp_path, made), "", resume=False)
    wanted = tiny(training__learning_rate=0.125)
    with pytest.raises(UsageError) as raised:
        execute(wanted, run_folder(tmp_path, wanted), "", resume=True)
    said = str(raised.value)
    assert said.startswith(f"nothing to resume in {run_folder(tmp_path, wanted)}; the nearest run is ")
    assert f"{run_folder(tmp_path, made)}, where training.learning_rate is " in said
    assert said.endswith("and not 0.125")
    assert not run_folder(tmp_path, wanted).exists()


def test_overwriting_removes_what_flowbench_wrote_and_refuses_by_name_where_anything_else_is(
    whole: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    execute(tiny(), folder, "", resume=False)
    notes, elsewhere = folder / "checkpoints" / "notes.txt", tmp_path / "elsewhere"
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"notes\.txt' is not flowbench's"):
        execute(tiny(), folder, "", False, overwrite=True)
    assert_same(folder, whole)
    notes.unlink()
    elsewhere.mkdir()
    (elsewhere / "kept.png").write_text("mine", encoding="utf-8")
    (folder / "samples").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="samples' is not flowbench's"):
        execute(tiny(), folder, "", False, overwrite=True)
    (folder / "samples").unlink()
    execute(tiny(), folder, "", False, overwrite=True)
    assert_same(folder, whole)
    assert (elsewhere / "kept.png").exists()


def test_a_run_that_begins_where_nothing_can_be_continued_leaves_other_peoples_files(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    execute(tiny(), folder, "", resume=False)
    assert (folder / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_whose_checkpoints_are_gone_begins_anew_with_an_empty_log(whole: Path, tmp_path: Path):
    config = interrupted(tmp_path / "run")
    for path in checkpoint_files(tmp_path / "run"):
        path.unlink()
    execute(config, tmp_path / "run", "", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_record_has_the_command_that_makes_the_run_however_often_it_was_interrupted(tmp_path: Path):
    config = interrupted(tmp_path / "run")
    record = execute(config, tmp_path / "run", "flowbench run nft --set 'a=b c' --resume --seed 3", resume=True)
    assert record.command == "flowbench run nft --set 'a=b c' --seed 3"


def test_a_picture_that_cannot_be_drawn_costs_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr("flowbench.experiments.run.draw", broken)
    execute(tiny(), tmp_path / "run", "", resume=False)
    assert (tmp_path / "run" / "DONE").exists()
    assert "cannot be drawn and are left out: no such font" in caplog.text
