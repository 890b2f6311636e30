"""Bad command lines, generated from what typer declares: every command, every parameter, every kind of nonsense.

A case changes one thing of a command line that is right otherwise (`BASES`). What is bad of a value follows from the
parameter's declared type, its bounds, and whether it names a result or something that is read. Values that a parameter
takes whatever they are (a prompt, a folder of a cache) are in `FREE`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import typer
import yaml

from flowbench.cli import main as cli
from flowbench.experiments.suite import FOLDER as SUITES
from flowbench.models.presets import load_preset
from flowbench.sections import EvaluationConfig, TrainingConfig
from flowbench.workloads import FOLDER as WORKLOADS

Document = dict[str, Any]
LONG = "n" * 5000
# Not UTF-8 as the shell hands it over; markup; control characters; two lines; turned around.
STRANGE = {
    "markup": "[/]x[bold red]",
    "escape sequence": "\x1b[31mred\x07",
    "two lines": "one\ntwo",
    "right to left": "\u202etxet",
    "very long": LONG,
    "no UTF-8": "x\udcff",
    "a path out": "../../../x",
}
NUMBERS = {"text": "many", "half": "1.5.2", "hex": "0x1F", "nan": "nan", "infinite": "inf", "24 digits": "-" + "9" * 24}


@dataclass(frozen=True)
class Base:
    """A command line that is right: arguments by the names that they are declared by, and options."""

    arguments: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


PLANE = ("--model", "gaussian", "--reward", "linear", "--device", "cpu")
BASES: dict[str, Base] = {
    "run": Base({"algorithm": "raft"}, (*PLANE, "--images", "256")),
    "evaluate": Base({"path": "run"}, ("--device", "cpu")),
    "sample": Base({"folder": "run", "prompt": "a point"}, ("--device", "cpu")),
    "list": Base({"what": "rewards"}),
    "leaderboard": Base({"places": "run"}),
    "page": Base({"places": "run"}),
    "submit": Base({"places": "run"}, ("--check",)),
    "ablate": Base({"algorithm": "acflow"}, (*PLANE, "--seeds", "1")),
    "compare": Base({"algorithms": "raft nft"}, ("--model", "gaussian", "--rewards", "linear", "--device", "cpu")),
    "tune": Base({"algorithm": "raft"}, ("--workload", "plane-linear", "--trials", "2", "--device", "cpu")),
    "suite run": Base({"suite": "rehearsal"}, ("--device", "cpu")),
    "suite show": Base({"suite": "rehearsal"}),
    "check": Base({"names": "jpeg"}),
    "probe": Base({"names": "draft"}, PLANE),
    "bench": Base({}, ("--images", "4", "--device", "cpu")),
    "doctor": Base(),
    "testbed build": Base(),
    "testbed show": Base(),
    "testbed path": Base({"model": "mini-sd3"}),
    "rewards list": Base(),
    "rewards install": Base({"names": "hpsv2-package"}),
    "rewards remove": Base({"names": "hpsv2-package"}),
    "rewards convert": Base({"checkpoint": "absent.pt"}),
    "rewards parity": Base({"name": "hpsv2"}, ("--reduced",)),
    "rewards serve": Base({"name": "jpeg"}, ("--port", "0", "--device", "cpu")),
}
# Whatever is given there makes sense, or makes none only together with what these command lines do not have.
FREE = {
    *(("sample", "prompt"), ("list", "output"), ("suite show", "output"), ("sample", "output")),
    *(("suite show", "searches"), ("probe", "cache"), ("leaderboard", "since"), ("rewards parity", "version")),
}
# What an option needs beside it, so that it alone is wrong.
COMPANIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("run", "tflops"): ("--dry-run", "--memory"),
    ("run", "json_"): ("--dry-run", "--memory"),
    ("run", "memory_limit"): ("--dry-run",),
    ("ablate", "table"): ("--format", "markdown"),
}
READ = ("folder", "path", "places", "samples", "to", "run", "checkpoint")  # paths that must be there
YAML = {"config": "config", "model": "preset", "workload": "workload", "suite": "suite"}

TOGETHER: dict[str, tuple[str, ...]] = {
    "run": (
        *(
            "--memory",
            "--tflops 1",
            "--dry-run --tflops 1",
            "--json x.json",
            "--resume",
            "--resume --dry-run --images 0",
        ),
        *("--config good.yaml --config good.yaml", "--dry-run --memory --memory-limit 1B", "--resume --overwrite"),
    ),
    "evaluate": ("--model gaussian", "--keep-images", "--set training.images=8", "--prompts shapes --prompts nope"),
    "leaderboard": (
        *("--check --write", "--since HEAD", "--columns clip --format csv", "--transpose --format csv"),
        *("--transpose --format latex", "--check absent", "--target clip", "--target =1", "--target clip=nan"),
    ),
    "ablate": ("--table x.md", "--seeds 5000", "--format latex"),
    "check": ("--all", "--all --model nope"),
    "probe": ("--all", "--run folder"),
    "compare": ("--first-seed 9223372036854775807", "--seeds 0", "--rewards ,"),
    "suite run": ("--executor slurm --slurm partition", "--executor nope", "--slurm ="),
    "rewards remove": ("--all",),
    "rewards serve": ("--host 999.999.999.999", "--host -"),
    "submit": ("--rehearsal --ablation",),
    "tune": ("--sampler grid", "--finalists -1", "--set training.seed=1"),
    "testbed build": ("--only clip --only clap",),
    "bench": ("--images 5", "--compare diffusers"),
}


@dataclass(frozen=True)
class Bad:
    """A bad command line. words: all behind `flowbench`; culprits: texts of which an error line must have one."""

    command: str
    parameter: str
    kind: str
    words: tuple[str, ...]
    culprits: tuple[str, ...]

    @property
    def name(self) -> str:
        shown = " ".join(word if len(word) < 60 else f"{word[:20]}...({len(word)})" for word in self.words)
        return f"{self.command} / {self.parameter} / {self.kind}: flowbench {shown!r}"


def commands(group: Any = None, *names: str) -> Iterator[tuple[str, Any]]:
    """All commands by their names in words."""
    group = typer.main.get_command(cli.app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield " ".join((*names, name)), command


@cache
def all_cases() -> tuple[Bad, ...]:
    """Every bad command line that the declarations give, in their order."""
    return tuple(case for name, command in commands() for case in _of_command(name, command))


def chosen(count: int, seed: int) -> list[Bad]:
    """So many of them at random, every parameter of every command among them before one comes a second time."""
    draw = random.Random(seed)
    places: dict[tuple[str, str], list[Bad]] = {}
    for case in draw.sample(all_cases(), len(all_cases())):
        places.setdefault((case.command, case.parameter), []).append(case)
    found: list[Bad] = []
    while places and len(found) < count:
        found += [cases.pop() for cases in places.values()]
        places = {place: cases for place, cases in places.items() if cases}
    return found[:count]


def _of_command(name: str, command: Any) -> Iterator[Bad]:
    base = BASES[name]
    arguments = [p for p in command.params if p.param_type_name == "argument"]

    def case(
        parameter: str, kind: str, *options: str, culprits: Sequence[str] = (), end: bool = False, **given: str | None
    ) -> Bad:
        values = {**base.arguments, **given}
        placed = [word for p in arguments for word in _words(p, values.get(p.name))]
        tail = (*COMPANIONS.get((name, parameter), ()), *options)
        words = (*name.split(), *placed, *base.options, *tail)
        shown = [text for text in (*options[-1:], *(v for v in given.values() if v)) if text]
        more = ["check"] if name == "submit" else []  # it says on stdout what is wrong with each run
        return Bad(name, parameter, kind, words, (*culprits, *shown, *more))

    yield case("", "unknown option", "--absent")
    yield case("", "unknown option with markup", "--[/]x")
    if not any(p.nargs == -1 for p in arguments):
        yield case("", "too many arguments", "one", "more")
    for words in TOGETHER.get(name, ()):
        yield case("", f"together: {words}", *words.split(), culprits=["--", "'"])
    for p in arguments:
        if p.required:
            yield case(p.name, "missing", **{p.name: None}, culprits=["argument", p.name.upper()])
        if (name, p.name) not in FREE:
            for kind, value in _values(name, p):
                yield case(p.name, kind, **{p.name: value})
    for p in command.params:
        if p.param_type_name == "argument" or (name, p.name) in FREE:
            continue
        option = p.opts[0]
        if p.is_flag:
            yield case(p.name, "a flag with a value", f"{option}=yes", culprits=[option])
            continue
        yield case(p.name, "without a value", option, culprits=[option])
        for kind, value in _values(name, p):
            yield case(p.name, kind, option, value, culprits=[option])


def _words(parameter: Any, value: str | None) -> list[str]:
    if value is None:
        return []
    right = {given for base in BASES.values() for given in base.arguments.values()}
    return value.split(" ") if parameter.nargs == -1 and value in right else [value]


def _values(command: str, parameter: Any) -> Iterator[tuple[str, str]]:
    """Bad values of a parameter, with what is bad of them."""
    kind = _declared(parameter)
    if kind in (int, float):
        yield from NUMBERS.items()
        yield "empty", ""
        yield "huge", "9" * 24
        if parameter.min is not None:
            yield "too small", str(parameter.min - 1)
        if parameter.max is not None:
            yield "too large", str(parameter.max + 1)
        if kind is int:
            yield "a fraction", "2.5"
        return
    callback = getattr(parameter.callback, "__name__", "")
    if callback == "new_file":
        yield from (("a folder", "folder"), ("below a file", "file/x.json"), ("name too long", LONG), ("empty", ""))
        return
    if callback == "new_folder":
        yield from (("a file", "file"), ("below a file", "file/x"), ("name too long", LONG), ("empty", ""))
        return
    yield "empty", ""
    if parameter.name == "settings":
        # A bench and a probe read no split.
        yield from (case for case in _settings() if command not in ("bench", "probe") or "splits=[nope]" not in case[1])
        return
    yield from STRANGE.items()
    yield "absent", "nope"
    if parameter.name in READ:
        yield from (("a binary file", "binary.bin"), ("an empty file", "empty"))
        if command != "page":  # which says that there is nothing
            yield "no results", "folder"
    if parameter.name == "plugin":
        for file in ("binary.bin", "folder", "syntax.py", "raises.py", "exits.py", "absent.py"):
            yield f"plug-in {file}", file
    document = YAML.get(parameter.name)
    if document and not (command in ("evaluate", "testbed path") or (command == "rewards serve")):
        yield from ((f"{document} that is {why}", file) for why, file in broken(document))
    if parameter.name == "prompts":
        yield from (("an empty file", "empty.tsv"), ("a binary file", "binary.tsv"), ("an empty folder", "folder"))
    if parameter.name == "device":
        yield from (
            ("no such device", "cuda:99"),
            ("a negative device", "cuda:-1"),
            ("another's device", "tpu"),
            ("a device without content", "meta"),
        )
    if parameter.name in ("reward", "rewards", "name") and command != "rewards parity":
        for text in (
            "clip:",
            ":1",
            "clip:nan",
            "clip:0",
            "clip+",
            "clip:1e999",
            "http://u:p@h",
            "ftp://h",
            "clip+clip",
        ):
            yield f"reward {text}", text
    if parameter.name == "memory_limit":
        yield from (("no unit", "12"), ("negative", "-1GiB"), ("nan", "nanGiB"), ("infinite", "infGiB"), ("tiny", "1B"))


def _declared(parameter: Any) -> Any:
    """The type of a value, of `int | None` and `list[int]` too."""
    annotation = parameter.type_descriptor.annotation
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return _bare(inner[0] if inner else annotation)


def _bare(annotation: Any) -> Any:
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return _bare(inner[0]) if inner else annotation


def _settings() -> Iterator[tuple[str, str]]:
    """Settings that no run can have: by hand, and one or two of each field of a run's sections."""
    odd = ("=3", "=", "training.images", "training.images=", "nope=1", "a.b.c=1", ".=1", "training.=1", "..=..")
    odd += ("training.images=[", "training.images={a: 1}", "training.images=!!python/name:os.system x", "training=1")
    odd += ("training.images=2001-99-99", f"training.images={'9' * 400}", "training.images=0", "evaluation.splits=nope")
    odd += ("evaluation.splits=[nope]", "evaluation.judges=[nope]", "algorithm.nope=1", "algorithm=1", "seed=1")
    odd += ("training.learning_rate=-1", "evaluation.splits=[[test]]", "[/]=1", "\x1b[31m=1", f"{LONG}=1", "a\nb=1")
    odd += (f"training.images={'[' * 3000}", "evaluation.judges={clip: 1}", "training.images=\udcff")
    for text in odd:
        yield f"setting {text if len(text) < 40 else text[:20]}", text
    for section, model in (("training", TrainingConfig), ("evaluation", EvaluationConfig)):
        for name in model.model_fields:
            yield f"{section}.{name} misspelt", f"{section}.{name}x=1"
            yield f"{section}.{name} of another type", f"{section}.{name}={{a: [1]}}"


# --- files ------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty": b"",
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "open": b"{\n",
    "binary": b"\xff\xfe\x00\x01",
    "key twice": b"version: 1\nversion: 2\n",
    "a tag": b"!!python/object/apply:os.system [touch hacked]\n",
    "deep": b"a: " + b"[" * 200 + b"]" * 200 + b"\n",
    "a bomb": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(8)),
    "strange": b'"[/]x\x1b": 1\n',
    "an unknown key": b"nonsense_key: 1\n",
}
ACCEPTED = {("config", "empty"), ("preset", "key twice")}


@cache
def _documents() -> dict[str, Document]:
    read = {"workload": WORKLOADS / "plane-linear.yaml", "suite": SUITES / "rehearsal.yaml"}
    found = {kind: yaml.safe_load(path.read_text(encoding="utf-8")) for kind, path in read.items()}
    found["preset"] = load_preset("gaussian").model_dump(mode="json", exclude_none=True)
    found["config"] = {"training": {"images": 64}, "evaluation": {"prompts": 2}, "seed": 0, "reward": "linear"}
    return found


@cache
def broken(kind: str) -> tuple[tuple[str, str], ...]:
    """What is wrong with each broken file of a kind, and the file's name."""
    return tuple((why, f"{kind}-{i}.yaml") for i, (why, _) in enumerate(_broken(kind)))


def _broken(kind: str) -> Iterator[tuple[str, bytes]]:
    for why, text in TEXTS.items():
        if (kind, why) not in ACCEPTED:
            yield why, text
    document = _documents()[kind]
    for key, value in document.items():
        if kind == "config" and key in ("reward",):
            continue
        another: Any = 5 if isinstance(value, dict | list) else {"a": [1]}
        yield f"of another type in {key}", _spelled({**document, key: another})
        if isinstance(value, dict) and key in ("training", "evaluation"):
            yield f"unknown in {key}", _spelled({**document, key: {**value, "nonsense_key": 1}})
    yield "of an unknown key more", _spelled({**document, "nonsense_key": 1})


def _spelled(document: Document) -> bytes:
    return yaml.safe_dump(document).encode()


PLUGINS = {
    "syntax.py": "def (:\n",
    "raises.py": "raise ValueError('one\\ntwo')\n",
    "exits.py": "import sys\nsys.exit(0)\n",
}


def furnish(place: Path) -> None:
    """Make the files that the command lines name in a folder; `run` is made by whoever uses them."""
    (place / "folder").mkdir()
    (place / "file").write_text("")
    for name in ("empty", "empty.tsv"):
        (place / name).write_bytes(b"")
    for name in ("binary.bin", "binary.tsv"):
        (place / name).write_bytes(bytes(range(256)) * 4)
    for name, text in PLUGINS.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "good.yaml").write_bytes(_spelled({"training": {"images": 64}}))
    for kind in _documents():
        for (_, name), (_, text) in zip(broken(kind), _broken(kind), strict=True):
            (place / name).write_bytes(text)
