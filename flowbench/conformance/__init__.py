"""`flowbench check`: what the suite promises of every algorithm and reward, tried on one of them, claim by claim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flowbench.conformance.verdict import Claim, Finding, Status, Verdict
from flowbench.errors import UsageError, did_you_mean
from flowbench.registry import algorithms, rewards


def check(names: Iterable[str], model: str | None = None) -> Iterator[Finding]:
    """Try all claims on these algorithms and rewards in turn; yields as it goes.

    model: of the algorithms' runs, by default "gaussian", and of the preset that configures rewards, by default
    "mini-sd3" for images. Raises UsageError for an unknown name, before anything is tried.
    """
    chosen = list(names)
    known = {*algorithms.names(), *rewards.names()}
    for name in chosen:
        if name not in known:
            raise UsageError(f"unknown algorithm or reward '{name}'{did_you_mean(name, known)}")
    return _check(chosen, model)


def _check(names: list[str], model: str | None) -> Iterator[Finding]:
    from flowbench.conformance.algorithm_claims import check_algorithm
    from flowbench.conformance.reward_claims import check_reward

    for name in names:
        if name in algorithms.names():
            yield from check_algorithm(name, model or "gaussian")
        if name in rewards.names():
            yield from check_reward(name, model)


__all__ = ["Claim", "Finding", "Status", "Verdict", "check"]
