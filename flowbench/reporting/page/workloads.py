"""One workload of the page, from one table of the leaderboard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowbench.escape import plain
from flowbench.evaluation.statistics import Gains, Interval, probability_of_improvement, rank_correlation
from flowbench.evaluation.statistics import Pair as Compared
from flowbench.evaluation.statistics import interquartile_mean as middle
from flowbench.record import Record
from flowbench.reporting.groups import TUNED, differences
from flowbench.reporting.leaderboard import EXACT, HELD_OUT, TRUTH, Row, Table
from flowbench.reporting.page import curves, data, verdict
from flowbench.reporting.page.naming import names_of
from flowbench.reporting.page.numbers import number, rounded
from flowbench.reporting.targets import DIVERSITY
from flowbench.reporting.values import speaks
from flowbench.reporting.words import warnings
from flowbench.terms import UNGUIDED, plain_metric

DISTANCES = ("w2", "kl")
IQM = "iqm"
COSTS = {
    "seconds": ("seconds", "of training, mean over runs"),
    "images": ("images", "generated for training"),
    "evaluations": ("evaluations", "velocities of one latent, in training"),
    "calls": ("reward calls", "in training"),
}


def workload(table: Table, place: int, title: str, fixed: data.Goal | None) -> data.Workload:
    """Everything that the page says of one workload. fixed: its target, where it states one."""
    names, roles = names_of(table), roles_of(table)
    target = curves.goal(table, roles.truth, fixed)
    columns = _columns(table, target)
    rows = tuple(_row(row, names[row.label], table, target) for row in table.rows)
    gains, kept = _pairs_of_gains(table, roles), _pairs_with_diversity(table, roles)
    w = table.workload
    return data.Workload(
        id=f"w{place}",
        title=plain(title),
        name=plain(w.name),
        model=plain(w.model),
        reward=plain(w.reward),
        images=w.images,
        split=plain(table.split),
        ruleset=plain(w.ruleset),
        protocol=plain(w.protocol),
        prompts=max((g.values.shape[2] for g in table.gains.values()), default=0),
        by=_plain(table.by),
        over=speaks(table.gains[table.by], table.over) if table.by else table.over,
        roles=data.Roles(**{key: _plain(value) for key, value in roles.model_dump().items()}),
        verdict=tuple(verdict.of_workload(table, names)),
        smallest=rounded(table.smallest) if table.smallest is not None else None,
        goal=target.model_copy(update={"metric": plain(target.metric)}) if target else None,
        columns=columns,
        rows=rows,
        pairs=tuple(_pair(pair, table, names) for pair in table.ranking.pairs) if table.ranking else (),
        front_of_truth=tuple(names[label] for label in curves.front(gains)),
        front_of_diversity=tuple(names[label] for label in curves.front(kept)),
        judges=_judges(table, roles),
        warnings=tuple(warnings(table)),
        missing=tuple(_missing(table, rows, roles)),
    )


def roles_of(table: Table) -> data.Roles:
    """Which metrics are the reward, the truth, the diversity and the distance of a table."""
    plainly = {plain_metric(m): m for m in reversed(table.metrics) if not m.endswith(UNGUIDED)}
    truth = plainly.get(TRUTH)
    trained = [m for m in table.metrics if plain_metric(m) in table.trained and not m.endswith(UNGUIDED)]
    proxy = EXACT if EXACT in plainly else next(iter(trained), None)
    reward = truth if truth in trained else proxy
    distance = next((plainly[d] for d in DISTANCES if d in plainly), None)
    return data.Roles(reward=reward, truth=truth, diversity=plainly.get(DIVERSITY), distance=distance)


def _columns(table: Table, target: data.Goal | None) -> tuple[data.Column, ...]:
    found = [_metric(table, metric) for metric in table.metrics]
    if table.by:
        meaning = "mean of the middle half of all gains"
        found.append(data.Column(key=IQM, heading=f"{plain(table.by)} IQM", meaning=meaning, kind="gain", usual=False))
    if target:
        meaning = f"until {plain(target.metric)} on dev is {target.gain:+.3g} above the base model's; median over runs"
        found += [
            data.Column(key=f"to:{axis}", heading=f"{axis} to target", meaning=meaning, kind="cost", lower=True,
                        usual=axis == "images")
            for axis in curves.AXES
        ]  # fmt: skip
    found += [
        data.Column(key=key, heading=heading, meaning=meaning, kind="cost", lower=True, usual=key == "seconds")
        for key, (heading, meaning) in COSTS.items()
    ]
    return tuple(found)


def _metric(table: Table, metric: str) -> data.Column:
    name = plain_metric(metric)
    kind = "share" if name == DIVERSITY else "gain"
    meaning = "tuned as a share of the base model's" if kind == "share" else "tuned minus base"
    if metric == HELD_OUT:
        meaning = "mean gain of the judges not trained on, in standard deviations of the base model between prompts"
    trained = name in table.trained
    usual = metric in (table.by, HELD_OUT) or trained or name in (TRUTH, DIVERSITY, *DISTANCES)
    return data.Column(
        key=plain(metric),
        heading=plain(metric),
        meaning=meaning,
        kind=kind,
        trained=trained,
        usual=usual and not metric.endswith(UNGUIDED) and name != "oracle_soft",
        lower=name in DISTANCES,
    )


def _row(row: Row, label: str, table: Table, target: data.Goal | None) -> data.Row:
    values: dict[str, Interval | None] = {**row.gains, **row.retained}
    if table.by and row.standing:
        gains = table.gains[table.by]
        values[IQM] = middle(gains, row.label, speaks(gains, table.over))
    shown = {plain(k): number(v) for k, v in values.items() if v is not None and math.isfinite(v.value)}
    spent = zip(COSTS, (row.seconds, row.images, row.evaluations, row.reward_calls), strict=True)
    shown |= {key: data.Number(value=rounded(value)) for key, value in spent if math.isfinite(value)}
    points, at = curves.curve(row.group), verdict.place(table)
    return data.Row(
        label=label,
        method=plain(row.algorithm),
        rank=row.standing.rank if row.standing and row.label in (*at.first, *at.rest) else None,
        shares_first=at.decided and row.label in at.first,
        seeds=row.seeds,
        failed=row.failed,
        values=shown,
        broken={plain(metric): runs for metric, runs in row.broken.items()},
        reached=curves.reached(row.group, target),
        curve=tuple(_renamed(point, table) for point in points),
        settings=settings(row.group.records[0].config),
        runs=tuple(_run(r, table.split, own) for r, own in zip(row.group.records, _own(row, table), strict=True)),
    )


def _renamed(point: data.CurvePoint, table: Table) -> data.CurvePoint:
    """A point whose scores have printable names; the reward trained on has that of its column."""
    reward, scores = roles_of(table).reward, dict(point.scores)
    alias = next((m for m in sorted(table.trained) if m in scores), None)
    if reward and reward not in scores and alias:
        scores[reward] = scores[alias]
    return point.model_copy(update={"scores": {plain(key): value for key, value in scores.items()}})


def _own(row: Row, table: Table) -> list[str]:
    """What tells the settings of a row's studies apart."""
    records = row.group.records
    if table.workload.ruleset != TUNED or len(records) < 2:
        return [""] * len(records)
    return differences([r.config for r in records])


def _run(r: Record, split: str, settings: str) -> data.Run:
    ends = {key.split("/")[0]: score.change for key, score in r.scores.items() if key.split("/")[1:] == [split]}
    return data.Run(
        seed=r.seed,
        status=r.status,
        failure=_plain(r.failure),
        command=plain(r.command),
        commit=plain(r.commit) if r.commit else None,
        finished=plain(r.finished),
        seconds=rounded(r.budget.seconds),
        gains={plain(metric): rounded(gain) for metric, gain in ends.items() if math.isfinite(gain)},
        settings=plain(settings),
    )


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a run by their full names, as `--set` takes them."""
    sections = {"hyperparameters": "algorithm"}
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            section = plain(sections.get(name, name))
            found |= {f"{section}.{plain(str(key))}": _spell(inner) for key, inner in value.items()}
        elif name not in ("seed", "device"):
            found[plain(name)] = _spell(value)
    return found


def _spell(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value))


def _plain(text: str | None) -> str | None:
    return None if text is None else plain(text)


def _pair(pair: Compared, table: Table, names: Mapping[str, str]) -> data.Pair:
    common = pair.difference.seeds > 0 and math.isfinite(pair.difference.value)
    better = None
    if common and table.by:
        gains = table.gains[table.by]
        better = number(probability_of_improvement(gains, pair.one, pair.other, speaks(gains, table.over)))
    return data.Pair(
        one=names[pair.one],
        other=names[pair.other],
        difference=number(pair.difference) if common else None,
        improvement=better,
        p=rounded(pair.p_holm),
    )


def _values(row: Row, metric: str | None) -> float | None:
    if metric is None:
        return None
    found = row.retained[metric] if metric in row.retained else row.gains.get(metric)
    return found.value if found is not None and math.isfinite(found.value) else None


def _pairs_of_gains(table: Table, roles: data.Roles) -> dict[str, tuple[float, float]]:
    """By label the gains in the reward trained on and in the truth, where they are two metrics."""
    if roles.reward == roles.truth:
        return {}
    return _both(table.rows, roles.reward, roles.truth)


def _pairs_with_diversity(table: Table, roles: data.Roles) -> dict[str, tuple[float, float]]:
    return _both(table.rows, roles.diversity, roles.truth or roles.reward)


def _both(rows: Sequence[Row], x: str | None, y: str | None) -> dict[str, tuple[float, float]]:
    found = ((row.label, _values(row, x), _values(row, y)) for row in rows)
    return {label: (a, b) for label, a, b in found if a is not None and b is not None}


def _judges(table: Table, roles: data.Roles) -> tuple[data.Judge, ...]:
    """Rank correlations with the truth, over all tuned models; seeds of a method resemble each other."""
    if roles.truth is None or roles.truth not in table.gains:
        return ()
    records = [r for row in table.rows for r in row.group.finished]
    judges = {name for r in records for name in r.judges}
    named = [m for m in table.metrics if m in judges or m == HELD_OUT or (m == roles.reward and m != roles.truth)]
    found = [_judge(m, table.gains[m], table.gains[roles.truth]) for m in named if m in table.gains]
    return tuple(sorted((j for j in found if j is not None), key=lambda j: -j.tau.value))


def _judge(name: str, gains: Gains, truth: Gains) -> data.Judge | None:
    mine, theirs = gains.values.mean(-1), truth.values.mean(-1)  # (A, K)
    known = np.isfinite(mine) & np.isfinite(theirs)
    if known.sum() < 3:
        return None
    methods = np.broadcast_to(np.arange(len(gains.algorithms))[:, None], known.shape)
    found = rank_correlation(mine[known], theirs[known], methods[known])
    if not math.isfinite(found.value):
        return None
    shown = "mean of the held-out judges" if name == HELD_OUT else plain(name)
    return data.Judge(name=shown, tau=number(found), models=found.checkpoints)


def _missing(table: Table, rows: Sequence[data.Row], roles: data.Roles) -> list[str]:
    """What the records do not say, and so the page does not show."""
    said = []
    if not any(row.curve for row in rows):
        said.append("No run was scored on dev during training: there are no curves and no costs to a target.")
    elif not all(row.curve for row in rows if row.seeds):
        without = [row.label for row in rows if row.seeds and not row.curve]
        said.append(f"Not scored on dev during training, hence in no curve: {', '.join(without)}.")
    if roles.truth is None:
        said.append("The truth is not known on this workload: only rewards and judges are shown.")
    elif roles.truth == roles.reward:
        said.append("The truth is the reward trained on, so that no proxy can be over-optimised.")
    return said
