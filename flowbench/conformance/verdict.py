"""Claims, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from flowbench.errors import RunError, RunInterruptedError, UsageError

Subject = TypeVar("Subject")


class Status(StrEnum):
    """The result of trying a claim."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Verdict:
    """A claim's result; reason: one line, empty for a plain pass."""

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Claim(Generic[Subject]):
    """Something that must hold of every plug-in of a kind, and the function that tries it."""

    text: str
    check: Callable[[Subject], Verdict]


@dataclass(frozen=True)
class Finding:
    """What became of one claim about one plug-in; kind is "algorithm" or "reward"."""

    kind: str
    plugin: str
    claim: str
    verdict: Verdict


def passed(reason: str = "") -> Verdict:
    """The claim holds."""
    return Verdict(Status.PASS, reason)


def failed(reason: str) -> Verdict:
    """The claim does not hold."""
    return Verdict(Status.FAIL, reason)


def skipped(reason: str) -> Verdict:
    """The claim could not be tried, or says nothing about this plug-in."""
    return Verdict(Status.SKIPPED, reason)


def one_line(error: BaseException) -> str:
    """An error as one line: its own words if it was written for users, else its type before them."""
    words = " ".join(str(error).split())
    if isinstance(error, RunError | UsageError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def examine(kind: str, plugin: str, claims: Sequence[Claim[Subject]], subject: Subject) -> Iterator[Finding]:
    """Try the claims in turn; an exception out of a foreign plug-in is a failure of the claim being tried."""
    for claim in claims:
        try:
            verdict = claim.check(subject)
        except RunInterruptedError:
            raise
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
            verdict = failed(one_line(error))
        yield Finding(kind, plugin, claim.text, verdict)
