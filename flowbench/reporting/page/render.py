"""PageData to one file of HTML that needs no network and no server, and the same data as JSON and CSV beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from flowbench.files import write_atomically
from flowbench.reporting.page.data import Facts, PageData

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("plots.js", "tables.js", "wall.js", "page.js")

CITATION = """@software{flowbench,
  author  = {{the flowbench authors}},
  title   = {flowbench: a benchmark of reward fine-tuning for flow-matching text-to-image models},
  version = {%s},
  url     = {https://github.com/flowbench/flowbench}
}"""


def html(page: PageData, csv: str = "") -> str:
    """The page. csv: the tables, for a button that saves them.

    Only this file's style and script run, by their hashes; whatever a record says is escaped or data.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from flowbench import __version__

    style = _asset("page.css")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_asset("page.html"))
    return template.render(
        data=page,
        facts=list(_facts(page)),
        cautions=page.warnings,
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        payload=Markup(embedded(page.model_dump_json())),
        csv=Markup(embedded(json.dumps(csv, ensure_ascii=False))),
        citation=CITATION % __version__,
        release=__version__,
    )


def embedded(text: str) -> str:
    """JSON for a script element: the same JSON, without what could end or open an element."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write(path: Path, page: PageData, csv: str = "", beside: bool = False) -> list[Path]:
    """Write the page and, if asked, its data beside it as .json and .csv; returns what was written."""
    files = {path: html(page, csv)}
    if beside:
        files |= {path.with_suffix(".json"): page.model_dump_json(indent=1) + "\n", path.with_suffix(".csv"): csv}
    for file, text in files.items():
        write_atomically(file, text)
    return list(files)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded and nothing else run; pictures are in the page."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _facts(page: PageData) -> Iterator[tuple[str, str]]:
    """What was compared, as names and values."""
    f: Facts = page.facts
    if not f.runs:
        return
    yield "Workloads", f"{len(page.workloads)}"
    yield "Methods", f"{f.methods}"
    if f.seeds:
        yield "Seeds a method", f"{f.seeds[0]}" if f.seeds[0] == f.seeds[1] else f"{f.seeds[0]} to {f.seeds[1]}"
    yield "Runs", f"{f.runs:,}" + (f", {f.failed} failed" if f.failed else "")
    yield "Search trials", f"{f.trials:,}" if f.trials else "none among these records"
    yield "Ruleset", ", ".join(f.rulesets) or "none"
    yield ("Commit", "Commits")[len(f.commits) > 1], _some(f.commits)
    yield ("Device", "Devices")[len(f.devices) > 1], _some(f.devices) or "unknown"
    if f.versions:
        yield "Versions", ", ".join(f.versions)
    if f.first and f.last:
        yield "Runs ended", f.first if f.first == f.last else f"{f.first} to {f.last}"


def _some(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
