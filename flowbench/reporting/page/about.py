"""What a method is, beside its results: its look, its paper and page, its search space and the trials of its search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points

from flowbench.errors import RunError, UsageError
from flowbench.escape import plain
from flowbench.record import Record
from flowbench.registry import algorithms
from flowbench.reporting.chosen import Chosen, shown_settings
from flowbench.reporting.groups import TUNED, differences, is_trial
from flowbench.reporting.leaderboard import Board
from flowbench.reporting.page import data
from flowbench.reporting.page.numbers import rounded
from flowbench.reporting.style import family_of, mark
from flowbench.reporting.targets import DIVERSITY
from flowbench.terms import trained_metrics
from flowbench.workloads import load_workload, workload_names

SITE = "https://flowbench.github.io/flowbench/algorithms/"


def methods(
    names: Iterable[str],
    records: Sequence[Record],
    spaces: Mapping[str, Mapping[str, str]],
    searches: Sequence[Chosen] = (),
) -> tuple[data.Method, ...]:
    """The methods of these names. records: of all runs, those of searches among them; spaces: by name, as `spaces`;
    searches: what they selected."""
    own = {p.name for p in entry_points(group=algorithms.group) if p.module.startswith("flowbench.algorithms.")}
    return tuple(
        _method(name, name in own, trials(records, name), spaces.get(name, {}), searches_of(searches, name))
        for name in sorted(set(names))
    )


def searches_of(searches: Sequence[Chosen], algorithm: str) -> tuple[data.Search, ...]:
    """What the searches of an algorithm selected."""
    return tuple(
        data.Search(
            workload=plain(c.workload.name),
            ruleset=plain(c.ruleset or ""),
            study=c.study + 1 if c.ruleset == TUNED else None,
            trials=c.trials,
            failed=c.failed,
            collapsed=c.collapsed,
            settings="" if c.selected is None else plain(shown_settings(c)),
            reason=plain(c.reason),
            gain=None if c.gain is None else rounded(c.gain),
            diversity=None if c.kept is None else rounded(c.kept),
            edges=tuple(map(plain, c.edges)),
            best_of=tuple(map(rounded, c.best_of)),
        )
        for c in searches
        if c.algorithm == algorithm
    )


def _method(
    name: str,
    own: bool,
    tried: tuple[data.Trial, ...],
    space: Mapping[str, str],
    searches: tuple[data.Search, ...],
) -> data.Method:
    look, family = mark(name), family_of(name)
    summary, paper = "", None
    if own:  # a plug-in that happens to be installed here may be another than the record's
        try:
            info = algorithms.describe(name)
            summary, paper = plain(info.summary), _paper(info.paper)
        except UsageError:
            pass
    return data.Method(
        name=plain(name),
        family=family,
        color=look.color,
        marker=look.marker,
        dashes=() if isinstance(look.dashes, str) else look.dashes[1],
        summary=summary,
        page=f"{SITE}{name}/" if own else None,
        paper=paper,
        space={plain(k): plain(v) for k, v in space.items()},
        trials=tried,
        searches=searches,
    )


def _paper(reference: str) -> str | None:
    """The address of "arXiv:2510.18072" or of a DOI; None for anything else."""
    kind, _, number = reference.partition(":")
    hosts = {"arxiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    return hosts[kind.lower()] + number.strip() if kind.lower() in hosts and number.strip() else None


def spaces(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The search spaces that algorithms declare, by name and setting, in words; imports them, which takes seconds.

    What is not installed here, or cannot be imported, has none.
    """
    known, found = set(algorithms.names()), {}
    for name in {*names} & known:
        try:
            space = algorithms.get(name).cls.search_space
        except (UsageError, RunError):
            continue
        found[name] = {setting: _dimension(dimension) for setting, dimension in space.items()}
    return found


def _dimension(dimension: object) -> str:
    values = getattr(dimension, "values", None)
    if values is not None:
        return f"one of {', '.join(map(str, values))}"
    low, high = dimension.low, dimension.high  # type: ignore[attr-defined]
    spread = ", logarithmic" if type(dimension).__name__ == "LogUniform" else ""
    return f"{low:g} to {high:g}{spread}"


def targets(result: Board) -> dict[str, data.Goal]:
    """The targets of the tables' workloads, by name: the lower one of each that is installed in the same version."""
    found = {}
    for name, version in {(table.workload.name, table.workload.version) for table in result.tables}:
        if name in workload_names():
            known = load_workload(name)
            if known.hash == version and known.target:
                gain, kept = min(known.target.gains), known.target.diversity
                found[name] = data.Goal(metric=known.target.metric, gain=gain, diversity=kept, fixed=True)
    return found


def trials(records: Sequence[Record], algorithm: str) -> tuple[data.Trial, ...]:
    """The runs of an algorithm's searches: what they varied, and how they ended on `dev`."""
    mine = [r for r in records if is_trial(r) and r.algorithm == algorithm]
    if not mine:
        return ()
    varied = differences([r.config for r in mine]) if len(mine) > 1 else [""]
    return tuple(_trial(r, settings) for r, settings in zip(mine, varied, strict=True))


def _trial(record: Record, settings: str) -> data.Trial:
    reward = diversity = None
    if record.points:
        scores, base = record.points[-1].scores, record.dev_base
        reward = next((_gain(scores, base, m) for m in sorted(_trained(record.reward)) if m in scores), None)
        kept = scores.get(DIVERSITY, math.nan) / base[DIVERSITY] if base.get(DIVERSITY, 0) > 0 else math.nan
        diversity = rounded(kept) if math.isfinite(kept) else None
    return data.Trial(
        workload=plain(record.workload or f"{record.model} / {record.reward}"),
        seed=record.seed,
        settings=settings,
        status=record.status,
        reward=reward,
        diversity=diversity,
    )


def _gain(scores: Mapping[str, float], base: Mapping[str, float], metric: str) -> float | None:
    gain = scores[metric] - base.get(metric, math.nan)
    return rounded(gain) if math.isfinite(gain) else None


def _trained(reward: str) -> frozenset[str]:
    try:
        return trained_metrics(reward) | {"reward"}
    except UsageError:
        return frozenset()
