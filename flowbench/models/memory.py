"""Work in portions that fit the device: a portion that runs out of memory is done again in halves."""

from __future__ import annotations

import gc
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch

from flowbench.errors import RunError
from flowbench.hooks import is_out_of_memory

logger = logging.getLogger("flowbench")

T = TypeVar("T")


class Ledger(Protocol):
    """What counts the work that is done, and can take back what a failed attempt has counted."""

    def mark(self) -> Any:
        """What is counted now."""

    def back(self, mark: Any) -> None:
        """Forget what was counted since a mark."""


class Portion:
    """How much of one part of a run is worked on at a time.

    what: that part, for messages ("decoding"); size: the most rows at a time, None for all of them; unit: what a row
    is; ledger: counts the work, without attempts that fail. When memory runs out, `size` becomes half of what failed,
    and stays so: one object should live as long as the run. Results do not depend on it, as long as the work on a row
    does not depend on the rows beside it.
    """

    def __init__(self, what: str, size: int | None = None, unit: str = "images", ledger: Ledger | None = None) -> None:
        self.what, self.size, self.unit, self.ledger = what, size, unit, ledger

    def map(
        self,
        work: Callable[[slice], T],
        n: int,
        groups: Sequence[int] | None = None,
        start: int = 0,
        alone: Callable[[], bool] | None = None,
    ) -> Iterator[T]:
        """work(rows) of consecutive portions of n rows from row `start` on, in turn.

        A portion that runs out of memory is tried again in halves, those before it are not. groups: lengths of runs of
        rows that are never cut apart; they sum to n, and one that is longer than `size` is a portion of its own.
        alone: asked before that; it waits for other work that takes memory, and is true where the whole portion is
        worth another try.
        Raises RunError when a portion does not fit that cannot be cut.
        """
        ends = range(1, n + 1) if groups is None else [*accumulate(groups)]
        while start < n:
            first = bisect_right(ends, start)
            least, stop = ends[first], ends[max(first, bisect_right(ends, start + (self.size or n)) - 1)]
            result = _tried(partial(work, slice(start, stop)), self.ledger)
            if result is None:
                if alone is None or not alone():
                    self._halve(stop - start, least - start)
                continue
            yield result.pop()  # not kept while the next one is worked on
            start = stop

    def whole(self, work: Callable[[int], T], n: int, smallest: int = 1, undo: Callable[[], None] | None = None) -> T:
        """work(size), done again from the beginning with half the size when it runs out of memory.

        For work on n rows that divides itself, and whose parts add to one state; `undo` takes that state back.
        smallest: rows of the longest group that the work never cuts.
        Raises RunError when it does not fit with the smallest portion.
        """
        while True:
            size = min(self.size or n, n)
            result = _tried(partial(work, size), self.ledger)
            if result is not None:
                return result.pop()
            if undo is not None:
                undo()
            self._halve(max(size, smallest), smallest)

    def _halve(self, failed: int, smallest: int) -> None:
        """Take half as many rows as failed from here on, or raise RunError."""
        if failed <= smallest:
            least = f"{smallest} {self.unit} that belong together" if smallest > 1 else f"one of its {self.unit}"
            raise RunError(
                f"out of memory: {self.what} does not fit even with {least} at a time; "
                "give the run more room with --memory-limit or a larger GPU, or lower the model's resolution"
            )
        self.size = max(failed // 2, 1)
        logger.warning(
            "out of memory: %s goes on with %d %s at a time instead of %d", self.what, self.size, self.unit, failed
        )


def release_memory() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tried(work: Callable[[], T], ledger: Ledger | None) -> list[T] | None:
    """The result of the work in a list, None if memory ran out; the ledger is then as it was before."""
    mark = ledger.mark() if ledger else None
    try:
        return [work()]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if ledger:
        ledger.back(mark)
    # Not before the error is gone: its traceback holds all that the attempt had allocated.
    release_memory()
    return None
