"""The tables that end a run."""

import io

import pytest
from rich.console import Console

from flowbench.cli.display import progress, runs
from flowbench.record import Score
from flowbench.testbeds.shapes.world import CATEGORIES

METRICS = ("clip", "oracle_exact", "oracle_soft", "w2", "diversity", "jpeg")


def shown(monkeypatch: pytest.MonkeyPatch, width: int, color: bool = False) -> str:
    """The tables for two splits at this width."""
    values = {}
    for split in ("test", "compositional"):
        for metric in METRICS:
            base = -123.4567 if metric == "jpeg" else 0.4
            values[f"{metric}/{split}"] = Score(base=base, tuned=base + 0.05, diff_ci95=(0.01, 0.09))
            for category in CATEGORIES if metric.startswith("oracle") else ():
                values[f"{metric}/{split}/{category}"] = Score(base=0.41, tuned=0.36, diff_ci95=(-0.1, -0.01))
    output = io.StringIO()
    system = "standard" if color else None
    monkeypatch.setattr(runs, "console", Console(file=output, width=width, force_terminal=color, color_system=system))
    runs.score_table(values, "clip", "acflow on clip, mini-sd3, seed 0")
    return output.getvalue()


def test_the_tables_fit_80_columns_without_wrapping_or_cutting(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("compos") == 0
    assert len([line for line in text.splitlines() if line.split()[:1] == ["clip"]]) == 2


def test_soft_verdicts_join_the_categories_at_100_columns(monkeypatch: pytest.MonkeyPatch):
    narrow, wide = shown(monkeypatch, 80), shown(monkeypatch, 100)
    assert max(map(len, wide.splitlines())) <= 100
    assert "comp. exact" in narrow
    assert "comp. soft" not in narrow
    assert "comp. soft" in wide
    assert wide.count("0.41 -> 0.36 -0.05") == 4 * len(CATEGORIES)


def test_a_change_is_coloured_only_when_its_interval_excludes_zero(monkeypatch: pytest.MonkeyPatch):
    lines = shown(monkeypatch, 100, color=True).splitlines()
    green, red = "\x1b[32m", "\x1b[31m"
    assert all(green in line for line in lines if "diversity" in line)
    assert all(red in line for line in lines if "counting" in line)
    assert not any(green in line for line in lines if "w2" in line)  # moving away from the base is neither


def test_a_log_file_gets_a_line_at_every_tenth_of_the_work_and_a_terminal_none():
    def lines(terminal: bool) -> list[str]:
        output = io.StringIO()
        out = Console(file=output, width=80, force_terminal=terminal)
        bars = progress.LiveProgress(out)
        for step in range(1, 41):
            bars.show("vae", step, 40, f"loss {1 / step:.2f}")
        return output.getvalue().splitlines()

    assert lines(False) == [f"vae {step}/40 loss {1 / step:.2f}" for step in range(4, 41, 4)]
    assert lines(True) == []
