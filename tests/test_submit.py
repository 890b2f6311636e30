"""Published results: what may be published, that it reads as before, and that nothing of it vanishes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_records import fake_records

from flowbench.config import resolve_config
from flowbench.errors import UsageError
from flowbench.experiments.outcome import failed_record
from flowbench.experiments.submission import check_published, submit, suite_seeds
from flowbench.published import FORMAT, LARGEST, UPGRADES, as_text, shortened
from flowbench.record import Costs, Point, Record, Score, Source, Spent, find_records, load_record
from flowbench.reporting.documents import to_csv, to_markdown
from flowbench.reporting.leaderboard import board
from flowbench.reporting.page.build import page_data
from flowbench.reporting.results import files, pages
from flowbench.reporting.results.schema import schema_text
from flowbench.reporting.results.together import Request, faults_of
from flowbench.workloads import load_workload

Main = Callable[..., int]
ROOT = Path(__file__).parent.parent
HISTORY = ROOT / "leaderboard" / "history"
JUDGES = ("hpsv2", "imagereward", "pickscore", "aesthetic")
WORKLOAD = "shapes-clip"


@pytest.fixture(scope="module")
def sound() -> Record:
    """A finished run that keeps to every rule: raft on shapes-clip, seed 100, all of its numbers made up."""
    workload = load_workload(WORKLOAD)
    config = resolve_config("raft", "clip", "mini-sd3", overrides=workload.overrides(), seed=100, device="cpu")
    blank = failed_record(config, "flowbench run raft", "none", device="cpu x 1")
    draw = np.random.default_rng(0)
    texts = {split: [f"a prompt number {i}" for i in range(n)] for split, n in (("test", 119), ("compositional", 96))}
    metrics = ("clip", *JUDGES, "oracle_exact", "oracle_soft", "w2", "diversity")
    per_prompt = {
        f"{metric}/{split}": {side: draw.uniform(0.2, 0.9, len(texts[split])).tolist() for side in ("base", "tuned")}
        for metric in metrics
        for split in texts
    }
    means = {key: {side: float(np.mean(values)) for side, values in v.items()} for key, v in per_prompt.items()}
    keys = [*means, *(f"oracle_{kind}/{split}/{c}" for kind in ("exact", "soft") for split in texts for c in "abcdef")]
    scores = {
        k: Score(**means.get(k, {"base": 0.51234567, "tuned": 0.6}), diff_ci95=(0.0123456, 0.0345678)) for k in keys
    }
    points = tuple(
        Point(
            images=576 * k,
            iteration=18 * k,
            seconds=20.123456 * k,
            function_evaluations=5184 * k,
            scores=dict.fromkeys(metrics, 0.1 * k + 0.0123456),
        )
        for k in range(1, 6)
    )
    purposes = {"sampling": 23_040, "training": 2880, "backward": 2880, "reference": 0, "dev": 9999, "evaluation": 9999}
    spent = {"images": 2880, "reward_calls": 2880, "function_evaluations": 25_920, "seconds": 100.123456}
    return blank.model_copy(
        update={
            "status": "finished",
            "failure": None,
            "scores": scores,
            "per_prompt": per_prompt,
            "prompts": texts,
            "judges": {
                name: {"model": f"embedded:mini-{name}", "sha256": f"{k}" * 64} for k, name in enumerate(JUDGES)
            },
            "reward_provenance": {"model": "embedded:mini-clip", "sha256": "9" * 64},
            "budget": Spent(**spent, evaluation_seconds=40.0, overhead=0.01, peak_memory_mb=1373.19),
            "costs": Costs(
                images=2880,
                reward_calls=2880,
                function_evaluations=purposes,
                updates=90,
                flops=1.23456e15,
                seconds=dict.fromkeys(
                    ("rollout", "decode", "reward", "prepare", "update", "dev", "evaluation"), 9.87654
                ),
                device="cpu x 1",
                precision="float32",
            ),
            "points": points,
            "dev_base": dict.fromkeys(metrics, 0.0123456),
            "device": "cpu x 1",
            "commit": "0" * 40,
            "ruleset": "defaults",
            "workload": WORKLOAD,
            "workload_hash": workload.hash,
        }
    )


def seeded(record: Record, seed: int, **changed: Any) -> Record:
    return record.model_copy(update={"seed": seed, "config": {**record.config, "seed": seed}, **changed})


def all_seeds(record: Record) -> list[Record]:
    return [seeded(record, seed) for seed in suite_seeds()["defaults", WORKLOAD]]


def lines(records: Sequence[Record], published: Sequence[Record] = (), **options: bool) -> list[str]:
    return faults_of(records, Request(suite_seeds(), tuple(published), **options))


def save(records: Sequence[Record], folder: Path) -> Path:
    for k, record in enumerate(records):
        record.save(folder / f"{k}" / "record.json")
    return folder


# --- the form ---------------------------------------------------------------------------------------------------------


def test_a_published_record_of_a_default_run_is_small_and_reads_as_the_same_result(sound: Record, tmp_path: Path):
    files.write(tmp_path, files.published([sound, seeded(sound, 101)]).files)
    path = tmp_path / files.place(sound)
    assert path.stat().st_size <= LARGEST
    back = load_record(path)
    assert (back.identity, back.seed, back.config, back.prompts) == (sound.identity, 100, sound.config, sound.prompts)
    for key, sides in sound.per_prompt.items():
        for side, values in sides.items():
            assert back.per_prompt[key][side] == pytest.approx(values, rel=5e-4)
    assert back.points[-1].scores == pytest.approx(sound.points[-1].scores, rel=1e-4)
    assert {r.seed for r in find_records([tmp_path])} == {100, 101}
    again, base = shortened(back.model_dump(mode="json"))
    assert as_text(again) == path.read_text(encoding="utf-8")
    assert base is not None
    assert (tmp_path / "v1" / WORKLOAD / base.file).is_file()


def test_tables_and_page_do_not_know_a_published_record_from_another(tmp_path: Path):
    records = fake_records(seeds=2, methods=("acflow", "nft", "refl"), workloads=(WORKLOAD,))
    files.write(tmp_path, files.published(records).files)
    before, after = board(records), board(find_records([tmp_path]))
    for one, other in zip(before.tables[0].rows, after.tables[0].rows, strict=True):
        assert (one.label, one.standing and one.standing.rank) == (other.label, other.standing and other.standing.rank)
        for metric, gain in one.gains.items():
            assert other.gains[metric].value == pytest.approx(gain.value, abs=2e-4)
    assert [w.name for w in page_data(after).workloads] == [w.name for w in page_data(before).workloads]
    assert to_markdown(after).count("\n") == to_markdown(before).count("\n")
    assert to_csv(after).count("\n") == to_csv(before).count("\n")


def test_base_scores_that_runs_share_are_one_file():
    records = fake_records(seeds=3, methods=("acflow", "nft", "awm"), workloads=(WORKLOAD,))
    made = files.published(records).files
    bases = [path for path in made if path.name.startswith("base-")]
    assert (len(bases), len(made)) == (3, 12)  # one for each noise block


def test_a_record_that_would_be_too_large_has_fewer_digits(sound: Record):
    more = {f"judge{k}/test": sound.per_prompt["clip/test"] for k in range(5)}
    document, _ = shortened(
        sound.model_copy(update={"per_prompt": {**sound.per_prompt, **more}}).model_dump(mode="json")
    )
    assert max(len(str(v)) for v in document["per_prompt"]["clip/test"]) <= 5
    many = {f"judge{k}/test": sound.per_prompt["clip/test"] for k in range(40)}
    assert files.published([sound.model_copy(update={"per_prompt": {**sound.per_prompt, **many}})]).too_large


def test_a_failed_run_and_scores_that_are_no_numbers_are_published_too(sound: Record, tmp_path: Path):
    failed = sound.model_copy(update={"status": "failed", "scores": {}, "per_prompt": {}, "points": (), "failure": "x"})
    nan = {"base": [float("nan")] * 119, "tuned": [float("inf")] * 119}
    broken = seeded(sound, 101, per_prompt={"clip/test": nan})
    files.write(tmp_path, files.published([failed, broken]).files)
    back = {r.seed: r for r in find_records([tmp_path])}
    assert (back[100].failure, back[100].prompts) == ("x", {})
    assert np.isnan(back[101].per_prompt["clip/test"]["base"]).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d | {"format": FORMAT + 1}, "update flowbench"),
        (lambda d: d | {"format": True}, "update flowbench"),
        (lambda d: d | {"base": "../../../etc/passwd"}, "names no base file"),
        (lambda d: d | {"base": "base-0123456789abcdef.json"}, "cannot be read"),
        (lambda d: d | {"seed": 7}, "of another model, protocol or seed"),
        (lambda d: d | {"per_prompt": {"new/test": [1.0]}}, "its base"),
    ],
)
def test_a_published_file_that_cannot_be_right_is_refused(
    sound: Record, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], complaint: str
):
    files.write(tmp_path, files.published([sound]).files)
    path = tmp_path / files.place(sound)
    path.write_text(as_text(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(UsageError, match=complaint):
        load_record(path)


def test_an_older_form_is_read_by_its_upgrade(sound: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.write(tmp_path, files.published([sound]).files)
    monkeypatch.setattr("flowbench.published.FORMAT", FORMAT + 1)
    monkeypatch.setitem(UPGRADES, FORMAT, lambda document: {**document, "command": "upgraded"})  # type: ignore[arg-type]
    assert load_record(tmp_path / files.place(sound)).command == "upgraded"


def test_the_schema_is_that_of_the_code_and_of_what_is_written(sound: Record):
    assert (ROOT / "leaderboard" / "schema.json").read_text(encoding="utf-8") == schema_text()
    document, base = shortened(sound.model_dump(mode="json"))
    known = json.loads(schema_text())["$defs"]
    assert base is not None
    for name, written in (("PublishedRecord", document), ("Base", base.model_dump())):
        assert set(written) <= set(known[name]["properties"])
        assert set(known[name]["required"]) <= set(written)


# --- the checks -------------------------------------------------------------------------------------------------------


def test_a_contribution_that_keeps_to_the_rules_has_no_fault(sound: Record):
    assert lines(all_seeds(sound)) == []
    failed = {"status": "failed", "failure": "the loss is not finite", "scores": {}, "per_prompt": {}, "points": ()}
    assert lines([*all_seeds(sound)[:9], seeded(sound, 109, **failed)]) == []


FOREIGN = Source(distribution="other", version="1", sha256="0" * 64)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 1}, "is of version 1"),
    "no workload": ({"workload": None}, "made for no workload"),
    "no ruleset": ({"ruleset": None}, "made under no ruleset"),
    "unknown ruleset": ({"ruleset": "mine"}, "ruleset 'mine', which is unknown"),
    "other workload": ({"workload_hash": "0123456789"}, "another version of workload 'shapes-clip'"),
    "unknown workload": ({"workload": "shapes-clap"}, "workload 'shapes-clap', which flowbench does not ship"),
    "config hash": ({"config_hash": "0123456789"}, "has config hash 0123456789, and its settings have"),
    "protocol": ({"protocol_hash": "0123456789"}, "has protocol hash 0123456789"),
    "prompts": ({"prompt_hashes": {"test": "0" * 64}}, "used other prompts as split 'test'"),
    "prompts unknown": ({"prompt_hashes": {}}, "does not say which prompts it used as compositional, test, train"),
    "dirty": ({"commit": "0" * 40 + "+"}, "1 runs are of a changed source tree"),
    "no commit": ({"commit": None}, "1 runs do not know their commit"),
    "commits": ({"commit": "1" * 40}, "mixed commits: 0000000 (9 runs), 1111111 (1 run)"),
    "devices": ({"device": "NVIDIA"}, "mixed devices: cpu x 1 (9 runs), NVIDIA (1 run)"),
    "judge by name": ({"judges": {"clip": {}}}, "has 'clip' as a judge, which was trained on"),
    "judge by weights": ({"judges": {"hpsv2": {"sha256": "9" * 64}}}, "has 'hpsv2' as a judge, which was trained on"),
    "no sources": ({"sources": {}}, "does not say where 'algorithm' comes from"),
    "failed with scores": ({"status": "failed"}, "failed, so that it has one line that says why, and no scores"),
    "no scores": ({"scores": {}}, "has no scores on split 'test'"),
    "no points": ({"points": ()}, "has 0 points of its budget of the 5"),
    "other algorithm": ({"algorithm": "nobodys"}, "is not installed here"),
    "other settings": ({"config": {"algorithm": "raft", "seed": 109}}, "another algorithm, reward, model or seed"),
    "no settings": (
        {"config": {"algorithm": "raft", "reward": "clip", "model": "mini-sd3", "seed": 109, "training": 1}},
        "its setting 'training' is none",
    ),
    "a file for a workload": ({"workload": "../mine.yaml"}, "workload '../mine.yaml', which flowbench does not ship"),
    "a file for a model": ({"model": "/x.yaml"}, "another algorithm, reward, model or seed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_fault_is_a_line_that_names_the_run(name: str, sound: Record):
    changed, complaint = WRONG[name]
    records = [*all_seeds(sound)[:9], seeded(sound, 109, **changed)]
    found = lines(records)
    assert any(complaint in line for line in found), found
    assert all("\n" not in line for line in found)


def changed_score(record: Record, key: str, value: float) -> dict[str, Any]:
    return {"scores": {**record.scores, key: record.scores[key].model_copy(update={"tuned": value})}}


def test_scores_out_of_their_range_or_not_of_their_prompts_are_found(sound: Record):
    for key, value in (("clip/test", 1.5), ("oracle_exact/test/a", -0.2), ("diversity/test", float("nan"))):
        (line,) = (line for line in lines([seeded(sound, 100, **changed_score(sound, key, value))]) if "within" in line)
        assert f"has {key} = {value:g}" in line
    moved = lines([seeded(sound, 100, **changed_score(sound, "clip/test", 0.99))])
    assert any("do not agree with their means" in line for line in moved)
    fewer = {**sound.per_prompt, "clip/test": {"base": [0.5], "tuned": [0.5]}}
    assert any("do not agree" in line for line in lines([seeded(sound, 100, per_prompt=fewer)]))


def test_costs_that_cannot_be_are_found(sound: Record):
    spent, costs = sound.budget, sound.costs
    for changed, complaint in (
        (
            {"budget": spent.model_copy(update={"images": 1440})},
            "has 1440 images in its budget, and the budget is 2880",
        ),
        ({"costs": costs.model_copy(update={"function_evaluations": {"sampling": 9}})}, "take at least 23040"),
        ({"budget": spent.model_copy(update={"seconds": 0.0})}, "how many seconds"),
    ):
        assert any(complaint in line for line in lines([seeded(sound, 100, **changed)])), complaint


def test_settings_that_are_not_the_algorithms_own_are_found(sound: Record):
    overrides = {**load_workload(WORKLOAD).overrides(), "training.learning_rate": 1e-5}
    config = resolve_config("raft", "clip", "mini-sd3", overrides=overrides, seed=100, device="cpu")
    tuned = sound.model_copy(update={"config": config.model_dump(mode="json"), "config_hash": config.hash()})
    found = lines(all_seeds(tuned))
    assert all("has settings that are not the algorithm's own" in line for line in found)
    assert len(found) == 10
    both = lines([*all_seeds(sound), tuned])
    assert any("has several settings under 'defaults'" in line for line in both)
    images = sound.model_copy(
        update={"config": {**sound.config, "training": {**config.training.model_dump(), "images": 64}}}
    )
    assert any("has training.images = 64, and workload 'shapes-clip' 2880" in line for line in lines([images]))


def test_sources_must_be_named_packages_that_are_what_is_installed(sound: Record):
    for source, complaint in (
        (Source(sha256="0" * 64), "has 'algorithm' from a file; put it into a package"),
        (FOREIGN, "has another 'algorithm' than the one that is installed here"),
    ):
        found = lines([seeded(sound, 100, sources={**sound.sources, "algorithm": source})])
        assert any(complaint in line for line in found), found


def test_seeds_are_those_of_the_suite_and_the_published_ones_count(sound: Record):
    records = all_seeds(sound)
    assert any("seeds 104, 105, 106, 107, 108, 109 are missing" in line for line in lines(records[:4]))
    assert lines(records[4:], published=records[:4]) == []
    assert any("seeds 7 are not in the suite's list" in line for line in lines([*records, seeded(sound, 7)]))
    assert any("is there 2 times; keep one" in line for line in lines([*records, records[0]]))
    assert lines([]) == ["there is no record; finish the runs first, see 'flowbench suite show'"]


def test_trials_of_a_search_are_published_too_though_they_are_older_and_scored_on_dev_alone(sound: Record):
    overrides = {**load_workload(WORKLOAD).overrides(), "training.learning_rate": 1e-5}
    alone = {"evaluation.splits": [], "evaluation.judges": [], "evaluation.points": 1}
    config = resolve_config("raft", "clip", "mini-sd3", overrides={**overrides, **alone}, seed=1000, device="cpu")
    blank = failed_record(config, "", "", device="cpu x 1")
    nothing: dict[str, Any] = {"scores": {}, "per_prompt": {}, "prompts": {}, "judges": {}, "points": sound.points[-1:]}
    hashes: dict[str, Any] = {
        name: getattr(blank, name) for name in ("config", "config_hash", "protocol_hash", "sources")
    }
    trial = sound.model_copy(update={**hashes, **nothing, "seed": 1000, "ruleset": "search", "commit": "e" * 40})
    assert lines([*all_seeds(sound), trial]) == []
    foreign = Source(distribution="other", version="1", sha256="0" * 64)
    before = trial.model_copy(update={"sources": {**trial.sources, "algorithm": foreign}, "config_hash": "0123456789"})
    assert lines([*all_seeds(sound), before]) == []


def test_what_cannot_stand_in_the_table_that_is_published_is_found(sound: Record):
    other = [r.model_copy(update={"algorithm": "nft", "commit": "1" * 40}) for r in all_seeds(sound)]
    found = lines(all_seeds(sound), published=other)
    assert any(line.startswith("cannot stand beside what is published: 'shapes-clip'") for line in found), found


def test_ablations_are_published_on_request_with_the_same_seeds_for_all_variants(sound: Record):
    runs = [seeded(sound, seed, workload=None, workload_hash=None, ruleset=None) for seed in range(3)]
    assert lines(runs, ablation=True) == []
    assert files.place(runs[0]).parts[:3] == ("v1", "ablations", "mini-sd3-clip")
    config = {**sound.config, "hyperparameters": {**sound.config["hyperparameters"], "share": 1.0}}
    other = runs[0].model_copy(update={"config": {**config, "seed": 0}, "config_hash": "0123456789"})
    assert any(
        "seeds 1, 2 are missing, which other variants have" in line for line in lines([*runs, other], ablation=True)
    )


def test_names_of_records_never_lead_out_of_the_results(sound: Record):
    hostile = sound.model_copy(update={"workload": "../../x", "algorithm": "/etc/y", "config_hash": "../z"})
    assert ".." not in files.place(hostile).parts
    assert not files.place(hostile).is_absolute()


# --- publishing -------------------------------------------------------------------------------------------------------


def test_submit_publishes_what_is_right_and_a_second_time_changes_nothing(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], flowbench_main: Main
):
    runs, results = save(all_seeds(sound), tmp_path / "runs"), tmp_path / "results"
    assert flowbench_main("submit", runs, "--to", results, "--check") == 0
    assert not results.exists()
    assert flowbench_main("submit", runs, "--to", results) == 0
    assert "10 records passed all checks; 20 files are new" in capsys.readouterr().out  # a noise block for each seed
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert flowbench_main("submit", runs, "--to", results) == 0
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert files.faults_of(results) == []
    done = subprocess.run(["sha256sum", "--check", "--quiet", files.MANIFEST], cwd=results / "v1", check=False)
    assert done.returncode == 0


def test_submit_publishes_nothing_of_a_contribution_with_a_fault(
    sound: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str], flowbench_main: Main
):
    runs = save([*all_seeds(sound)[:9], seeded(sound, 109, commit=None)], tmp_path / "runs")
    assert flowbench_main("submit", runs, "--to", tmp_path / "results") == 1
    said = capsys.readouterr()
    assert "1 runs do not know their commit" in said.out
    assert said.err == "flowbench: 2 checks failed for 10 records; nothing was published\n"
    assert not (tmp_path / "results").exists()


def test_a_published_result_is_never_replaced(sound: Record, tmp_path: Path):
    submit([save(all_seeds(sound), tmp_path / "runs")], tmp_path / "results")
    better = seeded(sound, 100, **changed_score(sound, "oracle_exact/test/a", 0.99))
    (tmp_path / "other").mkdir()
    found = submit([save([better, *all_seeds(sound)[1:]], tmp_path / "other")], tmp_path / "results")
    assert any("is published with another result, and is never replaced" in line for line in found.faults)
    assert load_record(tmp_path / "results" / files.place(sound)).scores["oracle_exact/test/a"].tuned == 0.6


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "was published and is gone"),
        (
            lambda path: path.write_text(path.read_text().replace("100.12", "90.12")),
            "was changed after it was published",
        ),
        (lambda path: shutil.copy(path, path.with_name("more.json")), "is not in MANIFEST"),
    ],
)
def test_what_vanishes_changes_or_appears_is_found(
    sound: Record, tmp_path: Path, damage: Callable[[Path], object], complaint: str
):
    files.write(tmp_path, files.published([sound]).files)
    damage(tmp_path / files.place(sound))
    (line,) = files.faults_of(tmp_path)
    assert complaint in line


@pytest.mark.skipif(shutil.which("git") is None, reason="compares commits")
def test_what_was_published_at_a_commit_is_still_there(sound: Record, tmp_path: Path):
    results = tmp_path / "results"
    files.write(results, files.published([sound, seeded(sound, 101)]).files)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        git(tmp_path, *arguments)
    files.write(results, files.published([seeded(sound, 102)]).files)
    assert check_published(results, "HEAD") == []
    gone = results / files.place(sound)
    gone.unlink()
    manifest = results / "v1" / files.MANIFEST  # nor does it help to strike it off the list
    kept = [line for line in manifest.read_text(encoding="utf-8").splitlines() if gone.name not in line]
    manifest.write_text("\n".join(kept) + "\n", encoding="utf-8")
    (line,) = check_published(results, "HEAD")
    assert line.endswith(f"{gone.name}: was published and is gone; restore it")
    with pytest.raises(UsageError, match="what was published at 'nowhere' cannot be told"):
        check_published(results, "nowhere")


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaderboard(tmp_path: Path) -> Path:
    """A leaderboard of made-up results, beside a README, with its pages."""
    folder = tmp_path / "leaderboard"
    records = fake_records(seeds=2, methods=("acflow", "nft", "somebodys"), workloads=(WORKLOAD,), ruleset="defaults")
    files.write(folder / "results", files.published(records).files)
    (tmp_path / "README.md").write_text(f"# me\n\n{pages.BEGIN}\nold\n{pages.END}\n\nmore\n", encoding="utf-8")
    return folder


def test_pages_are_made_from_records_and_checked(
    leaderboard: Path, capsys: pytest.CaptureFixture[str], flowbench_main: Main
):
    assert flowbench_main("leaderboard", leaderboard, "--check") == 1
    assert "README.md: is missing" in capsys.readouterr().out
    assert flowbench_main("leaderboard", leaderboard, "--write") == 0
    assert flowbench_main("leaderboard", leaderboard, "--check") == 0
    readme = (leaderboard.parent / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# me\n")
    assert "| acflow |" in readme
    assert readme.endswith("more\n")
    picture = leaderboard / "images" / "over-optimisation-shapes-clip-defaults.svg"
    assert picture.is_file()
    assert f"({picture.relative_to(leaderboard)})" in (leaderboard / "over-optimisation.md").read_text(encoding="utf-8")


def test_a_page_that_was_changed_is_found_and_of_the_html_the_data_count(leaderboard: Path):
    made = pages.pages(leaderboard, leaderboard.parent / "README.md")
    for path, text in made.files.items():
        path.write_text(text, encoding="utf-8")
    assert pages.stale(made, leaderboard) == []
    index = leaderboard / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace("<style>", "<style>p{}"), encoding="utf-8")
    assert pages.stale(made, leaderboard) == []
    for name in ("README.md", "claims.md", "index.html"):
        page = leaderboard / name
        page.write_text(page.read_text(encoding="utf-8").replace("acflow", "acflw"), encoding="utf-8")
    assert [line.split(": ")[1][:24] for line in pages.stale(made, leaderboard)] == ["differs from the records"] * 3


def test_a_record_that_breaks_a_rule_keeps_the_pages_from_being_made(leaderboard: Path, flowbench_main: Main):
    other = fake_records(seeds=1, methods=("awm",), workloads=(WORKLOAD,), ruleset="defaults", commit="f" * 40)
    files.write(leaderboard / "results", files.published(other).files)
    assert flowbench_main("leaderboard", leaderboard, "--write") == 2


def test_the_shipped_pages_are_those_of_the_shipped_records(capsys: pytest.CaptureFixture[str], flowbench_main: Main):
    assert flowbench_main("leaderboard", ROOT / "leaderboard", "--check") == 0, capsys.readouterr().out


def test_no_ranking_is_quoted_from_history():
    for name in ("README.md", "leaderboard/README.md"):
        assert "No ranking is published yet" in (ROOT / name).read_text(encoding="utf-8")
    assert "No number below is a ranking" in (HISTORY / "README.md").read_text(encoding="utf-8")
    assert len(find_records([HISTORY])) == 49


@pytest.mark.parametrize(
    "arguments", [("absent", "--check"), (".", "--check", "--write"), (".", ".", "--check"), (".", "--since", "HEAD")]
)
def test_pages_of_nothing_are_a_line(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str], flowbench_main: Main
):
    assert flowbench_main("leaderboard", *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- the way of an outsider -------------------------------------------------------------------------------------------

SUITE = "runs: [{workloads: [rehearsal-plane], algorithms: [better-half], seeds: {first: 100, count: 2}}]\n"


def git(folder: Path, *arguments: str) -> None:
    own = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *own, *arguments], cwd=folder, check=True, capture_output=True)


def package(folder: Path) -> Path:
    """The example of docs/write-an-algorithm.md as a wheel with an entry point."""
    page = (ROOT / "docs" / "write-an-algorithm.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    wheel, info = folder / "better_half-1.0-py3-none-any.whl", "better_half-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("better_half/__init__.py", "")
        archive.writestr("better_half/method.py", code)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: better-half\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[flowbench.algorithms]\nbetter-half = better_half.method\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="a record knows its commit by git")
def test_an_outsiders_method_goes_from_check_to_a_row_with_four_commands(tmp_path: Path):
    checkout, ignored = tmp_path / "checkout", shutil.ignore_patterns("__pycache__")
    for name in ("flowbench", "algorithms", "rewards"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        git(checkout, *arguments)
    python = tmp_path / "env" / "bin" / "python"
    venv.create(python.parent.parent, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(package(tmp_path))], check=True, capture_output=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (site / "dependencies.pth").write_text(f"{checkout}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(SUITE, encoding="utf-8")

    def flowbench(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [str(python), "-m", "flowbench", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert " pass" in flowbench("check", "better-half")
    flowbench("suite", "run", "suite.yaml", "--output", "runs")
    assert "2 records passed all checks" in flowbench("submit", "runs", "--rehearsal", "--to", "results")
    assert "better-half" in flowbench("leaderboard", "results")
    (one, other) = find_records([tmp_path / "results"])
    assert (one.sources["algorithm"].distribution, one.sources["algorithm"].version) == ("better-half", "1.0")
    assert one.commit == other.commit
    assert one.seed + 1 == other.seed == 101
