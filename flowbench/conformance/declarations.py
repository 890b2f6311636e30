"""What is wrong with the defaults and the search space that an algorithm declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flowbench.algorithm import Algorithm, Defaults, Dimension
from flowbench.config import check_settings
from flowbench.errors import UsageError

MOST_DIMENSIONS = 6  # a rule of fair comparison; four or fewer where that will do
SEARCHED = ("training", "algorithm")  # a search must not choose how its results are measured


def declaration_fault(cls: type[Algorithm[Any]]) -> str | None:
    """The first fault in a sentence's rest ("its default ..."), or None.

    Defaults are tried for every model. Every end of every search dimension is tried with each of them, and with the
    settings of a model that has none.
    """
    settings = [("other models", Defaults())]
    for model, general in cls.defaults.items():
        if not isinstance(general, Defaults):
            return f"its defaults for {model} are a {type(general).__name__}; write Defaults(training, algorithm)"
        settings.append((model, general))
    for where, values in settings:
        try:
            check_settings(cls, values.training, values.algorithm)
        except UsageError as error:
            return f"its defaults for {where} are refused: {error}"
    return next(_search_faults(cls, settings), None)


def _search_faults(cls: type[Algorithm[Any]], settings: list[tuple[str, Defaults]]) -> Iterator[str]:
    if len(cls.search_space) > MOST_DIMENSIONS:
        yield f"its search space has {len(cls.search_space)} dimensions; {MOST_DIMENSIONS} are the most"
    for key, dimension in cls.search_space.items():
        section, _, name = key.partition(".")
        if section not in SEARCHED or not name:
            yield f"its search dimension '{key}' is no setting; write training.NAME or algorithm.NAME"
            continue
        if not isinstance(dimension, Dimension):
            yield f"its search dimension '{key}' is a {type(dimension).__name__}; write LogUniform(low, high) or Choice"
            continue
        for where, values in settings:
            for end in dimension.ends:
                changed = {"training": dict(values.training), "algorithm": dict(values.algorithm)}
                changed[section][name] = end
                try:
                    check_settings(cls, **changed)
                except UsageError as error:
                    yield f"its search dimension '{key}' reaches {end!r}, which is refused for {where}: {error}"
