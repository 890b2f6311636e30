"""What the page is made of: one frozen model, which the page embeds as JSON and other programs can read.

Numbers are rounded to four significant digits. Names, prompts and messages are foreign text as the records have it:
whoever shows them escapes them. The schema has a version; fields are added, never renamed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from flowbench.evaluation.statistics.targets import FLOOR

VERSION = 1

Axis = Literal["images", "evaluations", "seconds"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Part):
    """An estimate with the ends of its 95 % interval, None where the data cannot say."""

    value: float
    low: float | None = None
    high: float | None = None


class Column(_Part):
    """A column of numbers. kind: "gain" (tuned minus base), "share" (of the base model's) or "cost".

    trained: the reward trained on, or the truth where that was trained on; usual: shown at first; lower: whether less
    is better.
    """

    key: str
    heading: str
    meaning: str
    kind: Literal["gain", "share", "cost"]
    trained: bool = False
    usual: bool = True
    lower: bool = False


class Reached(_Part):
    """Cost until the target: the median over runs, None for never, and how many of the runs arrived."""

    median: float | None
    arrived: int
    runs: int


class CurvePoint(_Part):
    """A point of the budget: means over runs of what had been spent, and scores on `dev`.

    A score is tuned minus base, a diversity a share of the base model's. Intervals are over seeds.
    """

    images: float
    evaluations: float
    seconds: float
    scores: dict[str, Number]


class Run(_Part):
    """One record. gains: tuned minus base on the table's split, means over prompts; settings: what tells it from the
    other runs of its row, where each study selected its own."""

    seed: int
    status: Literal["finished", "failed"]
    failure: str | None
    command: str
    commit: str | None
    finished: str
    seconds: float
    gains: dict[str, float]
    settings: str = ""


class Row(_Part):
    """One method with one setting on one workload.

    label: unique in its workload; rank: best and worst that all pairs admit, None without an interval; values: by
    column; broken: in how many runs a metric is not finite; reached: by axis; curve: empty without points; settings:
    of its first run, by their full names.
    """

    label: str
    method: str
    rank: tuple[int, int] | None
    shares_first: bool
    seeds: int
    failed: int
    values: dict[str, Number]
    broken: dict[str, int]
    reached: dict[str, Reached]
    curve: tuple[CurvePoint, ...]
    settings: dict[str, str]
    runs: tuple[Run, ...]


class Pair(_Part):
    """One row beside another, paired by seed and prompt.

    difference: one minus other; improvement: how often one is above the other, None where no seed is common; p: Holm's
    correction for all pairs of the table.
    """

    one: str
    other: str
    difference: Number | None
    improvement: Number | None
    p: float


class Judge(_Part):
    """How well a judge orders the tuned models as the truth does: Kendall's tau-b, its interval over methods."""

    name: str
    tau: Number
    models: int


class Roles(_Part):
    """Which metrics play which part on a workload; None where there is none."""

    reward: str | None
    truth: str | None
    diversity: str | None
    distance: str | None


class Goal(_Part):
    """A target on `dev`: tuned minus base, with at least this share of the base model's diversity.

    fixed: stated by the workload; else half of the largest median gain of these runs.
    """

    metric: str
    gain: float
    diversity: float = FLOOR
    fixed: bool


class Workload(_Part):
    """One table with its pictures. by: the metric that orders it; front: rows that none surpasses in two metrics."""

    id: str
    title: str
    name: str
    model: str
    reward: str
    images: int
    split: str
    ruleset: str
    protocol: str
    prompts: int
    by: str | None
    over: str
    roles: Roles
    verdict: tuple[str, ...]
    smallest: float | None
    goal: Goal | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    front_of_truth: tuple[str, ...]
    front_of_diversity: tuple[str, ...]
    judges: tuple[Judge, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]


class Trial(_Part):
    """One run of a search: what it varied, and its scores on `dev` at the end of the budget."""

    workload: str
    seed: int
    settings: str
    status: Literal["finished", "failed"]
    reward: float | None
    diversity: float | None


class Search(_Part):
    """What a search selected. study: from 1, None for the only one; settings: as text, "" if nothing was selected, and
    `reason` says why; gain, diversity: of the selected, on dev; edges: of the space, at which it stands; best_of: the
    mean gain of the best of k trials, for k = 1, 2, ...; ruleset: "" outside of the rules."""

    workload: str
    ruleset: str
    study: int | None
    trials: int
    failed: int
    collapsed: int
    settings: str
    reason: str
    gain: float | None
    diversity: float | None
    edges: tuple[str, ...]
    best_of: tuple[float, ...]


class Method(_Part):
    """A method, wherever it stands. marker and dashes as matplotlib names them; links only where they are known."""

    name: str
    family: str
    color: str
    marker: str
    dashes: tuple[float, ...]
    summary: str = ""
    page: str | None = None
    paper: str | None = None
    space: dict[str, str] = {}
    trials: tuple[Trial, ...] = ()
    searches: tuple[Search, ...] = ()


class Curve(_Part):
    """A row's performance profile: for each factor the share of workloads on which it is within it of the cheapest."""

    label: str
    shares: tuple[float, ...]
    area: float


class Profile(_Part):
    """Performance profiles over the workloads that have a target, in images."""

    factors: tuple[float, ...]
    workloads: tuple[str, ...]
    curves: tuple[Curve, ...]


class Standing(_Part):
    """A line of the overview: a label that stands in one workload or more; area: of its profile."""

    label: str
    method: str
    area: float | None


class Tile(_Part):
    """A prompt of the wall, and its category where it has one."""

    prompt: str
    category: str


class Strip(_Part):
    """The images of the base model (method None) or of a row, one for each tile, in one picture.

    image: a data: address; passed: whether the truth accepts each image, empty where it is not known.
    """

    label: str
    method: str | None
    image: str
    passed: tuple[bool | None, ...] = ()


class Wall(_Part):
    """Images of one workload, all from the same noise.

    size: of a tile in the strips, in pixels; across: tiles in a line of a strip.
    """

    workload: str
    seed: int
    size: tuple[int, int]
    across: int
    tiles: tuple[Tile, ...]
    strips: tuple[Strip, ...]


class Facts(_Part):
    """What was compared. first, last: when runs ended; trials: runs of searches, which are in no table."""

    runs: int
    failed: int
    methods: int
    seeds: tuple[int, int] | None
    trials: int
    rulesets: tuple[str, ...]
    commits: tuple[str, ...]
    devices: tuple[str, ...]
    versions: tuple[str, ...]
    first: str | None
    last: str | None


class PageData(_Part):
    """Everything that the page says."""

    schema_version: int = VERSION
    verdict: tuple[str, ...]
    facts: Facts
    warnings: tuple[str, ...]
    overview: tuple[Standing, ...]
    ordered_by: str
    methods: tuple[Method, ...]
    workloads: tuple[Workload, ...]
    profile: Profile | None
    walls: tuple[Wall, ...] = ()
