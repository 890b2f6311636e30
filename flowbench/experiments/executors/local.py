"""Runs in processes of this machine, each with cores and a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowbench.experiments.executors import DIED, POLL_SECONDS
from flowbench.experiments.executors.worker import Place, begin, make
from flowbench.experiments.jobs import Job

GRACE_SECONDS = 0.5


@dataclass(frozen=True)
class LocalExecutor:
    """`workers` processes that are used again and again.

    cores: of each, None is an equal share of all; several workers have cores of their own, if there are enough.
    gpus: of each, 0 or 1; workers take turns where there are more of them than GPUs, and see no other GPU.
    """

    workers: int = 1
    cores: int | None = 1
    gpus: int = 0

    def carry_out(
        self, jobs: Sequence[Job], plugins: Sequence[Path], running: Callable[[Job], None]
    ) -> Iterator[tuple[Job, str | None]]:
        """See Executor."""
        waiting = deque(jobs)
        free = [_Slot(place) for place in self.places()[: len(waiting)]]
        slots = list(free)
        busy: dict[Future[str | None], tuple[_Slot, Job]] = {}
        try:
            while waiting or busy:
                while waiting and free:
                    slot, job = free.pop(0), waiting.popleft()
                    busy[slot.submit(job, plugins)] = (slot, job)
                ready, _ = wait(busy, POLL_SECONDS, FIRST_COMPLETED)
                for future in ready:
                    slot, job = busy.pop(future)
                    failure = _failure(future)
                    free.append(slot)
                    yield job, failure
                for _, job in busy.values():
                    running(job)
        finally:
            for slot, _ in busy.values():
                slot.interrupt()
            for slot in slots:
                slot.pool.shutdown(cancel_futures=True)

    def places(self) -> list[Place]:
        """Where each worker works."""
        mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        cores = self.cores or max(1, len(mine) // self.workers)
        enough = self.workers > 1 and self.workers * cores <= len(mine)
        gpus = _gpus() if self.gpus else []
        return [
            Place(
                cores,
                Path.cwd(),
                frozenset(mine[i * cores : (i + 1) * cores]) if enough else None,
                gpus[i % len(gpus)] if gpus else None,
            )
            for i in range(self.workers)
        ]


class _Slot:
    """One process at a place, and another one when it dies: a pool of one, so that a death is that of one run."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.pool, self.process = self._start()

    def _start(self) -> tuple[ProcessPoolExecutor, Future[int]]:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, spawn, initializer=begin, initargs=(self.place,))
        return pool, pool.submit(os.getpid)

    def interrupt(self) -> None:
        """Have the process end its run after this iteration, with everything saved; one that evaluates ends at once."""
        if self.process.done() and self.process.exception() is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.result(), signal.SIGTERM)

    def submit(self, job: Job, plugins: Sequence[Path]) -> Future[str | None]:
        try:
            return self.pool.submit(make, job, plugins)
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool, self.process = self._start()
            return self.pool.submit(make, job, plugins)


def _failure(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        # Whoever kills all processes of a command may meet the worker first: that is no failure of its run.
        time.sleep(GRACE_SECONDS)
        return DIED


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
