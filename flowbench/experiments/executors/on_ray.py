"""Runs on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine for as long as the study takes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowbench.errors import UsageError
from flowbench.experiments.executors import DIED, POLL_SECONDS, require
from flowbench.experiments.executors.worker import Place, Worker
from flowbench.experiments.jobs import Job


@dataclass(frozen=True)
class RayExecutor:
    """Actors that make one run after another; Ray places them.

    workers: None is as many as the cluster has room for; cores, gpus: of each. Run folders, plug-in files and flowbench
    must be there under the same paths on all machines.
    """

    workers: int | None = None
    cores: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        require("ray", "ray")

    def carry_out(
        self, jobs: Sequence[Job], plugins: Sequence[Path], running: Callable[[Job], None]
    ) -> Iterator[tuple[Job, str | None]]:
        """See Executor."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ours = not ray.is_initialized()
        handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place, and leaves it there
        if ours:
            local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            ray.init(log_to_driver=False, **local)
        waiting = deque(jobs)
        files = [file.resolve() for file in plugins]
        busy: dict[Any, tuple[Any, Job]] = {}
        try:
            free = [self._actor() for _ in range(min(self._workers(ray), len(waiting)))]
            while waiting or busy:
                while waiting and free:
                    actor, job = free.pop(), waiting.popleft()
                    busy[actor.make.remote(_absolute(job), files)] = (actor, job)
                for actor in free:  # makes room for one that waits for it
                    ray.kill(actor)
                free = []
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=POLL_SECONDS)
                for reference in ready:
                    actor, job = busy.pop(reference)
                    try:
                        failure = ray.get(reference)
                        free.append(actor)
                    except ray.exceptions.RayActorError:
                        failure = DIED
                        free += [self._actor()] if waiting else []
                    yield job, failure
                for _, job in busy.values():
                    running(job)
        finally:
            for actor, _ in busy.values():
                ray.kill(actor)
            if ours:
                ray.shutdown()
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)

    def _actor(self) -> Any:
        import ray

        remote = ray.remote(num_cpus=self.cores, num_gpus=self.gpus)(Worker)
        return remote.remote(Place(self.cores, Path.cwd()))

    def _workers(self, ray: Any) -> int:
        """How many actors: as asked, or as there is room for now."""
        if self.workers is not None:
            return self.workers
        there = ray.cluster_resources()
        room = int(there.get("CPU", 0)) // self.cores
        if self.gpus:
            room = min(room, int(there.get("GPU", 0)) // self.gpus)
        if room < 1:
            raise UsageError(
                f"the Ray cluster has no room for a run of {self.cores} cores and {self.gpus} GPUs; ask for less"
            )
        return room


def _absolute(job: Job) -> Job:
    return replace(job, folder=job.folder.resolve())
