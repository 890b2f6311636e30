"""How an iteration is divided among processes and joined again, so that its update does not depend on their number.

Each process generates, decodes and scores whole prompt groups. Then every one of them has the whole iteration: it
prepares the same rows and cuts the same minibatches. Of a minibatch each measures, and differentiates, its own rows;
the gradients are added up before the optimizer's step. See docs/several-gpus.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from flowbench.config import TrainingConfig
from flowbench.errors import RunError, UsageError
from flowbench.models.processes import Processes
from flowbench.models.sampling import Samples
from flowbench.rollout import Batch
from flowbench.stored import HOST, StoredRows

CHECKED_EVERY = 10  # iterations; hashing the weights takes time

NamedMeans: TypeAlias = dict[str, list[tuple[torch.Tensor, int]]]  # and of how many values each is


def check_division(processes: Processes, training: TrainingConfig) -> None:
    """Raise UsageError if a process would have no prompt of its own."""
    if processes.count > training.prompts_per_iteration:
        raise UsageError(
            f"{processes.count} processes cannot share training.prompts_per_iteration="
            f"{training.prompts_per_iteration}, because a prompt's images stay together; start fewer processes"
        )


def own_groups(processes: Processes, training: TrainingConfig) -> tuple[range, slice]:
    """The prompts of an iteration that are this process's, and the rows of their images."""
    mine, size = processes.share(training.prompts_per_iteration), training.images_per_prompt
    return mine, slice(mine.start * size, mine.stop * size)


def joined(
    processes: Processes, samples: Samples, images: torch.Tensor, scores: Mapping[str, torch.Tensor]
) -> tuple[Samples, torch.Tensor, dict[str, torch.Tensor]]:
    """Samples, images and scores of all processes, from those of this one."""
    rows = {
        name: _gathered(processes, value)
        for name, value in vars(samples).items()
        if isinstance(value, torch.Tensor) and name != "sigmas"
    }
    scores = {name: processes.gather(values) for name, values in scores.items()}
    return replace(samples, **rows), _gathered(processes, images), scores


def _gathered(processes: Processes, rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes; those that lie in host memory stay there."""
    if isinstance(rows, StoredRows):
        return StoredRows(processes.gather(rows.fetched(HOST)), None, rows.device)
    return processes.gather(rows)


def own_rows(processes: Processes, batch: Batch, whole_groups: bool) -> torch.Tensor:
    """The rows (on the host) of a minibatch that are this process's; none is in two processes, and none left out.

    They are equally many in all processes, as far as groups may be cut. A process may have none.
    """
    n = len(batch)
    if not whole_groups or processes.count == 1 or batch.group is None:
        return torch.arange(n)[_slice(processes.share(n))]
    group = batch.group.cpu()
    borders = torch.tensor([0, *(1 + (group[1:] != group[:-1]).nonzero()[:, 0]).tolist(), n])

    def nearest(place: int) -> int:
        return int(borders[(borders - place).abs().argmin()])

    share = processes.share(n)
    return torch.arange(nearest(share.start), nearest(share.stop))


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def gathered_scalars(processes: Processes, measured: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The named scalars (R,) of all rows of a minibatch, from those of this process, part by part.

    A process without rows has no parts.
    """
    if processes.count > 1:
        own = [{name: values.cpu() for name, values in part.items()} for part in measured]
        told = [part for parts in processes.objects(own, "measured") for part in parts]
        measured = [{name: values.to(processes.device) for name, values in part.items()} for part in told]
    return {name: torch.cat([part[name] for part in measured]) for name in measured[0]}


def told_means(processes: Processes, parts: NamedMeans) -> NamedMeans:
    """Named means as they can be told to other processes, which have other devices; of one alone, as they are."""
    if processes.count == 1:
        return parts
    return {name: [(mean.cpu(), n) for mean, n in means] for name, means in parts.items()}


def joined_means(told: Sequence[NamedMeans]) -> NamedMeans:
    """The named means of all processes, each with the number of its values, from those of each."""
    if len(told) == 1:
        return told[0]
    names = dict.fromkeys(name for means in told for name in means)
    return {name: [mean for means in told for mean in means.get(name, [])] for name in names}


def check_equal(processes: Processes, tensors: Sequence[torch.Tensor], iteration: int) -> None:
    """Raise RunError if these tensors are not the same to the last bit in all processes; now and then.

    iteration: how many are done.
    """
    if processes.count == 1 or (iteration > 2 and iteration % CHECKED_EVERY):
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digests = processes.objects(digest.hexdigest(), "weights")
    if len(set(digests)) > 1:
        odd = next(rank for rank, other in enumerate(digests) if other != digests[0])
        raise RunError(
            f"after iteration {iteration} the weights of process {odd} are not those of process 0: what the algorithm "
            "keeps of rows must be gathered (docs/several-gpus.md), and all GPUs must be of one kind"
        )
