"""Studies of a suite: independent searches, the run of what each selects, and their median as the score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_records import fake_record

from flowbench.cli import suites as cli
from flowbench.errors import RunInterruptedError, UsageError
from flowbench.experiments import run
from flowbench.experiments.jobs import Job, run_job
from flowbench.experiments.studies import carry_out, studied
from flowbench.experiments.study import StudyListener
from flowbench.experiments.submission import suite_seeds
from flowbench.experiments.suite import Loaded, load_suite, seconds_left
from flowbench.experiments.tuning import search, selection
from flowbench.experiments.tuning.files import read_chosen
from flowbench.experiments.tuning.search import Places
from flowbench.record import Record, find_records
from flowbench.reporting.chosen import Chosen, searches_markdown
from flowbench.reporting.documents import to_csv, to_markdown
from flowbench.reporting.leaderboard import board
from flowbench.reporting.page.build import page_data, tables
from flowbench.reporting.page.render import html
from flowbench.reporting.results.pages import pages
from flowbench.reporting.values import middle

TINY = {"training.prompts_per_iteration": 4, "training.images_per_prompt": 4, "training.minibatch": 16}
EVALUATION = {"splits": ["test"], "prompts": 2, "images_per_prompt": 4, "num_steps": 10}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than runs."""
    monkeypatch.setattr(search, "draw_search", lambda stem, picture: [])
    monkeypatch.setattr(run, "draw", lambda *_: None)
    monkeypatch.setattr(run, "draw_study", lambda *_: None)


def suite(folder: Path, part: dict[str, Any], **more: Any) -> Loaded:
    """A suite in the plane, whose runs take a moment."""
    points = {"model": "gaussian", "reward": "linear", "images": 64, "evaluation": EVALUATION}
    (folder / "points.yaml").write_text(yaml.safe_dump(points), encoding="utf-8")
    content = {"runs": [{"workloads": ["points.yaml"], "algorithms": ["raft"], **part}], **more}
    (folder / "suite.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_suite(str(folder / "suite.yaml"))


SMALL: dict[str, Any] = {"studies": {"count": 2, "trials": 2, "first": 7}}


def places(folder: Path) -> Places:
    return Places(folder / "runs", folder / "search", "cpu")


class Here:
    """Makes runs in this process, and is interrupted after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.made = stop_after, list[str]()

    def carry_out(self, jobs: Sequence[Job], plugins: Sequence[Path], running: Any) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            if len(self.made) == self.stop_after:
                raise KeyboardInterrupt
            self.made.append(job.label)
            yield job, run_job(job).failure


def results(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((folder / "runs").rglob("record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = ("seed", "ruleset", "workload", "scores", "points", "status", "config")
        content = {key: record[key] for key in kept}
        content["points"] = [point["scores"] for point in record["points"]]
        found[path.parent.name] = content
    return found


# --- the suite's file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "ruleset", "complaint"),
    [
        ({"studies": {"count": 3, "trials": 4}}, "tuned", "ruleset tuned has 3 studies of 5 trials"),
        ({"seeds": [100]}, "tuned", "ruleset tuned has 3 studies of 5 trials"),
        ({"studies": {}}, "defaults", "ruleset defaults has seeds, and no studies"),
        ({"studies": {}, "seeds": [1]}, None, "a part has seeds, or studies in their place"),
        ({}, None, "a part has seeds, or studies in their place"),
        ({"studies": {"first": 998}}, None, "results of studies have seeds below 1000"),
    ],
)
def test_a_suite_whose_studies_are_not_those_of_its_ruleset_is_refused(
    tmp_path: Path, part: dict[str, Any], ruleset: str | None, complaint: str
):
    with pytest.raises(UsageError, match=complaint):
        suite(tmp_path, part, ruleset=ruleset)


def test_the_suite_tuned_has_three_studies_of_five_trials_of_all_twelve(tmp_path: Path):
    loaded = load_suite("tuned")
    (part,) = loaded.suite.runs
    assert (loaded.suite.ruleset, part.workloads, len(part.algorithms)) == ("tuned", ("shapes-clip",), 12)
    one = loaded.suite.model_copy(update={"runs": (part.model_copy(update={"algorithms": ("nft",)}),)})
    (found,) = studied(Loaded(one, (), loaded.workloads), places(tmp_path))
    assert (found.cell.runs, len(found.cell.jobs), found.cell.later) == (18, 15, 3)
    assert {job.config.seed for job in found.cell.jobs} == {1000, 1100, 1200}
    assert len({job.config.hash() for job in found.cell.jobs}) == 15  # studies draw points of their own
    assert all(job.stamp and job.stamp.ruleset == "tuned" and job.lean for job in found.cell.jobs)
    assert set(suite_seeds()["tuned", "shapes-clip"]) == {100, 101, 102, 1000, 1100, 1200}
    assert list(tmp_path.iterdir()) == []


# --- running it -------------------------------------------------------------------------------------------------------


def test_an_interrupted_suite_of_studies_that_is_repeated_ends_as_an_undisturbed_one(tmp_path: Path):
    loaded = suite(tmp_path, SMALL, settings=TINY)
    once, often = places(tmp_path / "once"), places(tmp_path / "often")
    whole = Here()
    seen: list[tuple[int, int]] = []
    told = StudyListener(on_outcome=lambda outcome, done, total: seen.append((done, total)))
    torch.manual_seed(0)
    outcomes = carry_out(loaded, once, told, whole, False)
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert seen == [(k, 6) for k in range(1, 7)]
    for stop in (1, 2, 2):
        with pytest.raises(RunInterruptedError):
            carry_out(loaded, often, StudyListener(), Here(stop), False)
    last = Here()
    carry_out(loaded, often, StudyListener(), last, False)
    assert last.made == ["points, raft, study 2"]
    assert results(tmp_path / "once") == results(tmp_path / "often")
    again = Here()
    carry_out(loaded, once, StudyListener(), again, False)
    assert again.made == []


def test_a_studys_result_is_what_it_selects_run_with_a_seed_of_its_own_and_evaluated_like_any_run(tmp_path: Path):
    loaded, where = suite(tmp_path, SMALL, settings=TINY), places(tmp_path)
    (before,) = studied(loaded, where)
    assert (before.results, before.cell.later, before.cell.counts()["missing"]) == ((), 2, 6)
    carry_out(loaded, where, StudyListener(), Here(), False)
    (after,) = studied(loaded, where)
    assert (after.cell.later, after.cell.counts()["done"], seconds_left([after.cell])) == (0, 6, 0)
    for result in after.results:
        chosen = read_chosen(tmp_path / "search" / "gaussian" / "raft" / f"points-study-{result.study + 1}/chosen.yaml")
        config = result.job.config
        assert config.seed == 7 + result.study
        assert config.evaluation.splits == ("test",)
        assert config.evaluation.points == 5
        assert config.training.learning_rate == chosen.settings["training.learning_rate"]
        assert (result.job.folder / "checkpoints" / "last.safetensors").exists()
    records = find_records([where.runs])
    assert sorted(r.seed for r in records) == [7, 8, 1000, 1000, 1100, 1100]
    reported = [r for r in records if r.scores]
    assert sorted(r.seed for r in reported) == [7, 8]
    other = suite(tmp_path, {"studies": {**SMALL["studies"], "scramble": 5}}, settings=TINY)
    (of_other,) = studied(other, where)  # a choice of another search is no result
    assert (of_other.cell.later, of_other.results) == (2, ())


def test_a_study_that_selects_nothing_is_a_failed_run_and_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, where = suite(tmp_path, SMALL, settings=TINY), places(tmp_path)
    monkeypatch.setattr(selection, "FLOOR", 9.0)
    for executor in (Here(), Here()):
        outcomes = carry_out(loaded, where, StudyListener(), executor, True)
        assert all(outcome.failure and "no trial qualifies" in outcome.failure for outcome in outcomes)
        assert not any("raft, study" in label for label in executor.made)
        (found,) = studied(loaded, where)
        assert (found.cell.counts()["failed"], found.cell.counts()["done"]) == (2, 4)
    assert sorted(r.seed for r in find_records([where.runs]) if r.status == "failed") == [7, 8]


def test_the_commands_of_a_suite_plan_make_and_show_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flowbench_main: Callable[..., int], capsys: Any
):
    suite(tmp_path, {"studies": {"count": 2, "trials": 1}}, settings=TINY)
    where = ["--output", str(tmp_path / "runs"), "--searches", str(tmp_path / "search"), "--device", "cpu"]
    monkeypatch.setattr(cli, "chosen_executor", lambda *_: Here())
    words = ["suite", "run", str(tmp_path / "suite.yaml"), *where]
    assert flowbench_main(*words, "--dry-run") == 0
    planned = capsys.readouterr().out
    assert "128 training images in 2 runs" in planned
    assert "and 2 results of studies, with 128 training images" in planned
    assert "time: not known before a run has ended" in planned
    assert flowbench_main(*words) == 0
    assert "4 done, 0 running, 0 interrupted, 0 failed, 0 missing" in capsys.readouterr().out
    assert flowbench_main(*words, "--dry-run") == 0
    assert "time: 0 s one run after another" in capsys.readouterr().out
    assert flowbench_main("suite", "show", words[2], *where[:4]) == 0
    assert "4 done" in capsys.readouterr().out


# --- tables and the page ----------------------------------------------------------------------------------------------


def tuned(method: str, gains: Sequence[float | None]) -> list[Record]:
    """The results of an algorithm's studies: gains in oracle_exact, None for one that selected nothing."""
    made = []
    for study, gain in enumerate(gains):
        changed: dict[str, Any] = {"ruleset": "tuned", "config_hash": f"{method}{study}"}
        one = fake_record(method, 100 + study, **changed)
        config = {**one.config, "training": {**one.config["training"], "learning_rate": 1e-4 * (study + 1)}}
        update: dict[str, Any] = {"config": config}
        if gain is None:
            lost = {"status": "failed", "failure": "study: no trial qualifies", "scores": {}, "per_prompt": {}}
            update |= {**lost, "points": ()}
        else:
            base = one.per_prompt["oracle_exact/test"]["base"]
            each = {**one.per_prompt, "oracle_exact/test": {"base": base, "tuned": [b + gain for b in base]}}
            score = one.scores["oracle_exact/test"]
            scores = {**one.scores, "oracle_exact/test": score.model_copy(update={"tuned": score.base + gain})}
            update |= {"per_prompt": each, "scores": scores}
        made.append(one.model_copy(update=update))
    return made


def trial(method: str, seed: int, status: Any = "finished") -> Record:
    one = fake_record(method, seed, ruleset="tuned", status=status, failure=None if status == "finished" else "nan")
    return one.model_copy(
        update={"scores": {}, "per_prompt": {}, "config": {**one.config, "evaluation": {"splits": []}}}
    )


RECORDS = [
    *tuned("nft", [0.10, 0.30, 0.12]),
    *tuned("raft", [0.15, None, 0.05]),
    *tuned("awm", [None, 0.5, None]),
    *(trial("nft", seed) for seed in (1000, 1100)),
    trial("raft", 1000, "failed"),
]


def test_a_row_of_tuned_results_shows_the_three_and_their_median():
    (table,) = board(RECORDS).tables
    assert [row.label for row in table.rows] == ["nft", "raft", "awm"]
    scores = {row.label: row.gains.get("oracle_exact") for row in table.rows}
    assert scores["nft"] is not None
    assert scores["raft"] is not None
    assert scores["nft"].value == pytest.approx(0.12)
    assert scores["raft"].value == pytest.approx(0.05)
    assert scores["awm"] is None
    text = to_markdown(board(RECORDS))
    assert "+0.100, +0.300, +0.120" in text
    assert "+0.150, +0.050, failed" in text
    assert "medians of the studies" in text
    assert "a failed study counts as the worst" in text
    assert "0.12" in to_csv(board(RECORDS))


def test_the_median_counts_failed_studies_as_the_worst():
    assert middle([0.1, 0.3], 1) == 0.1
    assert middle([0.1, 0.3], 1, lower=True) == 0.3
    assert middle([0.3], 2) is None
    assert middle([], 3) is None


def test_trials_of_studies_are_in_no_table():
    (table,) = board(RECORDS).tables
    assert sum(len(row.group.records) for row in table.rows) == 9
    page = page_data(tables(RECORDS), RECORDS)
    assert page.facts.trials == 3
    assert {m.name: len(m.trials) for m in page.methods} == {"awm": 0, "nft": 2, "raft": 1}


def test_tuned_results_stand_beside_the_defaults_and_are_never_averaged_with_them():
    plain = [
        fake_record(m, seed, k, ruleset="defaults") for k, m in enumerate(["nft", "raft"]) for seed in (100, 101, 102)
    ]
    both, alone = board([*plain, *RECORDS]), board(plain)
    assert [table.workload.ruleset for table in both.tables] == ["defaults", "tuned"]
    mine, theirs = both.tables[0].rows, alone.tables[0].rows
    assert [(row.label, row.gains) for row in mine] == [(row.label, row.gains) for row in theirs]
    page, of_plain = page_data(both, [*plain, *RECORDS]), page_data(alone, plain)
    assert page.workloads[0].model_copy(update={"id": ""}) == of_plain.workloads[0].model_copy(update={"id": ""})
    assert page.verdict[: len(of_plain.verdict)] == of_plain.verdict
    assert page.verdict[len(of_plain.verdict)].startswith("shapes-clip, tuned: ")
    assert page.profile is None
    (row,) = (row for row in page.workloads[1].rows if row.label == "nft")
    assert len({run.settings for run in row.runs if run.settings.startswith("training.learning_rate=")}) == 3


def choice(**changed: Any) -> Chosen:
    workload = load_suite("tuned").workloads["shapes-clip"]
    content: dict[str, Any] = {
        **{"algorithm": "nft", "workload": workload, "workload_hash": workload.hash, "ruleset": "defaults"},
        **{"deviations": (), "study": 0, "sampler": "qmc", "scramble_seed": 0, "run_seeds": (1000, 1001, 1002)},
        **{"trials": 20, "failed": 1, "collapsed": 2, "selected": 4, "reason": "the highest", "kept": 0.95},
        **{"settings": {"training.learning_rate": 0.00123456, "training.tuning": "lora"}, "reward": 0.4, "gain": 0.04},
        **{"seeds_of_selected": (1000,), "edges": ("training.ema = 0.99 stands at 1.00",), "space": {}, "fixed": {}},
        **{"best_of": tuple(0.001 * k for k in range(1, 21)), "refused_choices": (), "log": "journal.log"},
        **{"log_sha256": "0" * 64, "commit": None, "versions": {}},
    }
    return Chosen(**{**content, **changed})


def test_tables_and_page_show_what_each_search_selected_and_how_the_best_of_k_grows():
    nothing: dict[str, Any] = {
        "selected": None,
        "settings": {},
        "gain": None,
        "kept": None,
        "edges": (),
        "reason": "no trial qualifies",
    }
    found = [choice(), choice(ruleset="tuned", study=1, run_seeds=(1100,), **nothing)]
    text = searches_markdown(found)
    growth = "1: +0.0010, 2: +0.0020, 5: +0.0050, 10: +0.0100, 20: +0.0200"
    for said in ("20 (1 failed, 2 collapsed)", "0.00123", "+0.0400", "stands at 1.00", growth, "tuned, study 2"):
        assert said in text
    assert "no trial qualifies" in text
    page = page_data(tables(RECORDS), RECORDS, searches=found)
    (method,) = (m for m in page.methods if m.name == "nft")
    assert [(s.ruleset, s.study, s.trials) for s in method.searches] == [("defaults", None, 20), ("tuned", 2, 20)]
    assert method.searches[0].best_of[-1] == pytest.approx(0.02)
    many, few = (len(html(page_data(tables(RECORDS), RECORDS, searches=f))) for f in (found * 24, []))
    assert many - few < 100_000


def test_the_pages_of_a_leaderboard_show_the_searches_beside_it(tmp_path: Path):
    folder = tmp_path / "leaderboard"
    choice().save(folder / "search" / "mini-sd3" / "nft" / "chosen.yaml")
    text = pages(folder, tmp_path / "README.md").files[folder / "README.md"]
    assert "### Searches" in text
    assert "20: +0.0200" in text
    assert "### Searches" not in pages(tmp_path, tmp_path / "absent.md").files[tmp_path / "README.md"]
