"""Our defaults against those of the published codes: one table, with file and commit of every value.

A row without a model is about the algorithm's own `Config`. Where ours differs, `deviation` is the number under which
the header of the algorithm's file says so.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowbench.config import resolve_config
from flowbench.models.presets import AnalyticPreset, load_preset
from flowbench.registry import algorithms

TABLE = Path(__file__).parent / "data" / "reference_defaults.csv"
ROWS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


def value_of(text: str) -> Any:
    """YAML 1.1 reads 1e-05 as text."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def default(algorithm: str, model: str, setting: str) -> Any:
    """What a run gets if nobody says anything."""
    section, name = setting.split(".")
    if not model:
        return algorithms.get(algorithm).cls.Config.model_fields[name].default
    reward = "linear" if isinstance(load_preset(model), AnalyticPreset) else "clip"
    config = resolve_config(algorithm, reward, model, overrides={})
    if section == "algorithm":
        return config.hyperparameters[name]
    value = getattr(config.training, name)
    return getattr(load_preset(model), name, None) if value is None else value


def header(algorithm: str) -> str:
    """The docstring of the algorithm's file."""
    return sys.modules[algorithms.get(algorithm).cls.__module__].__doc__ or ""


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(filter(None, (r["algorithm"], r["model"], r["setting"]))))
def test_a_default_is_the_reference_codes_or_a_numbered_deviation(row: dict[str, str]):
    ours, theirs = default(row["algorithm"], row["model"], row["setting"]), value_of(row["value"])
    if not row["deviation"]:
        assert ours == theirs
    else:
        assert ours != theirs, "no deviation any more"
        assert re.search(rf"^{row['deviation']}\. ", header(row["algorithm"]), re.MULTILINE)


def test_every_row_names_its_source():
    for row in ROWS:
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
        assert row["repository"].count("/") == 1
        assert row["file"].endswith(".py")
        assert row["where"]
