"""Ctrl-C, SIGTERM and SIGHUP end a run between two iterations, and anything else at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flowbench.errors import TerminatedError

# What the system ends a program with; not every system has the second.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def _raise(number: int, frame: FrameType | None) -> None:
    raise TerminatedError(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise TerminatedError, unless somebody has said what else they shall do (nohup)."""
    with _handling({number: _raise for number in ENDING if signal.getsignal(number) is signal.SIG_DFL}):
        yield


class StopRequest:
    """Whether somebody asked for the end: made, and by which signal. The second signal of a kind ends at once."""

    def __init__(self) -> None:
        self.made, self.signal = False, int(signal.SIGINT)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the first signal is noted: Ctrl-C, and SIGTERM and SIGHUP where nobody else handles them."""
        seen: set[int] = set()

        def note(number: int, frame: FrameType | None) -> None:
            if number in seen:
                raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError(number)
            seen.add(number)
            if not self.made:
                self.made, self.signal = True, number

        ours = [number for number in ENDING if signal.getsignal(number) in (signal.SIG_DFL, _raise)]
        with _handling(dict.fromkeys((signal.SIGINT, *ours), note)):
            yield


@contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Within it signals have these handlers; in any thread but the main one they stay as they are."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
