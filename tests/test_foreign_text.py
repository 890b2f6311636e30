"""Names, prompts and messages of others reach terminal and error lines as text alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_records import fake_records
from rich.console import Console

from flowbench.cli import main as cli
from flowbench.cli.display import (
    bench,
    leaderboard,
    listing,
    planning,
    probe,
    progress,
    rewards,
    runs,
    studies,
    suites,
    tune,
)
from flowbench.conformance import Status
from flowbench.experiments.planning.plan import GIB, Division
from flowbench.record import Score
from flowbench.reporting.leaderboard import board

BAD = "[/]x[red]y\x1b[31mz\nw\u202e"
SHOWN = "[/]x[red]y<U+001B>[31mz w<U+202E>"
DIVISION = Division(1, 1, 1, 1, 1)
ONE = Score(base=0.1, tuned=0.2, diff_ci95=None)
MODULES = (bench, leaderboard, listing, planning, probe, progress, rewards, runs, studies, suites, tune)


class Hostile(SimpleNamespace):
    """An object whose attributes are hostile texts, or what is given."""

    def __getattr__(self, name: str) -> Any:
        return BAD

    def __hash__(self) -> int:
        return id(self)


def interval() -> Any:
    return SimpleNamespace(value=0.1, low=0.0, high=0.2, seeds=2, failed=1)


def cell() -> Any:
    counts = dict.fromkeys(("done", "begun", "failed", "missing"), 1)
    return Hostile(
        workload=Hostile(images=4), jobs=(), runs=1, counts=lambda: counts, failures=lambda: [BAD], not_applicable=None
    )


def record() -> Any:
    budget = SimpleNamespace(
        images=1, reward_calls=1, function_evaluations=1, seconds=1.0, evaluation_seconds=1.0, peak_memory_mb=1.0
    )
    return Hostile(budget=budget, scores={f"{BAD}/{BAD}": ONE}, judges=(BAD,), seed=0)


def job() -> Any:
    return Hostile(done=False, iterations=(1, 2), config=Hostile(training=Hostile(images=4)))


def finding() -> Any:
    return Hostile(verdict=Hostile(status=Status.FAIL))


def plan() -> Any:
    phase = SimpleNamespace(name=BAD, resident={BAD: GIB}, slice=GIB, detail=BAD, peak=2 * GIB)
    cost = SimpleNamespace(purpose=BAD, number=1, evaluations=1, flops=1.0, seconds=1.0)
    return Hostile(phases=(phase,), peak=phase, costs=(cost,), limit=None, division=DIVISION, tflops=1.0, seconds=1.0)


def chosen() -> Any:
    return Hostile(
        space={BAD: ""}, study=0, workload=Hostile(), selected=0,
        settings={BAD: BAD}, best_of=(0.1,), edges=(BAD,), gain=0.1, kept=0.9,
        refused_choices=(BAD,), ruleset=None, deviations=(BAD,), failed=1, collapsed=0,
    )  # fmt: skip


def trial() -> Any:
    candidate = SimpleNamespace(gain=0.1, kept=0.9, failed=True, collapsed=False)
    return SimpleNamespace(number=0, candidate=candidate, attempts=(1,), settings={BAD: BAD}, failure=BAD)


def row() -> Any:
    return SimpleNamespace(
        variant=BAD, repeats=False, runs=1, failures=(BAD,), values={}, shares={}, explained=(), curves={}
    )


def probed() -> Any:
    worth = SimpleNamespace(images=1)
    return Hostile(worth=None, truth=None, failure=BAD, found=worth)


def search() -> Any:
    return Hostile(space=SimpleNamespace(dimensions={BAD: None}, refused=(BAD,)), images=1, study=0, workload=Hostile())


def tune_plan() -> None:
    one = search()
    tune.plan(
        [SimpleNamespace(search=one, trial=trial())],
        Hostile(runs=1, studies=1, workload=Hostile(), ruleset=None, deviations=(BAD,)),
    )


def comparison() -> Any:
    standing = Hostile(gain=interval(), shares_first=True, rank=(1, 1))
    pair = Hostile(difference=interval(), p_holm=0.5)
    ranking = SimpleNamespace(standings=(standing,), unfinished=(BAD,), pairs=(pair,))
    return Hostile(ranking=ranking, workload=Hostile(images=4), trained=True, failures=(BAD,))


def overlay() -> Any:
    info = SimpleNamespace(name=BAD, licence=BAD, requirements=(BAD,))
    return SimpleNamespace(info=info, state=BAD, megabytes=1.0, folder=Path("a") / "b[/]")


def bench_report() -> Any:
    speed = Hostile(seconds=1.0, rate=1.0, tflop=1.0, matmul_share=0.5, peak_gib=1.0, part="rollout", unit="images")
    beside = SimpleNamespace(portion=1, in_turns=1.0, beside=1.0, speedup=1.0)
    return Hostile(
        speeds=(speed,), rollouts=1.0, matmul_tflops=1.0, repeats=1, images=4, over_plain=1.0, overlap=beside
    )


def live(kind: Any, *arguments: Any) -> None:
    with kind(*arguments) as it:
        it.show(BAD, 1, 1, BAD)


def step(kind: Any, *said: str) -> None:
    with kind() as it:
        it(*said)


def run_progress() -> None:
    shown = progress.RunProgress(Hostile())
    shown._start(0, 2)


def study_progress() -> None:
    studies.StudyProgress()._outcome(SimpleNamespace(job=job(), failure=BAD), 1, 2)


def listed() -> None:
    listing.console.print(listing._runs(Path("o")))


SHOWS: dict[str, Callable[[], Any]] = {
    "bench.table": lambda: bench.table(bench_report()),
    "leaderboard.show": lambda: leaderboard.show(board(fake_records(methods=(BAD, "nft"), workloads=("shapes-clip",)))),
    "listing.doctor": lambda: listing.doctor([Hostile(ok=True), Hostile(ok=False)]),
    "planning.show": lambda: planning.show(plan()),
    "probe.table": lambda: probe.table(Hostile(rows=(probed(),), seed=0)),
    "progress.LiveProgress": lambda: live(progress.LiveProgress, progress.console),
    "progress.RunProgress": run_progress,
    "rewards.environments": lambda: rewards.environments([overlay()]),
    "rewards.installed": lambda: rewards.installed([overlay()]),
    "rewards.removed": lambda: rewards.removed([overlay()]),
    "rewards.parity": lambda: rewards.parity([Hostile(ok=True, limit=0, control=False, difference=0.0)], None),
    "rewards.ParityProgress": lambda: step(rewards.ParityProgress, BAD),
    "rewards.InstallProgress": lambda: step(rewards.InstallProgress, BAD, BAD),
    "runs.scores": lambda: runs.scores(record(), Path("a") / "[/]"),
    "runs.evaluation": lambda: runs.evaluation(
        Hostile(scores={}, images={BAD: SimpleNamespace(mean=0.1, ci95=None, prompts=1, images=1)})
    ),
    "runs.score_table": lambda: runs.score_table({f"oracle_exact/{BAD}/{BAD}": ONE}, BAD, BAD, [BAD]),
    "studies.StudyProgress": study_progress,
    "studies.plan": lambda: studies.plan([job()]),
    "studies.ablation": lambda: studies.ablation([row()]),
    "studies.checklist": lambda: studies.checklist([finding()]),
    "suites.show": lambda: suites.show([cell()], BAD),
    "suites.comparisons": lambda: suites.comparisons([comparison()], [cell()]),
    "tune.plan": tune_plan,
    "tune.study": lambda: tune.study(SimpleNamespace(chosen=chosen(), trials=(trial(),), finalists=(), folder=BAD)),
    "tune.summary": lambda: tune.summary([SimpleNamespace(chosen=chosen())] * 2),
}
# Built of others that stand above, or without any foreign text.
OTHERS = {
    *("bench.BenchProgress", "probe.ProbeProgress", "progress.EvaluationProgress", "progress.BuildProgress"),
    *("leaderboard.as_text", "leaderboard.arrange", "leaderboard.Layout", "studies.duration", "suites.plan"),
    *("runs.dry_run", "listing.listing"),
}


def test_every_display_stands_here():
    names = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in MODULES
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    assert names == {*SHOWS, *OTHERS}


@pytest.mark.parametrize("name", SHOWS)
def test_a_display_shows_markup_and_control_characters_as_text(name: str, monkeypatch: pytest.MonkeyPatch):
    out = Console(file=io.StringIO(), width=2000, color_system=None)
    for module in MODULES:
        monkeypatch.setattr(module, "console", out, raising=False)
        monkeypatch.setattr(module, "Console", lambda **_: out, raising=False)
    monkeypatch.setattr(progress.LiveProgress.__init__, "__defaults__", (out,))
    SHOWS[name]()
    text = out.file.getvalue()
    assert not set(text) & {"\x1b", "\u202e"}
    assert "[/]" in text
    if name not in ("rewards.installed", "leaderboard.show"):  # where a path stands, or a heading is folded
        assert "[red]" in text


def test_a_list_of_runs_and_a_configuration_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Any]
):
    out = Console(file=io.StringIO(), width=2000, color_system=None)
    for module in (listing, runs):
        monkeypatch.setattr(module, "console", out)
    folder = tmp_path / "o[" / "d]" / "[red]"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    listing.listing("runs", tmp_path)
    runs.dry_run(tiny_config(overrides={"evaluation.judges": []}).model_copy(update={"reward": BAD}))
    text = out.file.getvalue()
    assert str(folder.relative_to(tmp_path)) in text
    assert "[/]x[red]y" in text
    assert "\x1b" not in text


def test_an_error_is_one_line_whatever_names_it_repeats(
    flowbench_main: Callable[..., int], capsys: pytest.CaptureFixture
):
    assert flowbench_main("run", BAD) == 2
    assert flowbench_main("list", BAD) == 2
    assert flowbench_main(BAD) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("flowbench: ")
        assert "\x1b" not in line


def test_a_warning_is_one_line_too():
    said = logging.LogRecord("flowbench", logging.WARNING, "", 0, "prompt %s is long", (BAD,), None)
    assert cli._OneLine().format(said) == f"prompt {SHOWN} is long"
