"""Ctrl-C ends a run between two iterations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user asked for the end. The first Ctrl-C is noted, the second one ends the program at once."""

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, Ctrl-C is noted."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.made:
                raise KeyboardInterrupt
            self.made = True

        try:
            previous = signal.signal(signal.SIGINT, note)
        except ValueError:  # not in the main thread: signals stay as they are
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
