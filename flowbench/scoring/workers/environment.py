"""Overlay environments: a small virtual environment on top of the main one, for packages whose pins conflict with it.

An overlay holds what its requirements need and the main environment lacks or has in another version. Everything else,
torch above all, is imported from the main environment, which pip never changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from flowbench.caches import home
from flowbench.errors import RunError
from flowbench.files import write_atomically
from flowbench.locks import locked

MARKER, LOG, LINK = "flowbench.json", "install.log", "flowbench_main.pth"
SHARED = ("torch", "torchvision", "torchaudio")  # compiled for each other; an overlay must not bring its own

_STEP = re.compile(r"(Collecting|Downloading|Building wheel for|Installing collected packages)\b:? ?(.*)")

Progress = Callable[[str], None]  # what pip does at the moment


class State(StrEnum):
    """Of an overlay on this machine."""

    ABSENT = "not installed"
    INCOMPLETE = "incomplete"
    READY = "installed"


def site_folders() -> list[str]:
    """The folders of installed packages that this process imports from."""
    return [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]


@dataclass(frozen=True)
class Environment:
    """The overlay for these requirements over the main environment that this process runs in.

    Rewards with the same requirements share one. Another main environment, or another Python, has its own.
    """

    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is, or would be."""
        key = json.dumps([sorted(self.requirements), sys.prefix, *sys.version_info[:2]])
        return home() / "environments" / hashlib.sha256(key.encode()).hexdigest()[:10]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def state(self) -> State:
        """Whether it can be used."""
        if (self.folder / MARKER).is_file() and self.python.exists():
            return State.READY
        return State.INCOMPLETE if self.folder.exists() else State.ABSENT

    @property
    def megabytes(self) -> float:
        """Size on disk."""
        files = (f for f in self.folder.rglob("*") if f.is_file() and not f.is_symlink())
        return sum(f.stat().st_size for f in files) / 1e6

    def versions(self) -> dict[str, str]:
        """Version of every package that it has of its own."""
        found = distributions(path=[str(self._packages())])
        return dict(sorted((d.metadata["Name"], d.version) for d in found))

    def remedy(self, reward: str) -> str:
        """The command that installs it."""
        return f"'flowbench rewards install {reward}'"

    def check(self, reward: str) -> None:
        """Raises RunError with the remedy when it cannot be used."""
        if self.state is not State.READY:
            raise RunError(
                f"the environment of reward '{reward}' is {self.state}; "
                f"{'create' if self.state is State.ABSENT else 'complete'} it with {self.remedy(reward)}"
            )

    def install(self, reward: str, progress: Progress = lambda note: None) -> None:
        """Create it, or complete an interrupted attempt: pip keeps what it has downloaded.

        Raises RunError, with pip's own last word and the log, when pip fails; BusyError while another process does it.
        """
        with locked(self.folder, f"the environment of reward '{reward}'", beside=True):
            self._install(reward, progress)

    def _install(self, reward: str, progress: Progress) -> None:
        (self.folder / MARKER).unlink(missing_ok=True)
        progress("creating the environment")
        self._create()
        progress("resolving requirements")
        self._pip(reward, progress)
        content = {"requirements": self.requirements, "over": sys.prefix, "packages": self.versions()}
        write_atomically(self.folder / MARKER, json.dumps(content, indent=1) + "\n")

    def remove(self) -> None:
        """Delete it from the disk. Raises BusyError while another process installs it."""
        with locked(self.folder, f"environment '{self.folder}'", beside=True):
            # Without its marker first: what an interruption leaves is not taken for an environment.
            (self.folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def _create(self) -> None:
        # The overlay sees the main environment's pip; only where that has none it needs its own.
        bare = ["--without-pip"] if importlib.util.find_spec("pip") else []
        # What is left over a Python that is gone cannot be completed.
        fresh = [] if self.python.exists() else ["--clear"]
        made = subprocess.run(
            [sys.executable, "-m", "venv", *bare, *fresh, str(self.folder)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise RunError(f"cannot create a virtual environment in {self.folder}: {_last_line(made.stderr)}")
        write_atomically(self._packages() / LINK, "\n".join(site_folders()) + "\n")

    def _pip(self, reward: str, progress: Progress) -> None:
        constraints = self.folder / "constraints.txt"
        write_atomically(constraints, "".join(f"{line}\n" for line in self._constraints()))
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--no-warn-conflicts"]
        command += ["--disable-pip-version-check", "--constraint", str(constraints), *self.requirements]
        errors = []
        with (
            (self.folder / LOG).open("w", encoding="utf-8") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
        ):
            assert pip.stdout is not None
            for line in pip.stdout:
                log.write(line)
                if line.startswith("ERROR:"):
                    errors.append(line.removeprefix("ERROR:").strip())
                if note := _note(line):
                    progress(note)
        if pip.returncode:
            why = errors[-1] if errors else f"pip ended with status {pip.returncode}"
            raise RunError(
                f"cannot install what reward '{reward}' requires: {why} (all of pip's output: {self.folder / LOG}); "
                f"run {self.remedy(reward)} again to continue"
            )

    def _constraints(self) -> list[str]:
        asked = {re.split(r"[^\w.-]", r, maxsplit=1)[0].lower() for r in self.requirements}
        lines = []
        for package in SHARED:
            try:
                lines += [f"{package}=={version(package)}"] if package not in asked else []
            except PackageNotFoundError:
                continue
        return lines


def _note(line: str) -> str:
    """What a line of pip's output says of the progress, in a few words; empty for all else."""
    match = _STEP.match(line.strip())
    if not match:
        return ""
    what, rest = match.groups()
    if what.startswith("Installing"):
        return f"installing {len(rest.split(', '))} packages"
    return f"{what.lower()} {rest.split(' (from')[0].rsplit('/', 1)[-1]}"


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
