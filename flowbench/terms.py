"""What the name of a reward means: a single one, or a weighted sum such as "clip:0.5+jpeg:0.5".

Names and metadata alone: whoever builds the rewards is flowbench/scoring/combination.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from flowbench.errors import UsageError
from flowbench.names import path_name
from flowbench.registry import RewardInfo, check_address, rewards

# A weight follows the last colon. In a URL it must stand behind a path, since a colon also precedes the port.
_TERM = re.compile(r"(?P<name>https?://[^/]+(?:/.*?)?|[^:]*)(?::(?P<weight>[^:/]*))?")


@dataclass(frozen=True)
class Term:
    """One reward of a sum and its weight, which is finite and not 0."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1.0 else f"{self.name}:{self.weight:g}"


def parse_reward(text: str) -> tuple[Term, ...]:
    """The terms of "clip", "clip:0.5+jpeg:0.5" or "http://host:8000/+clip:2", sorted by name.

    Sorted, so that the order in which a sum is written makes no other run of it.
    Raises UsageError for an unknown name, a weight that is no number, a reward that stands twice, or an address with
    credentials.
    """
    check_address(text)
    terms = sorted((_term(part.strip(), text) for part in text.split("+")), key=lambda t: t.name)
    names = [t.name for t in terms]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"reward '{name}' stands twice in '{text}'; write it once, with the sum of its weights")
        rewards.require(name)
    return tuple(terms)


def _term(part: str, text: str) -> Term:
    match = _TERM.fullmatch(part)
    if not match or not match["name"].strip():
        raise UsageError(f"reward '{text}' has no name in {part!r}; write for example clip:0.5+jpeg:0.5")
    name, weight = match["name"].strip(), match["weight"]
    if weight is None:
        return Term(name)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise UsageError(
            f"the weight {weight!r} of reward '{name}' is not a number other than 0; write for example {name}:0.5"
        )
    return Term(name, value)


def spell(terms: tuple[Term, ...]) -> str:
    """The one spelling of a sum, which `parse_reward` reads back."""
    return "+".join(map(str, terms))


def term_names(text: str) -> tuple[str, ...]:
    """Names of the rewards in a sum, without asking whether they exist: for the records of other installations."""
    return tuple(sorted(_term(part.strip(), text).name for part in text.split("+")))


def trained_metrics(text: str) -> frozenset[str]:
    """Names of the metrics that a run on this reward trains on."""
    names = term_names(text)
    truth = ("oracle_exact", "oracle_soft") if "oracle" in names else ()
    return frozenset({*map(path_name, names), *truth})


UNGUIDED = "@1"  # ends the name of a metric of images that were sampled without guidance, beside those with it


def plain_metric(metric: str) -> str:
    """The metric's name without what says how its images were sampled: "clip" of "clip@1"."""
    return metric.removesuffix(UNGUIDED)


def combined_info(terms: tuple[Term, ...]) -> RewardInfo:
    """What is true of a sum: differentiable if all terms are, truth only if it is the plain truth, bounds added up.

    Raises UsageError when one term scores images and another points.
    """
    infos = [rewards.describe(t.name) for t in terms]
    domains = {i.domain: i.name for i in infos}
    if len(domains) > 1:
        (one, first), (other, second) = domains.items()
        raise UsageError(f"reward '{first}' scores {one} and reward '{second}' scores {other}; they have no sum")
    if len(terms) == 1 and terms[0].weight == 1.0:
        return infos[0]
    bounds = [sorted(b * t.weight for b in i.range) for i, t in zip(infos, terms, strict=True)]
    return RewardInfo(
        name=spell(terms),
        source="; ".join(i.source for i in infos),
        licence="; ".join(dict.fromkeys(i.licence for i in infos)),
        range=(sum(low for low, _ in bounds), sum(high for _, high in bounds)),
        differentiable=all(i.differentiable for i in infos),
        truth=False,
        summary=f"Weighted sum of {', '.join(i.name for i in infos)}.",
        domain=infos[0].domain,
        reads_prompt=any(i.reads_prompt for i in infos),
        needs_metadata=tuple(dict.fromkeys(key for i in infos for key in i.needs_metadata)),
        needs_reference=any(i.needs_reference for i in infos),
    )
