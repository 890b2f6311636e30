"""Work beside the main thread's: one piece at a time in a second thread, on a GPU in a stream of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event
from types import TracebackType

import torch

logger = logging.getLogger("flowbench")


def pays_on(device: torch.device) -> bool:
    """Whether a second thread finds something to work with. On a CPU two would share what one uses up."""
    return device.type == "cuda"


class Helper:
    """A second thread that does one piece of work while the thread that made it, here "main", goes on.

    stream: what pieces run in on a GPU, after all that main's stream was asked for before a piece began; one should
    live as long as the run, since memory is kept for each. What main hands over must not be changed or freed
    meanwhile, and a piece must not return before the device has done it. Grad mode and autocast belong to a thread: a
    piece begins with torch's defaults.

    When memory runs out while both are at work, who lacks it waits for the other and tries again (`main_alone`,
    `piece_alone`). From then on they are `taking_turns`: main waits for each piece. So nothing that fits alone fails,
    or is divided further, because of the other.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.taking_turns = False
        self._stream = stream
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flowbench-helper")
        self._piece: Future[None] | None = None
        self._main_waits = Event()
        self._main_lacked = self._piece_lacked = False

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait until nothing is at work any more."""
        self._main_waits.set()
        self._pool.shutdown()

    def start(self, piece: Callable[[], None]) -> None:
        """Begin a piece of work, once the one before it is done.

        Raises whatever that one raised, as it was raised.
        """
        self.wait()
        self._main_waits.clear()
        before = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._piece = self._pool.submit(self._run, piece, before)
        if self.taking_turns:
            self.wait()

    def wait(self) -> None:
        """Do nothing until no piece is at work. Raises whatever the last one raised, as it was raised."""
        self._main_waits.set()
        piece, self._piece = self._piece, None
        if piece is not None:
            piece.result()

    def main_alone(self) -> bool:
        """For main, which has no memory left: wait until it is alone. False where it has waited before."""
        if self._main_lacked:
            return False
        self._main_lacked = True
        self._take_turns()
        self.wait()
        return True

    def piece_alone(self) -> bool:
        """For a piece, which has no memory left: wait until it is alone. False where one has waited before."""
        if self._piece_lacked:
            return False
        self._piece_lacked = True
        self._take_turns()
        self._main_waits.wait()
        return True

    def _take_turns(self) -> None:
        self.taking_turns = True
        logger.warning("out of memory: rollouts, and decoding and scoring beside them, take turns from here on")

    def _run(self, piece: Callable[[], None], before: torch.cuda.Event | None) -> None:
        with ExitStack() as stack:
            if self._stream is not None and before is not None:
                stack.enter_context(torch.cuda.stream(self._stream))  # the thread's device is then the stream's
                self._stream.wait_event(before)
            piece()
