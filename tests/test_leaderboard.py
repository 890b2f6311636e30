"""Tables from records: what is averaged, compared and shown, and that a name does no more than stand there."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from scipy import stats

from flowbench.cli.display import leaderboard as display
from flowbench.errors import UsageError
from flowbench.evaluation.statistics import LIKE, THESE, compare, gains_from_records, mean_gain
from flowbench.record import Point, Record, Score, Spent, find_records, load_record, read_records
from flowbench.reporting.columns import interval_text
from flowbench.reporting.documents import to_csv, to_latex, to_markdown
from flowbench.reporting.groups import differences
from flowbench.reporting.leaderboard import Row, Table, board
from flowbench.reporting.targets import Target
from flowbench.reporting.words import titles, verdict, warnings

Main = Callable[..., int]
PROMPTS = 24
SHIPPED = Path(__file__).parent.parent / "leaderboard" / "history"


def record(algorithm: str = "acflow", seed: int = 0, gain: float = 0.1, **changed: Any) -> Record:
    """A record with made-up scores; `gain` is that of the oracle's exact verdicts."""

    def score(base: float, tuned: float) -> Score:
        return Score(base=base, tuned=tuned, diff_ci95=(tuned - base - 0.01, tuned - base + 0.01))

    spent = {"images": 640, "reward_calls": 640, "function_evaluations": 1, "seconds": 10.0 + seed}
    spent |= {"evaluation_seconds": 1.0, "overhead": 0.1, "peak_memory_mb": 100.0}
    values: dict[str, Any] = {
        "algorithm": algorithm,
        "reward": "clip",
        "model": "mini-sd3",
        "seed": seed,
        "budget": Spent(**spent),
        "scores": {
            "clip/test": score(0.5, 0.5 + 2 * gain),
            "oracle_exact/test": score(0.25, 0.25 + gain),
            "oracle_exact/test/single": score(0.1, 0.9),
            "oracle_soft/test": score(0.4, 0.4 + gain),
            "w2/test": score(0.0, 0.01),
            "diversity/test": score(2.0, 1.5),
            "oracle_exact/compositional": score(0.2, 0.2 - gain),
        },
        "per_prompt": {},
        "prompts": {},
        "config": {},
        "config_hash": f"hash-of-{algorithm}",
        "protocol_hash": "protocol",
        "prompt_hashes": {},
        "reward_provenance": {},
        "command": "flowbench run",
        "commit": None,
        "device": "cpu",
        "versions": {},
        "finished": "2025-01-01T00:00:00+00:00",
    }
    return Record(**{**values, **changed})


def prompted(algorithm: str = "acflow", seed: int = 0, gain: float = 0.1, **changed: Any) -> Record:
    """As `record`, with scores of every prompt: of two held-out judges, the truth, the reward and the diversity."""
    draw = np.random.default_rng([seed, *algorithm.encode()])
    hard = np.random.default_rng(7).normal(size=PROMPTS)
    per_prompt, scores = {}, {}
    for metric, base, scale in [("clip", 0.5, 2), ("oracle_exact", 0.4, 1), ("hpsv2", 0.3, 0.1), ("aesthetic", 5, 3)]:
        before = base + 0.1 * scale * hard
        after = before + scale * (gain + 0.02 * draw.normal(size=PROMPTS))
        per_prompt[f"{metric}/test"] = {"base": before.tolist(), "tuned": after.tolist()}
    diversity = 1 + 0.1 * np.abs(hard)
    per_prompt["diversity/test"] = {"base": diversity.tolist(), "tuned": (0.9 * diversity).tolist()}
    for key, sides in per_prompt.items():
        base, tuned = np.mean(sides["base"]), np.mean(sides["tuned"])
        scores[key] = Score(base=base, tuned=tuned, diff_ci95=(tuned - base, tuned - base))
    values = {"scores": scores, "per_prompt": per_prompt, "prompts": {"test": [f"p{k}" for k in range(PROMPTS)]}}
    return record(algorithm, seed, gain, **{**values, "judges": {"hpsv2": {}, "aesthetic": {}}, **changed})


def one_table(records: list[Record], **options: Any) -> Table:
    """The only table of these records."""
    (table,) = board(records, **options).tables
    return table


def one_row(records: list[Record], **options: Any) -> Row:
    """The only row of the only table."""
    (row,) = one_table(records, **options).rows
    return row


def failed(algorithm: str = "acflow", seed: int = 0, **changed: Any) -> Record:
    """The record of a run without a result."""
    return record(algorithm, seed, scores={}, status="failed", failure="out of memory", **changed)


# --- what is averaged -------------------------------------------------------------------------------------------------


def test_a_row_is_the_mean_over_its_seeds_with_students_interval_where_prompts_are_not_known():
    gains = [0.1, 0.3, 0.2]
    row = one_row([record(seed=s, gain=g) for s, g in enumerate(gains)])
    found = row.gains["oracle_exact"]
    assert (row.seeds, found.value) == (3, pytest.approx(0.2))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(gains), stats.sem(gains)))
    assert row.gains["clip"].value == pytest.approx(0.4)
    assert row.retained["diversity"].value == pytest.approx(0.75)
    assert row.seconds == pytest.approx(11.0)


@pytest.mark.parametrize("over", [LIKE, THESE])
def test_intervals_ranks_and_the_first_place_are_those_of_the_statistics(over: Any):
    gains = [("best", 0.3), ("good", 0.28), ("worse", 0.1)]
    records = [prompted(a, s, g) for (a, g), s in itertools.product(gains, range(3))]
    table = one_table(records, over=over)
    ranking = compare(gains_from_records(records, "oracle_exact", "test"), over)
    assert [row.standing for row in table.rows] == list(ranking.standings)
    clip = gains_from_records(records, "clip", "test")
    for row in table.rows:
        assert row.gains["clip"] == mean_gain(clip, row.algorithm, over)
    assert verdict(table).startswith(f"First place by oracle_exact: {', '.join(ranking.first)}")


def test_a_single_seed_has_no_interval_and_the_table_says_so():
    row = one_row([prompted()])
    assert row.gains["oracle_exact"].low is None
    assert interval_text(one_row([record()]).gains["oracle_exact"]) == "+0.100"
    table = one_table([prompted("a"), prompted("b")])
    assert "One seed: no intervals, and no method can be told from another" in verdict(table)


def test_shares_of_diversity_have_the_interval_of_a_ratio():
    draw = np.random.default_rng(0)
    base = draw.uniform(1, 2, (4, PROMPTS))
    tuned = 0.8 * base + 0.05 * draw.normal(size=(4, PROMPTS))
    records = [
        prompted(seed=s, per_prompt={"diversity/test": {"base": base[s].tolist(), "tuned": tuned[s].tolist()}})
        for s in range(4)
    ]
    kept = one_row(records).retained["diversity"]
    means = (tuned.mean(0), base.mean(0))
    boots = [m[0][i].mean() / m[1][i].mean() for m in [means] for i in draw.integers(0, PROMPTS, (4000, PROMPTS))]
    assert kept.value == pytest.approx(tuned.mean() / base.mean())
    assert (kept.high - kept.low) / 2 == pytest.approx(2 * np.std(boots), rel=0.2)


@pytest.mark.parametrize("base", [0.0, float("nan"), float("inf")])
def test_a_base_model_without_diversity_divides_nothing(base: float):
    broken = record(scores={"clip/test": Score(base=1, tuned=2, diff_ci95=(0, 1))}).scores
    broken = {**broken, "diversity/test": Score(base=base, tuned=1.0, diff_ci95=(0, 1))}
    table = one_table([record(scores=broken), record(seed=1, scores=broken)])
    text = to_markdown(board([record(scores=broken), record(seed=1, scores=broken)]))
    assert ("base has none" if base == 0 else "not finite in 2") in text
    assert table.rows[0].gains["clip"].value == 1
    assert to_csv(board([record(scores=broken)])).count("nan") == 0


def test_held_out_is_the_judges_mean_gain_in_deviations_of_the_base_model():
    row = one_row([prompted(seed=s, gain=0.1) for s in range(3)])
    spread = np.random.default_rng(7).normal(size=PROMPTS).std(ddof=1)
    assert row.gains["held-out"].value == pytest.approx(0.1 / (0.1 * spread), abs=0.1)


def test_a_table_is_a_function_of_the_records_and_not_of_their_order():
    records = [prompted(a, s, g) for (a, g), s in itertools.product([("acflow", 0.3), ("ddpo", 0.2)], range(3))]
    texts = set()
    for seed in range(4):
        random.Random(seed).shuffle(records)
        texts |= {form(board(records)) for form in (to_csv, to_markdown, to_latex)}
    assert len(texts) == 3


def test_better_truth_stands_higher_and_any_metric_may_decide():
    records = [record("low", gain=0.1), record("high", gain=0.3), record("middle", gain=0.2)]
    assert [row.algorithm for row in one_table(records).rows] == ["high", "middle", "low"]
    assert [row.algorithm for row in one_table(records, by="w2").rows] == ["high", "low", "middle"]  # all the same
    with pytest.raises(UsageError, match="no record has the metric 'clop'; there are: clip"):
        board(records, by="clop")


def test_without_an_oracle_the_reward_trained_on_decides_the_order():
    def plain(algorithm: str, gain: float) -> Record:
        whole = record(algorithm, gain=gain)
        return whole.model_copy(update={"scores": {"clip/test": whole.scores["clip/test"]}})

    assert [row.algorithm for row in one_table([plain("low", 0.1), plain("high", 0.3)]).rows] == ["high", "low"]


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "tables", "rows"),
    [
        ({"model": "other"}, 2, 2),
        ({"reward": "jpeg"}, 2, 2),
        ({"protocol_hash": "other"}, 2, 2),
        ({"prompt_hashes": {"train": "other"}}, 2, 2),
        ({"reward_provenance": {"sha256": "other"}}, 2, 2),
        ({"budget": record().budget.model_copy(update={"images": 1280})}, 2, 2),
        ({"workload": "other"}, 2, 2),
        ({"config_hash": "other"}, 1, 2),
        ({"sources": {"algorithm": {"sha256": "other"}}}, 1, 2),
    ],
)
def test_records_that_cannot_be_averaged_are_rows_or_tables_of_their_own(
    changed: dict[str, Any], tables: int, rows: int
):
    same = board([record(seed=0), record(seed=1)])
    assert [len(table.rows) for table in same.tables] == [1]
    apart = board([record(seed=0), record(seed=1, **changed)])
    assert (len(apart.tables), sum(len(table.rows) for table in apart.tables)) == (tables, rows)
    assert len(set(titles(apart))) == tables


def test_one_reward_written_as_a_sum_has_the_same_weights():
    alone, summed = {"sha256": "w"}, {"clip": {"weight": 1.0, "sha256": "w"}}
    assert len(one_table([record("a", reward_provenance=alone), record("b", reward_provenance=summed)]).rows) == 2


def test_a_record_given_twice_counts_once_and_of_different_results_the_newest():
    row = one_row([record(), record(), record(seed=1)])
    assert row.seeds == 2
    newer = record(gain=0.5, finished="2025-02-01T00:00:00+00:00")
    found = board([newer, record()])
    assert found.tables[0].rows[0].gains["oracle_exact"].value == pytest.approx(0.5)
    assert found.notes == ("several results of the same run, the newest is shown: acflow seed 0",)


def test_seeds_of_other_weights_are_not_taken_for_the_same_run():
    found = board(
        [record(reward_provenance={"sha256": "one"}), record(reward_provenance={"sha256": "other"}, gain=0.3)]
    )
    assert [len(table.rows) for table in found.tables] == [1, 1]
    assert found.notes == ()


def test_rows_of_one_algorithm_are_told_apart_by_what_differs():
    one, other = ({"training": {"ema": e, "images": 640}, "hyperparameters": {"tau": 1.0}} for e in (0.97, 0.98))
    records = [record(config=one), record(config=other, config_hash="other"), record("ddpo")]
    labels = {row.label for row in one_table(records).rows}
    assert labels == {"acflow (training.ema=0.97)", "acflow (training.ema=0.98)", "ddpo"}
    assert differences([{"hyperparameters": {"tau": 1}}, {"hyperparameters": {"tau": 2, "new": 3}}]) == [
        "algorithm.tau=1",
        "algorithm.tau=2",
    ]
    unlike = one_table([record(), record(config_hash="other")])  # the same settings, as far as they are written
    assert len({row.label for row in unlike.rows}) == 2


def test_runs_that_failed_are_counted_and_shown():
    records = [prompted(seed=0), prompted(seed=1), failed(seed=2), failed("ddpo", 0), prompted(seed=3), failed(seed=3)]
    table = one_table(records)
    acflow, ddpo = table.rows
    assert (acflow.seeds, acflow.failed, ddpo.seeds, ddpo.failed) == (3, 1, 0, 1)  # seed 3 finished in the end
    assert acflow.gains["clip"].failed == 1
    assert ddpo.standing is None
    said = to_markdown(board(records))
    assert "| ddpo | - | 0 | 1 of 1 |" in said
    assert "Failed: 1 of 4 runs of acflow, 1 of 1 runs of ddpo" in said
    assert one_row([failed()]).failed == 1


def test_mixed_commits_devices_and_versions_are_named_and_refused_under_a_ruleset():
    one, other = {"commit": "a" * 40, "versions": {"torch": "1"}}, {"commit": "b" * 40, "device": "gpu"}
    table = one_table([record(**one), record(seed=1, **other), record("ddpo", **one)])
    assert warnings(table)[:2] == [
        "Careful, mixed commits: aaaaaaa (2 runs), bbbbbbb (1 run).",
        "Careful, mixed devices: cpu (2 runs), gpu (1 run).",
    ]
    assert "mixed versions of torch; torch: 1 (2 runs), unknown (1 run)" in warnings(table)[2]
    with pytest.raises(UsageError, match="under ruleset 'defaults' has mixed commits: aaaaaaa"):
        board([record(ruleset="defaults", **one), record(seed=1, ruleset="defaults", **other)])
    with pytest.raises(UsageError, match="1 runs of a changed source tree"):
        board([record(ruleset="defaults", commit="a" * 40 + "+")])
    assert not warnings(one_table([record(ruleset="defaults", **one), record(seed=1, ruleset="defaults", **one)]))


def test_images_and_seconds_to_a_target_are_medians_over_runs_and_failures_are_infinite():
    def run(seed: int, scores: list[float]) -> Record:
        points = tuple(
            Point(
                images=100 * k,
                iteration=k,
                seconds=2.0 * k,
                function_evaluations=1,
                scores={"oracle_exact": value, "diversity": 0.95},
            )
            for k, value in enumerate(scores, 1)
        )
        return record(seed=seed, points=points, dev_base={"oracle_exact": 0.4, "diversity": 1.0})

    runs = [run(0, [0.5, 0.6]), run(1, [0.6, 0.7]), run(2, [0.4, 0.45])]
    target = Target("oracle_exact", 0.5)
    costs = one_row(runs, target=target).to_target
    assert costs["images"].costs == pytest.approx((100, 50, np.inf))
    assert costs["seconds"].median == pytest.approx(2.0)
    assert "100 (2 of 3)" in to_markdown(board(runs, target=target))
    assert one_row([*runs, failed(seed=3)], target=target).to_target["images"].share == 0.5
    assert not one_row([record()], target=target).to_target


def test_another_split_is_another_table():
    row = one_row([record()], split="compositional")
    assert set(row.gains) == {"oracle_exact"}
    assert row.gains["oracle_exact"].value == pytest.approx(-0.1)


def test_an_unknown_split_or_an_empty_list_is_refused():
    with pytest.raises(UsageError, match="no record has the split 'tset'; there are: compositional, test"):
        board([record()], "tset")
    with pytest.raises(UsageError, match="no records found"):
        board([], "test")


# --- what is shown ----------------------------------------------------------------------------------------------------


def printed(records: list[Record], width: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """What the terminal shows at a width, without colours."""
    monkeypatch.setattr(display, "console", Console(file=io.StringIO(), width=width))
    return display.as_text(board(records), **options)


def many() -> list[Record]:
    """Twelve methods of three seeds."""
    return [prompted(f"method-{k}", s, 0.03 * k) for k, s in itertools.product(range(12), range(3))]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_every_number_is_whole_at_every_width(width: int, transpose: bool, monkeypatch: pytest.MonkeyPatch):
    text = printed(many(), width, monkeypatch, transpose=transpose)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    table = one_table(many())
    for row in table.rows:
        found = row.gains["oracle_exact"]
        assert any(re.search(rf"(?<!\S){re.escape(interval_text(found, form))}(?!\S)", text) for form in display.FORMS)
    assert ("Left out: " in text) == (width <= 100 and not transpose)


def test_what_is_left_out_is_named_and_columns_are_chosen(monkeypatch: pytest.MonkeyPatch):
    records = [prompted(f"method-{k}", s, 0.03 * k) for k, s in itertools.product(range(3), range(3))]
    narrow = printed(records, 60, monkeypatch)
    assert "Left out: aesthetic, hpsv2, intervals; see --transpose, --columns aesthetic,hpsv2" in " ".join(
        narrow.split()
    )
    chosen = ["hpsv2", "iqm", "improvement", "difference", "p"]
    text = printed(records, 60, monkeypatch, keys=chosen)  # in two blocks
    assert text.count("method-1") == 2 + text.split("First place")[1].count("method-1")
    assert "±" in text
    assert "Left out" not in text


def test_the_metric_that_was_trained_on_is_marked():
    heading = next(line for line in to_markdown(board([record()])).splitlines() if line.startswith("| algorithm"))
    assert "| clip* |" in heading.replace("\\", "")
    assert heading.count("*") == 1
    assert "x 0.750" in to_markdown(board([record()]))


def test_csv_parses_back_to_the_unrounded_numbers():
    records = [record("a,b", s, g) for s, g in enumerate([0.1, 0.123456789, 0.3])] + [record("single")]
    (table,) = board(records).tables
    parsed = list(csv.DictReader(io.StringIO(to_csv(board(records)))))
    assert len(parsed) == sum(len(row.gains) for row in table.rows)
    for line in parsed:
        (row,) = (r for r in table.rows if r.algorithm == line["algorithm"])
        found = row.gains[line["metric"]]
        assert float(line["gain"]) == found.value
        assert line["low"] == ("" if found.low is None else str(found.low))
        assert (int(line["seeds"]), int(line["images"]), float(line["seconds"])) == (row.seeds, 640, row.seconds)
        assert line["protocol_hash"] == "protocol"


HOSTILE = [
    "[/]x",
    "[red]a[/red]",
    "\x1b[31mred\x1b]0;title\x07",
    "a|b",
    "line\nbreak\r\n| forged | row |",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "\\input{/etc/passwd} & % $x$ _ ^ ~ #",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1)) `x` *b*",
    "\u202eevil\u2028next",
    "end\\",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_in_every_format(name: str, monkeypatch: pytest.MonkeyPatch):
    metrics = {f"{name.replace('/', '')}/test": Score(base=0, tuned=1, diff_ci95=(0, 1))}
    hostile = {"model": name, "commit": name, "device": name, "versions": {name: name}, "workload": name}
    hostile |= {"config": {"training": {name: name}}, "reward": "clip"}
    records = [record(name, s, **hostile) for s in range(2)]
    records += [
        r.model_copy(update={"scores": {**r.scores, **metrics}, "config_hash": "x", "config": {}}) for r in records
    ]
    records += [failed(name, 9, **{**hostile, "device": "other"})]
    shown = board(records)
    assert len(shown.tables[0].rows) == 2
    texts = {
        "terminal": printed(records, 80, monkeypatch) + printed(records, 80, monkeypatch, transpose=True),
        "markdown": to_markdown(shown),
        "csv": to_csv(shown),
        "latex": to_latex(shown),
    }
    for text in texts.values():
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]
    tables = [line for line in texts["markdown"].splitlines() if line.startswith("|")]
    assert len(tables) == 4
    assert len({re.sub(r"\\.", "", line).count("|") for line in tables}) == 1
    assert not re.search(r"(?<!\\)<(?!0\.001)|(?<!\\)\]\(", texts["markdown"])
    lines = list(csv.reader(io.StringIO(texts["csv"])))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert not [c for line in lines for c in line if c[:1] in ("=", "@", "\t") or (c[:1] in "+-" and not _is_number(c))]
    body = [line for line in texts["latex"].splitlines() if line.endswith("\\\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
    assert not re.search(r"\\input|(?<!\\)[#%_](?! Needs)", texts["latex"].replace("% Needs", ""))


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


# --- from files -------------------------------------------------------------------------------------------------------


def test_records_are_found_in_run_folders_and_wherever_they_begin_as_records_do(tmp_path: Path):
    record("one").save(tmp_path / "runs" / "deep" / "down" / "record.json")
    record("two").save(tmp_path / "board" / "results" / "two-s0.json")
    record("three").save(tmp_path / "three.json")
    places = [tmp_path / "runs", tmp_path / "board", tmp_path / "three.json"]
    assert [r.algorithm for r in find_records(places)] == ["one", "two", "three"]
    assert len(find_records([tmp_path, *places])) == 3  # a file is read once, however it is named
    with pytest.raises(UsageError, match="does not exist"):
        find_records([tmp_path / "absent"])


def test_other_programs_files_in_a_folder_called_results_are_no_records(tmp_path: Path):
    place = tmp_path / "results" / "mine"
    record("one").save(place / "one.json")
    for name, text in {
        "list": "[1]",
        "object": '{"a": 1}',
        "empty": "",
        "report": '{"rows": [{"algorithm": 1}]}',
    }.items():
        (place / f"{name}.json").write_text(text, encoding="utf-8")
    found = read_records([tmp_path])
    assert [r.algorithm for r in found.records] == ["one"]
    assert found.faults == ()


def test_a_record_survives_its_file(tmp_path: Path):
    original = record(gain=0.1 + 0.2)
    original.save(tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == original


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"algorithm": 3}', "\udcff"])
def test_a_file_that_is_no_record_is_named_and_the_others_are_shown(
    tmp_path: Path, content: str, flowbench_main: Main, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "broken" / "record.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"record\.json' is not a flowbench record: .") as raised:
        find_records([tmp_path])
    assert len(str(raised.value).splitlines()) == 1
    assert flowbench_main("leaderboard", tmp_path) == 2
    assert "is not a flowbench record" in capsys.readouterr().err
    record("fine").save(tmp_path / "fine" / "record.json")
    assert flowbench_main("leaderboard", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "fine" in out
    assert re.fullmatch(r"flowbench: left out: .*record\.json' is not a flowbench record: .*\n", err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "latx"], "unknown format 'latx'; did you mean 'latex'?"),
        (["--columns", "clop"], "unknown column 'clop'; did you mean 'clip'?"),
        (["--columns", "clip", "--format", "csv"], "--columns does not apply to csv"),
        (["--transpose", "--format", "markdown"], "--transpose applies to the terminal"),
        (["--over", "all"], "unknown value 'all' of --over"),
        (["--target", "clip"], "is not of the form METRIC=VALUE"),
        (["--target", "clip=nan"], "is not of the form METRIC=VALUE"),
    ],
)
def test_what_the_command_does_not_take_is_named(
    arguments: list[str], complaint: str, flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record().save(tmp_path / "record.json")
    assert flowbench_main("leaderboard", tmp_path, *arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["txt", "md", "csv", "tex"])
def test_the_output_is_written_in_the_format_of_its_ending_and_nothing_is_printed(
    ending: str, flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record().save(tmp_path / "record.json")
    path = tmp_path / f"board.{ending}"
    assert flowbench_main("leaderboard", tmp_path, "--output", path) == 0
    assert capsys.readouterr().out == ""
    text = path.read_text(encoding="utf-8")
    begins = {"txt": "mini-sd3, trained", "md": "### mini-sd3", "csv": "workload,", "tex": "% Needs"}
    assert text.startswith(begins[ending])


def test_the_command_needs_neither_torch_nor_scipys_statistics():
    code = (
        "import sys; sys.argv = ['flowbench', 'leaderboard', *sys.argv[1:]]\n"
        "from flowbench.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'scipy.stats', 'scipy.optimize', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, SHIPPED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_shipped_records_make_two_tables_whose_first_place_is_shared():
    clip, oracle = board(find_records([SHIPPED])).tables
    assert (len(clip.rows), len(oracle.rows)) == (12, 1)
    assert sum(row.standing.shares_first for row in clip.rows) > 1
    assert json.dumps(verdict(clip)).count("share it") == 1
