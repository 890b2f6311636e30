"""Errors that a user can mend: one line that names the culprit and the remedy."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from signal import SIGINT


class UsageError(Exception):
    """The request is wrong (unknown name, bad key, wrong type); the command line exits with 2."""


class NotApplicableError(UsageError):
    """An algorithm needs what a reward does not have: no setting can mend that, and a table says so."""


class RunError(Exception):
    """The request was fine but could not be carried out (missing weights, NaN reward, full disk); exit code 1."""


class BusyError(RunError):
    """Another process is at work there; nothing was done."""


class RunInterruptedError(RunError):
    """The user or the system stopped the run; its checkpoint is saved. signal: the number of the one that did it."""

    def __init__(self, message: str, signal: int = SIGINT) -> None:
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return str(self.args[0])


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP ends the program; like KeyboardInterrupt it is no Exception, which plug-ins may catch."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class PeerError(RunError):
    """Another process of this run failed, or main has been told of this one's failure: it is said once, by main."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known name, else the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(names) or 'none'}"


def described(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def raised_at(error: BaseException, file: str | None) -> str:
    """ " (plugin.py:12)": the innermost line of that file that led to an error; without one, where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    found = ([frame for frame in frames if frame.filename == file] or frames)[-1:]
    return f" ({shown_path(found[0].filename)}:{found[0].lineno})" if found else ""


def shown_path(file: str) -> str:
    """A file's path, relative where it lies below the current folder."""
    return file.removeprefix(os.getcwd() + os.sep)


def first_fault(error: Exception) -> str:
    """The first thing that is wrong with a file's content, in one line: pydantic's first complaint, with its place."""
    if isinstance(error, OSError):
        return error.strerror or described(error)
    if not hasattr(error, "errors"):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    said = first["msg"].splitlines()[0].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    if not place:
        return said
    return f"'{place}', which is unknown" if first["type"] == "extra_forbidden" else f"'{place}': {said}"


def shortened(value: object, most: int = 80) -> str:
    """What a value looks like, in at most so many characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 4] + " ..."
