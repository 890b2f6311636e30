from __future__ import annotations

import csv
import io
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbench.errors import UsageError
from flowbench.evaluation.statistics import mean_ci95
from flowbench.record import Record, Score, Spent, find_records, load_record
from flowbench.reporting.leaderboard import cells, columns, rows, to_csv, to_markdown


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


def test_a_row_is_the_mean_over_its_seeds_with_its_bootstrap_interval():
    gains = [0.1, 0.3, 0.2]
    (row,) = rows([record(seed=s, gain=g) for s, g in enumerate(gains)], "test")
    assert row.seeds == 3
    assert row.gains["oracle_exact"].mean == pytest.approx(0.2)
    assert row.gains["clip"].mean == pytest.approx(0.4)
    assert row.gains["oracle_exact"].ci95 == pytest.approx(mean_ci95(np.array(gains)))
    assert row.retained["diversity"].mean == pytest.approx(0.75)
    assert row.seconds == pytest.approx(11.0)


def test_a_single_seed_has_no_interval():
    (row,) = rows([record()], "test")
    assert row.gains["oracle_exact"].ci95 is None
    assert row.gains["oracle_exact"].text() == "+0.100"


def test_a_table_is_a_function_of_the_records_and_not_of_their_order():
    records = [record(a, s, g) for (a, g), s in itertools.product([("acflow", 0.3), ("ddpo", 0.2)], range(3))]
    tables = set()
    for seed in range(5):
        random.Random(seed).shuffle(records)
        tables.add(to_csv(rows(records, "test")))
        tables.add(to_markdown(rows(records, "test")))
    assert len(tables) == 2


def test_better_truth_stands_higher():
    table = rows([record("low", gain=0.1), record("high", gain=0.3), record("middle", gain=0.2)], "test")
    assert [row.algorithm for row in table] == ["high", "middle", "low"]


def test_without_an_oracle_the_reward_trained_on_decides_the_order():
    def plain(algorithm: str, gain: float) -> Record:
        whole = record(algorithm, gain=gain)
        return whole.model_copy(update={"scores": {"clip/test": whole.scores["clip/test"]}})

    assert [row.algorithm for row in rows([plain("low", 0.1), plain("high", 0.3)], "test")] == ["high", "low"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"reward": "jpeg"},
        {"protocol_hash": "other"},
        {"config_hash": "other"},
        {"budget": record().budget.model_copy(update={"images": 1280})},
    ],
)
def test_records_that_cannot_be_compared_are_rows_of_their_own(changed: dict[str, Any]):
    assert len(rows([record(seed=0), record(seed=1)], "test")) == 1
    assert len(rows([record(seed=0), record(seed=1, **changed)], "test")) == 2


def test_another_split_is_another_table():
    (row,) = rows([record()], "compositional")
    assert set(row.gains) == {"oracle_exact"}
    assert row.gains["oracle_exact"].mean == pytest.approx(-0.1)


def test_an_unknown_split_or_an_empty_list_is_refused():
    with pytest.raises(UsageError, match="no record has the split 'tset'; there are: compositional, test"):
        rows([record()], "tset")
    with pytest.raises(UsageError, match="no records found"):
        rows([], "test")


def test_the_metric_that_was_trained_on_is_marked():
    (row,) = rows([record()], "test")
    shown = dict(zip(columns([row]), cells(row, columns([row]))[5:-1], strict=True))
    assert shown["clip"].endswith("*")
    assert not any(value.endswith("*") for name, value in shown.items() if name != "clip")
    assert shown["diversity"] == "x 0.750"


def test_markdown_is_a_table_whatever_the_names_contain():
    table = rows([record("odd|name", gain=0.1), record("plain", gain=0.2)], "test")
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "odd\\|name" in lines[3]


def test_csv_parses_back_to_the_unrounded_numbers():
    table = rows([record("a,b", s, g) for s, g in enumerate([0.1, 0.123456789, 0.3])] + [record("single")], "test")
    parsed = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(parsed) == sum(len(row.gains) for row in table)
    for line in parsed:
        (row,) = (r for r in table if r.algorithm == line["algorithm"])
        cell = row.gains[line["metric"]]
        assert float(line["gain"]) == cell.mean
        assert (line["low"], line["high"]) == (tuple(map(str, cell.ci95)) if cell.ci95 else ("", ""))
        assert (int(line["seeds"]), int(line["images"])) == (row.seeds, 640)
        assert float(line["seconds"]) == row.seconds
        assert (line["config_hash"], line["protocol_hash"]) == (row.config_hash, "protocol")


def test_records_are_found_in_run_folders_and_in_a_results_folder(tmp_path: Path):
    record("one").save(tmp_path / "runs" / "deep" / "down" / "record.json")
    record("two").save(tmp_path / "board" / "results" / "two-s0.json")
    record("three").save(tmp_path / "three.json")
    places = [tmp_path / "runs", tmp_path / "board", tmp_path / "three.json"]
    assert [r.algorithm for r in find_records(places)] == ["one", "two", "three"]
    with pytest.raises(UsageError, match="does not exist"):
        find_records([tmp_path / "absent"])


def test_a_record_survives_its_file(tmp_path: Path):
    original = record(gain=0.1 + 0.2)
    original.save(tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == original


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"algorithm": 3}', "\udcff"])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str):
    path = tmp_path / "record.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"record\.json' is not a flowbench record") as raised:
        find_records([tmp_path])
    assert len(str(raised.value).splitlines()) == 1
