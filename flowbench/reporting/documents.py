"""A leaderboard as Markdown, CSV and LaTeX; foreign names are escaped for each (escape.py)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from flowbench.reporting import escape
from flowbench.reporting.columns import Column, choose
from flowbench.reporting.leaderboard import Board, Row, Table
from flowbench.reporting.words import legend, notes, titles, verdict, warnings


def to_markdown(board: Board, keys: Sequence[str] | None = None) -> str:
    """A section for each table, with its verdict, legend and warnings; `keys` as in `--columns`."""
    parts = []
    for title, table in zip(titles(board), board.tables, strict=True):
        shown = choose(table, keys)
        lines = [[escape.markdown(row.label), *_cells(row, shown, escape.markdown)] for row in table.rows]
        said = [verdict(table), *legend([(table, shown)]), *warnings(table)]
        headings = ["algorithm", *(escape.markdown(c.heading) for c in shown)]
        parts.append(f"### {escape.markdown(title)}\n\n{markdown_rows(headings, lines)}\n")
        parts += [f"{escape.markdown(text)}\n" for text in said if text]
    parts += [f"{escape.markdown(text)}\n" for text in notes(board)]
    return "\n".join(parts)


def _cells(row: Row, shown: Sequence[Column], escaped: Callable[[str], str]) -> list[str]:
    return [escaped(text) if c.foreign else text for c in shown for text in [c.text(row, "full")]]


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells below their titles, all of them foreign text."""
    return markdown_rows([*map(escape.markdown, titles)], [[escape.markdown(cell) for cell in line] for line in lines])


def markdown_rows(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells below their titles, foreign text among them escaped already."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *lines])


CSV_COLUMNS = (
    *("workload", "workload_hash", "ruleset", "model", "reward", "split", "algorithm", "family", "settings"),
    *("config_hash", "protocol_hash", "images", "seeds", "failed", "metric", "trained_on"),
    *("gain", "low", "high", "over", "retained", "retained_low", "retained_high", "rank_best", "rank_worst"),
    *("shares_first", "images_to_target", "seconds_to_target", "reached", "seconds", "evaluations", "reward_calls"),
)


def to_csv(board: Board) -> str:
    """One line for each row and metric with everything that is known, numbers unrounded.

    Ranks and first place stand in the lines of the metric that orders the table.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in board.tables:
        for row in table.rows:
            for metric in table.metrics if row.seeds else ("",):
                values = _csv_values(table, row, metric)
                writer.writerow([_csv_cell(values.get(name)) for name in CSV_COLUMNS])
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    return escape.csv(value) if isinstance(value, str) else "" if value is None else value


def _csv_values(table: Table, row: Row, metric: str) -> dict[str, Any]:
    w, one = table.workload, row.group.records[0]
    values: dict[str, Any] = {
        "workload": w.name,
        "workload_hash": w.version,
        "ruleset": w.ruleset,
        "model": w.model,
        "reward": w.reward,
        "split": table.split,
        "algorithm": row.algorithm,
        "family": row.family,
        "settings": row.group.settings,
        "config_hash": one.config_hash,
        "protocol_hash": w.protocol,
        "images": row.images,
        "seeds": row.seeds,
        "failed": row.failed,
        "metric": metric,
        "trained_on": metric.partition("@")[0] in table.trained,
        "seconds": row.seconds,
        "evaluations": row.evaluations,
        "reward_calls": row.reward_calls,
    }
    if gain := row.gains.get(metric):
        values |= {"gain": gain.value, "low": gain.low, "high": gain.high, "over": gain.over}
    if kept := row.retained.get(metric):
        values |= {"retained": kept.value, "retained_low": kept.low, "retained_high": kept.high}
    if row.standing and metric == table.by:
        best, worst = row.standing.rank
        values |= {"rank_best": best, "rank_worst": worst, "shares_first": row.standing.shares_first}
    for unit, costs in row.to_target.items():
        values |= {f"{unit}_to_target": costs.median, "reached": costs.share}
    return values


def to_latex(board: Board, keys: Sequence[str] | None = None) -> str:
    """A table environment with booktabs for each table; `keys` as in `--columns`."""
    parts = ["% Needs \\usepackage{booktabs}."]
    for title, table in zip(titles(board), board.tables, strict=True):
        shown = choose(table, keys)
        lines = [[escape.latex(row.label), *map(_latex_number, _cells(row, shown, escape.plain))] for row in table.rows]
        said = [title + ".", verdict(table), *legend([(table, shown)]), *warnings(table)]
        headings = ["algorithm", *(escape.latex(c.heading) for c in shown)]
        body = " \\\\\n".join(" & ".join(line) for line in lines)
        parts.append(
            "\\begin{table}\n\\centering\\small\n"
            f"\\caption{{{' '.join(escape.latex(text) for text in said if text)}}}\n"
            f"\\begin{{tabular}}{{l{'r' * len(shown)}}}\n\\toprule\n"
            f"{' & '.join(headings)} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}"
        )
    parts += [f"% {escape.plain(text)}" for text in notes(board)]
    return "\n\n".join(parts) + "\n"


def _latex_number(text: str) -> str:
    """A cell with its signs as LaTeX sets them."""
    ranges = re.sub(r"(?<=\d)-(?=\d)", "--", escape.latex(text))
    return re.sub(r"(?<![\w-])[+-](?=\d)", r"$\g<0>$", ranges)
