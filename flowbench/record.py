"""The record of a run: one JSON per run and seed, from which every table is made."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flowbench.errors import UsageError
from flowbench.files import read_json_lines, write_atomically
from flowbench.published import check_published, is_published, whole
from flowbench.reading.checksums import check_listed

VERSION = 2  # of what a record holds; records without a version are of version 1
RANDOM = " (random)"  # behind the name of a model whose weights are random: never part of a comparison
MODEL = "model"  # among the names of a record's weights
PRESET, OWN = "preset", "flowbench"  # a source that is data and in the settings' hash; the distribution of flowbench
DONE = "DONE"  # the mark of a finished run, which has the checksums of its other texts
CHECKSUM = "checksum"  # the last entry of a record's file
_SUM = re.compile(r"[0-9a-f]{64}")
PACKAGES = ("flowbench", "torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy", "scipy")


class _Part(BaseModel):
    # A score of a run that collapsed need not be a number, and must be read back.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class Score(_Part):
    """One metric on one split: means over prompts, and the 95 % bootstrap interval of the paired difference."""

    base: float
    tuned: float
    diff_ci95: tuple[float, float] | None  # a single prompt has none

    @property
    def change(self) -> float:
        """Tuned minus base."""
        return self.tuned - self.base


class Spent(_Part):
    """What training cost. seconds: wall time of the training loop; overhead: share of it outside model, VAE, reward."""

    images: int
    reward_calls: int
    function_evaluations: int
    seconds: float
    evaluation_seconds: float
    overhead: float
    peak_memory_mb: float


class Point(_Part):
    """The averaged policy on split `dev` after so many images of training.

    seconds: of training so far; function_evaluations: so far, training's alone; scores: means over dev's prompts and
    images under the names that the final scores have, the reward trained on by its own; per_prompt: the reward and the
    truth of each prompt, at the last point.
    """

    images: int
    iteration: int
    seconds: float
    function_evaluations: int
    scores: dict[str, float]
    per_prompt: dict[str, list[float]] = {}


class Costs(_Part):
    """What a run spent, by kind.

    function_evaluations: velocities of one latent each, by purpose: "sampling", "training" and "backward" (forward and
    backward passes through the trained weights), "reference" (passes through any other view in an update), "dev" and
    "evaluation"; guidance counts two. updates: optimizer steps of the policy; flops: floating-point operations of the
    model in training, None where torch cannot count them; seconds: by part of the run, in which the parts of training
    ("rollout", "decode", "reward", "prepare", "update", ...) are disjoint; device: what it ran on; precision: of the
    model's weights.
    """

    images: int = 0
    reward_calls: int = 0
    function_evaluations: dict[str, int] = {}
    updates: int = 0
    flops: float | None = None
    seconds: dict[str, float] = {}
    peak_memory_mb: float = 0.0
    device: str = ""
    precision: str = ""


class Source(_Part):
    """Where code that decides a result comes from.

    distribution, version: of the installed package, None for a file; sha256: of the class's file, or of all Python
    files of a package that is not flowbench's own.
    """

    distribution: str | None = None
    version: str | None = None
    sha256: str


class Record(_Part):
    """One run. scores: "metric/split" or "metric/split/category" to Score; per_prompt: "metric/split" to the values.

    "metric@1" is of images sampled without guidance, where "metric" is of those sampled with it. base_cached: splits
    whose base scores are those that an earlier run had kept.

    version: 1 for records without one. points: scores on split `dev` during training, the last at the end of the
    budget; dev_base: the base model's there. weights: SHA-256 of the files of "model" and of each reward term by its
    name, "" for one without files, None where that is not known before loading. cut_prompts: how many different prompts
    are longer than "model" or a reward reads, by name, where there are any. sources: of "algorithm", of each reward
    term and judge by its name, and of "preset". status, failure: a run that failed has no scores, and says why in one
    line. ruleset ("defaults", "tuned", "search"), workload, workload_hash: what a suite or a search ran it for. Every
    field: docs/records.md.
    """

    version: int = 1
    algorithm: str
    reward: str
    model: str
    seed: int
    budget: Spent
    scores: dict[str, Score]
    per_prompt: dict[str, dict[str, list[float]]]
    prompts: dict[str, list[str]]
    config: dict[str, Any]
    config_hash: str
    protocol_hash: str
    prompt_hashes: dict[str, str]
    weights: dict[str, str | None] = {}
    cut_prompts: dict[str, int] = {}
    reward_provenance: dict[str, Any]
    judges: dict[str, dict[str, Any]] = {}
    base_cached: tuple[str, ...] = ()
    command: str
    commit: str | None
    device: str
    versions: dict[str, str]
    finished: str
    points: tuple[Point, ...] = ()
    dev_base: dict[str, float] = {}
    costs: Costs = Costs()
    sources: dict[str, Source] = {}
    status: Literal["finished", "failed"] = "finished"
    failure: str | None = None
    ruleset: str | None = None
    workload: str | None = None
    workload_hash: str | None = None

    @property
    def weights_key(self) -> str:
        """What tells the weights of model and rewards from others; "" where a run failed before that was known.

        A reward whose files are not known before it is loaded is known by the hash of what was loaded.
        """
        known = {name: digest for name, digest in self.weights.items() if digest}
        hashes = (
            sorted(weight_hashes(self.reward_provenance)) if None in self.weights.values() or not self.weights else []
        )
        if self.status == "failed" and not hashes and None in self.weights.values():
            return ""
        return json.dumps([known, hashes], sort_keys=True) if known or hashes else ""

    @property
    def identity(self) -> str:
        """Ten hex digits over what decides a result, seed and machine aside: only records that share it are averaged.

        Algorithm, model, reward, the weights of both, settings, protocol, prompts, and the source of every plug-in that
        is not flowbench's own; what flowbench itself is, `commit` says. Prompts that only the points are scored on are
        no part of it.
        """
        used = {"train", *self.config.get("evaluation", {}).get("splits", self.prompts)}
        foreign = {name: s.sha256 for name, s in self.sources.items() if name != PRESET and s.distribution != OWN}
        content = {
            "what": [self.algorithm, self.model, self.reward, self.config_hash, self.protocol_hash],
            "prompts": {name: digest for name, digest in self.prompt_hashes.items() if name in used},
            "sources": foreign,
            "weights": self.weights_key,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]

    def save(self, path: Path) -> None:
        """Write the record, to a temporary name first, with a checksum as its last entry."""
        text = self.model_dump_json(indent=1)
        write_atomically(path, f'{text[:-2]},\n "{CHECKSUM}": "{_checksum(_document(text))}"\n}}\n')


def weight_hashes(provenance: Mapping[str, Any]) -> set[str]:
    """The hashes of all weights that a reward names, however deep."""
    found = {str(value) for name, value in provenance.items() if name == "sha256"}
    return found.union(*(weight_hashes(value) for value in provenance.values() if isinstance(value, dict)))


def load_record(path: Path) -> Record:
    """Read a record, as a run leaves it or as it was published.

    Raises UsageError for a file that is none, or that is not as it was written: whose content is not that of its
    checksum, which records of flowbench 0.1 do not have, or that of the manifest of published records.
    """
    try:
        content = path.read_bytes()
        if is_published(content):
            record = Record.model_validate(whole(content, path))
            check_published(content, path)
        else:
            record = Record.model_validate_json(content)
            _check_whole(content, path)
        return record
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].lower().splitlines()[0] + (f" in '{where}'" if where else "")
        raise UsageError(f"'{path}' is not a flowbench record: {what}") from error
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from error


def _document(text: str | bytes) -> dict[str, Any]:
    """A record's JSON with its numbers as they are spelled."""
    found: dict[str, Any] = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
    return found


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_whole(content: bytes, path: Path) -> None:
    """Raise UsageError for a record whose content is not that of its checksum."""
    try:
        document = _document(content)
    except RecursionError as error:
        raise UsageError(f"'{path}' is not a flowbench record: it is nested too deep") from error
    foreign = {name: value for name, value in document.items() if name not in Record.model_fields}
    # Under a name that is damaged, too.
    sums = [name for name, value in foreign.items() if name == CHECKSUM or _SUM.fullmatch(str(value))]
    if sums and (sums != [CHECKSUM] or document.pop(CHECKSUM) != _checksum(document)):
        raise UsageError(f"'{path}' is damaged: its content is not that of its checksum; restore it, or run it again")


@dataclass(frozen=True)
class Found:
    """The records below some places, in the order of their paths; faults: a line for each file that is broken."""

    records: tuple[Record, ...]
    faults: tuple[str, ...]


def read_records(places: Iterable[Path]) -> Found:
    """All records below these files and folders, and what could not be read; a file that is named twice counts once.

    Raises UsageError when a place does not exist.
    """
    files: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise UsageError(f"'{place}' does not exist")
        files |= {file.resolve(): file for file in ([place] if place.is_file() else _record_files(place))}
    records, faults = [], []
    for file in files.values():
        try:
            records.append(load_record(file))
        except UsageError as error:
            faults.append(str(error))
    return Found(tuple(records), tuple(faults))


def find_records(places: Iterable[Path]) -> list[Record]:
    """All records below these files and folders, in the order of their paths.

    Raises UsageError when a place does not exist or a file is broken.
    """
    found = read_records(places)
    if found.faults:
        raise UsageError(found.faults[0])
    return list(found.records)


def _record_files(place: Path) -> list[Path]:
    """record.json of every run below a folder, and every other JSON that begins as a record does."""
    files = (f for f in place.rglob("*.json") if f.is_file())
    return sorted(f for f in files if f.name == "record.json" or _begins_as_record(f))


_BEGINNING = re.compile(rb'\s*\{\s*("version"\s*:\s*\d+\s*,\s*)?"algorithm"\s*:')


def _begins_as_record(file: Path) -> bool:
    """Whether a JSON is meant to be a record: other programs' files lie in folders of results, too."""
    try:
        with file.open("rb") as opened:
            return _BEGINNING.match(opened.read(256)) is not None
    except OSError:
        return True  # whoever loads it says what is wrong


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def code_commit() -> str | None:
    """The commit of the source tree that runs, with "+" if it has changes; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a killed process did not finish is none.

    Raises UsageError for a file that is damaged, or of a finished run and not as it was at its end.
    """
    check_listed(path, path.with_name(DONE))
    return read_json_lines(path)
