"""The space that is searched: what the algorithm declares, less what the model refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowbench.algorithm import Choice, Dimension, Integers, LogUniform
from flowbench.errors import UsageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

EDGE = 0.05  # share of a range, at either end, in which an optimum is reported


@dataclass(frozen=True)
class SearchSpace:
    """dimensions: by a setting's full name; fixed: settings of which the model takes one choice alone; refused: the
    choices that it does not take, in words."""

    dimensions: Mapping[str, Dimension]
    fixed: Mapping[str, Any]
    refused: tuple[str, ...]

    def spelled(self) -> dict[str, str]:
        """Each dimension in words, for a log."""
        return {key: repr(dimension) for key, dimension in self.dimensions.items()}

    def edges(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings that stand at an end of their range, in words; a wider one might be better."""
        return tuple(
            f"{key} = {settings[key]:.4g} stands at {dimension.place(settings[key]):.2f} of {dimension.ends[0]:.4g} to "
            f"{dimension.ends[-1]:.4g}"
            for key, dimension in self.dimensions.items()
            if _ordered(dimension) and not EDGE < dimension.place(settings[key]) < 1 - EDGE
        )


def _ordered(dimension: Dimension) -> bool:
    """Whether its first and last value are ends, beyond which there could be more."""
    if not isinstance(dimension, Choice):
        return True
    numbers = [v for v in dimension.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return len(numbers) == len(dimension.values) and numbers == sorted(numbers)


def search_space(declared: Mapping[str, Dimension], accept: Callable[[Mapping[str, Any]], object]) -> SearchSpace:
    """The declared space without the choices that a model refuses.

    accept: raises UsageError for settings that cannot be run, one of them at a time here. A choice of which one value
    is left is no dimension; one of which none is left is an error.
    """
    dimensions: dict[str, Dimension] = {}
    fixed: dict[str, Any] = {}
    refused: list[str] = []
    for key, dimension in declared.items():
        if not isinstance(dimension, Choice):
            dimensions[key] = dimension
            continue
        taken = []
        for value in dimension.values:
            try:
                accept({key: value})
                taken.append(value)
            except UsageError as error:
                refused.append(f"{key}={value}: {error}")
                last = error
        if not taken:
            raise last
        if len(taken) == 1:
            fixed[key] = taken[0]
        else:
            dimensions[key] = Choice(tuple(taken))
    if not dimensions:
        raise UsageError("the algorithm declares nothing to search; add `search_space` to its class")
    return SearchSpace(dimensions, fixed, tuple(refused))


def distribution(dimension: Dimension) -> BaseDistribution:
    """The dimension as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, Integers):
        return IntDistribution(dimension.low, dimension.high)
    return FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogUniform))
