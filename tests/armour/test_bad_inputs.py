"""A bad command line is refused in one line that names the culprit, and nothing is lost, written or begun."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import BASES, Bad, all_cases, chosen, commands, furnish

from flowbench.cli import main as cli
from flowbench.escape import plain

BARE = re.compile(r"\b[A-Z]\w*(Error|Exception|Interrupt|Iteration)\b")
LONGEST = 1000
AUTHORS = ("(raises.py:1)", "(syntax.py, line 1)")  # of plug-ins are told what was raised, and where


class Started(BaseException):
    """Work began on a request that makes no sense."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the command lines name: a finished run, and files that are none of what they should be."""
    from flowbench.config import resolve_config
    from flowbench.experiments.run import execute

    folder = tmp_path_factory.mktemp("place")
    furnish(folder)
    small = {"training.images": 64, "training.images_per_prompt": 4, "evaluation.prompts": 2, "evaluation.points": 0}
    small |= {"evaluation.images_per_prompt": 2, "training.num_steps": 4, "evaluation.num_steps": 4}
    execute(resolve_config("raft", "linear", "gaussian", overrides=small, device="cpu"), folder / "run", "", False)
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trains, scores, builds or serves says instead that it began."""
    import flowbench.builders.pipeline
    import flowbench.builders.tokenizer
    import flowbench.evaluation.judges
    import flowbench.experiments.bench
    import flowbench.experiments.study
    import flowbench.models.families
    import flowbench.services.serving

    def begun(*arguments: Any, **named: Any) -> Any:
        raise Started

    work = [
        (flowbench.models.families, "load_pipeline"),
        (flowbench.experiments.study, "run_job"),
        (flowbench.experiments.study, "_elsewhere"),
        (flowbench.builders.tokenizer, "build_tokenizer"),
        (flowbench.evaluation.judges, "build_reward"),
        (flowbench.services.serving, "RewardServer"),
    ]
    for module, name in work:
        known = getattr(module, name)
        users = [m for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("flowbench")]
        for user in users:
            if vars(user).get(name) is known:
                monkeypatch.setattr(user, name, begun)


Try = Callable[[Bad], str | None]


@pytest.fixture
def attempt(
    place: Path,
    no_work: None,
    clean_registry: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> Try:
    """Tries a case in this process and says what is wrong with the answer, or None."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path / "home"))
    before = _seen(place)

    def tried(case: Bad) -> str | None:
        nonlocal before
        monkeypatch.setattr(sys, "argv", ["flowbench", *case.words])
        try:
            cli.main()
            status: Any = "no exit"
        except SystemExit as stopped:
            status = stopped.code
        except Started:
            status = "work began"
        output, errors = capsys.readouterr()
        if status not in (1, 2):
            return f"status {status}: {(errors or output)[:300]!r}"
        if "Traceback" in errors + output or "\x1b" in errors + output:
            return f"a traceback, or a control character: {errors[:300]!r}"
        lines = errors.splitlines()
        if len(lines) != 1 or not lines[0].startswith("flowbench: ") or len(lines[0]) > LONGEST:
            return f"not one line: {errors[:400]!r}"
        told = any(place in lines[0] for place in AUTHORS)
        if BARE.search(lines[0]) and not told:
            return f"the name of an exception: {lines[0][:300]!r}"
        if not any(_names(lines[0], culprit) for culprit in (*case.culprits, "'")):
            return f"no culprit: {lines[0][:300]!r}"
        earlier, before = before, _seen(place)
        if earlier != before:
            return f"files were changed: {sorted(set(earlier.items()) ^ set(before.items()))[:4]}"
        return None

    return tried


def _names(line: str, culprit: str) -> bool:
    return bool(culprit) and plain(culprit)[:20].strip() in line


def _seen(place: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.lstat() for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts}
    return {str(path.relative_to(place)): (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def report(cases: list[Bad], faults: dict[Bad, str]) -> str:
    kinds = Counter(case.kind for case in cases)
    parameters = {(case.command, case.parameter) for case in cases}
    head = f"{len(cases)} cases of {len(all_cases())}: {len({c.command for c in cases})} commands, "
    head += f"{len(parameters)} parameters, {len(kinds)} kinds; {len(faults)} faults"
    return "\n".join([head, *(f"  {case.name}\n      {fault}" for case, fault in faults.items())])


def test_every_command_has_a_right_command_line_to_begin_with():
    assert {name for name, _ in commands()} == set(BASES)


def test_a_bad_command_line_is_one_line_that_names_the_culprit_and_changes_nothing(attempt: Try):
    cases = chosen(150, seed=0)
    faults = {case: fault for case in cases if (fault := attempt(case)) is not None}
    assert not faults, report(cases, faults)


@pytest.mark.slow
def test_a_thousand_bad_command_lines_are_refused_too(attempt: Try):
    cases = chosen(1000, seed=1)
    faults = {case: fault for case in cases if (fault := attempt(case)) is not None}
    print(report(cases, faults))
    assert not faults, report(cases, faults)
