"""The process that makes runs for a study.

Its cores, threads and GPU are settled before anything heavy is imported, so that every library sees them: this module
imports neither numpy nor torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.errors import RunInterruptedError, UsageError

if TYPE_CHECKING:
    from flowbench.experiments.jobs import Job

WATCH_SECONDS = 1.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Place:
    """Where a worker works.

    threads: of every library; cores: the numbers of those that it may use, None is any; gpu: the one that it sees, as
    CUDA_VISIBLE_DEVICES names it, None is all; folder: what relative paths are relative to.
    """

    threads: int
    folder: Path
    cores: frozenset[int] | None = None
    gpu: str | None = None


class Worker:
    """Makes one run after another, so that imports are paid once."""

    def __init__(self, place: Place) -> None:
        os.chdir(place.folder)
        if place.cores is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, place.cores)
        if place.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
        os.environ.update(dict.fromkeys(_THREADS, str(place.threads)))
        self.threads = place.threads
        self.loaded: set[Path] = set()

    def make(self, job: Job, plugins: Sequence[Path] = ()) -> str | None:
        """Make or continue a run; None, or in one line why it failed.

        Raises RunInterruptedError alone.
        """
        import torch

        from flowbench.experiments.jobs import run_job
        from flowbench.registry import load_plugin_file

        torch.set_num_threads(self.threads)
        try:
            for file in plugins:
                if file not in self.loaded:
                    load_plugin_file(file)
                    self.loaded.add(file)
            return run_job(job).failure
        except RunInterruptedError:
            raise
        except UsageError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and costs its own run alone
            first = (str(error).strip() or "no message").splitlines()[0]
            return f"{type(error).__name__}: {first}"


_worker: Worker | None = None


def begin(place: Place) -> None:
    """Make this process a worker that ends with its parent."""
    global _worker
    # A training run answers Ctrl-C by itself; an evaluation is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(place)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # waits for the end of a pipe that the parent alone holds, however it ends
        os._exit(1)


def make(job: Job, plugins: Sequence[Path]) -> str | None:
    """`Worker.make` of this process's worker."""
    assert _worker is not None
    return _worker.make(job, plugins)


def end_with(process: int) -> None:
    """End this process when another of this machine, by its id, has ended."""

    def watch() -> None:
        while _alive(process):
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
