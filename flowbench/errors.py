"""Errors that a user can mend: one line that names the culprit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """The request is wrong (unknown name, bad key, wrong type); the command line exits with 2."""


class NotApplicableError(UsageError):
    """An algorithm needs what a reward does not have: no setting can mend that, and a table says so."""


class RunError(Exception):
    """The request was fine but could not be carried out (missing weights, NaN reward, full disk); exit code 1."""


class RunInterruptedError(RunError):
    """The user stopped the run; its checkpoint is saved."""


class PeerError(RunError):
    """Another process of this run failed, or main has been told of this one's failure: it is said once, by main."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known name, else the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(names) or 'none'}"
