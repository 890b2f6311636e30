"""Errors that a user can mend: one line that names the culprit and the remedy."""

from __future__ import annotations

import difflib
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
