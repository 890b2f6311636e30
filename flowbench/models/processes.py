"""The processes that share the work of one run, and how they speak with each other.

Everything that they exchange begins with `Processes.objects`, where all of them meet. A process that fails tells the
others there, so that none waits for one that will never come. Small things go through gloo on the host, gradients and
latents of a GPU through NCCL.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import distributed

from flowbench import launch
from flowbench.errors import PeerError, RunError, UsageError
from flowbench.models.devices import pick_device

T = TypeVar("T")

PIECE = 1 << 26  # numbers exchanged at a time: a quarter of a GiB of float32
TIMEOUT = "FLOWBENCH_TIMEOUT"  # seconds, in the environment
PATIENCE = 3600  # the longest that processes have to wait for each other by default: for a model that main downloads


@dataclass(frozen=True)
class _Message(Generic[T]):
    """What a process says where all meet: from which place, and what, or why it fails."""

    at: str
    value: T
    failure: str | None = None


class Processes:
    """This process among those of a run. Of one process alone, every method gives back what it was given.

    rank: from 0, that of the main process; count: of all; device: where this one computes. All processes must call the
    same methods in the same order, and all of them that give something give the same in every process.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count = rank, count
        self.device = device or torch.device("cpu")
        self._drawing: tuple[range, int] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def hardware(self) -> str:
        """The device's name, and how many processes have one each, for a record."""
        on_gpu, several = self.device.type == "cuda", f", {self.count} processes" if self.count > 1 else ""
        return (torch.cuda.get_device_name(self.device) if on_gpu else f"cpu x {torch.get_num_threads()}") + several

    def share(self, n: int, process: int | None = None) -> range:
        """Which of n things are this process's, or another's: neighbours, equally many where that can be."""
        k = self.rank if process is None else process
        return range(n * k // self.count, n * (k + 1) // self.count)

    # --- exchange -------------------------------------------------------------------------------------------------

    def objects(self, value: T, at: str) -> list[T]:
        """What each process gave, by rank; at: the place in the program where they meet.

        Raises PeerError when another process has failed, RunError when one cannot be reached or is at another place.
        """
        if self.count == 1:
            return [value]
        told = self._exchange(_Message(at, value))
        for rank, other in enumerate(told):
            if other.failure is not None:
                raise PeerError(f"process {rank} of {self.count}: {other.failure}")
            if other.at != at:
                raise RunError(f"processes {self.rank} and {rank} have come apart, at '{at}' and '{other.at}'")
        return [other.value for other in told]

    def wait(self) -> None:
        """Return when all processes have called this.

        Raises PeerError and RunError as `objects` does.
        """
        self.objects(None, "wait")

    def from_main(self, value: T) -> T:
        """What main gave: for what each process would find for itself, and may find otherwise."""
        return self.objects(value, "from main")[0]

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return any(self.objects(flag, "any"))

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sum over processes of each number."""
        return [sum(values) for values in zip(*self.objects(tuple(numbers), "total"), strict=True)]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (R, ...) of all processes, in the order of ranks, where these rows are: on the host or the device.

        R may differ between processes.
        """
        if self.count == 1:
            return rows
        sizes = self.objects(len(rows), "gather")
        whole = rows.new_empty((sum(sizes), *rows.shape[1:]))
        for source, part in enumerate(whole.split(sizes)):
            if source == self.rank:
                part.copy_(rows.detach())
            for piece in part.flatten().split(PIECE):  # a view, because `whole` is contiguous
                self._broadcast(piece, source)
        return whole

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter], value: T) -> list[T]:
        """Make the gradient of each parameter the sum over processes; one that has none anywhere stays without.

        Exchanges a value on the way, as `objects` does.
        """
        if self.count == 1:
            return [value]
        told = self.objects(([p.grad is not None for p in parameters], value), "gradients")
        anywhere = [any(flags) for flags in zip(*(present for present, _ in told), strict=True)]
        gradients = [_gradient(p) for p, used in zip(parameters, anywhere, strict=True) if used]
        for bucket in _buckets(gradients):
            flat = torch.cat([g.flatten().to(_exact(g.dtype)) for g in bucket])
            distributed.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))
        return [other for _, other in told]

    def fail(self, error: Exception) -> None:
        """Tell the others that this process fails; each of them raises PeerError where they meet next."""
        self._exchange(_Message("failure", None, str(error) or type(error).__name__))

    def _exchange(self, message: _Message[T]) -> list[_Message[T]]:
        told = [message] * self.count
        try:
            distributed.all_gather_object(told, message)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rpartition("] ")[2].split(". ")[0]
            raise LostError(
                f"process {self.rank} of {self.count} lost the others ({reason}); see what the one that ended first "
                "says, and continue with --resume"
            ) from error
        return told

    def _broadcast(self, piece: torch.Tensor, source: int) -> None:
        """Fill a contiguous piece with that of the process `source`; on a GPU's machine it goes through the GPU."""
        if not piece.numel():
            return
        staged = piece.to(self.device)
        if staged.dtype == torch.bool:
            distributed.broadcast(staged.view(torch.uint8), source)
        else:
            distributed.broadcast(staged, source)
        if staged.data_ptr() != piece.data_ptr():
            piece.copy_(staged)

    # --- the same random numbers, however many there are ------------------------------------------------------------

    @contextmanager
    def drawing(self, mine: range, of: int) -> Iterator[None]:
        """Within it, `randn` is asked for the rows of the groups `mine`, of so many groups of equal size."""
        self._drawing = (mine, of) if self.count > 1 else None
        try:
            yield
        finally:
            self._drawing = None

    def randn(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Standard normal numbers on the host; within `drawing` those of all rows are drawn, and these are handed out.

        So a row's noise, and what the generator gives next, do not depend on the number of processes.
        """
        if self._drawing is None:
            return torch.randn(tuple(shape), generator=generator)
        mine, of = self._drawing
        rows = shape[0] // len(mine)  # of each group: all its images, or one before they part
        everyone = torch.randn((of * rows, *shape[1:]), generator=generator)
        return everyone[mine.start * rows : mine.stop * rows]


ALONE = Processes()


class LostError(RunError):
    """The other processes cannot be reached, so that nothing can be told to them either."""


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """The processes of `accelerate launch` or `torchrun`, connected, or this one alone; device: as in `pick_device`.

    An error within it is told to the others before it leaves; they raise PeerError. So does a process other than main,
    since main says it. Raises UsageError for a device that they cannot share.
    """
    if launch.count() == 1:
        yield Processes(device=pick_device(device))
        return
    processes = Processes(launch.rank(), launch.count(), _own_device(device))
    _connect(processes.device)
    try:
        yield processes
        processes.wait()  # until main has written everything
    except LostError:
        raise
    except Exception as error:
        _end(processes, error)
        if processes.is_main or isinstance(error, PeerError):
            raise
        raise PeerError(f"process {processes.rank} of {processes.count}: {error}") from error


def _end(processes: Processes, error: Exception) -> None:
    try:
        if not isinstance(error, PeerError):
            processes.fail(error)
        # The launcher kills all processes when the first has ended: main must have saved what there is.
        processes.fail(error)
    except LostError:
        pass  # the error itself says more


def _own_device(device: str) -> torch.device:
    """The device of this process. Raises UsageError for one that several would have to share."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes") and device == "auto":
        device = "cpu"
    chosen = pick_device(device)
    if chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise UsageError(f"device '{device}' is one GPU, and there are {launch.count()} processes; use --device cuda")
    if launch.local_rank() >= torch.cuda.device_count():
        raise UsageError(
            f"process {launch.local_rank()} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start as many processes as GPUs, or use --device cpu"
        )
    torch.cuda.set_device(launch.local_rank())
    return torch.device("cuda", launch.local_rank())


def _connect(device: torch.device) -> None:
    """Join the process group, once: it lasts as long as the process.

    Raises UsageError when the launcher did not say where the processes meet.
    """
    if distributed.is_initialized():
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {launch.count()}, but {missing[0]} is not set; start with accelerate launch or torchrun"
        )
    timeout = datetime.timedelta(seconds=float(os.environ.get(TIMEOUT) or PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timeout)
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients are added in."""
    return torch.promote_types(dtype, torch.float32)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype that are about PIECE numbers together."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > PIECE):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
