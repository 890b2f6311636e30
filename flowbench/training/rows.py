"""How the rows of an iteration become minibatches, and what each row is handed there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from flowbench.algorithm import Algorithm
from flowbench.errors import RunError
from flowbench.models.memory import Portion
from flowbench.models.policy import Policy
from flowbench.models.processes import ALONE, Processes
from flowbench.rollout import Batch, Compared
from flowbench.stored import HOST, StoredRows
from flowbench.training.processes import gathered_scalars

UPDATE = "the update"  # in messages about memory


@dataclass(frozen=True)
class Cut:
    """How a minibatch is divided: rows per part, and whether groups must stay whole."""

    size: int
    whole_groups: bool = False

    def parts(self, batch: Batch, order: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The rows (K,) int64, on the host, of each part in turn, in this order (default: as they are).

        Rows of a group must stand next to each other; a group that is larger than `size` is a part of its own.
        Raises RunError for rows without groups, if groups must stay whole.
        """
        rows = torch.arange(len(batch)) if order is None else order
        yield from Portion("cutting", self.size, "rows").map(
            lambda part: rows[part], len(rows), self.groups(batch, rows)
        )

    def groups(self, batch: Batch, rows: torch.Tensor) -> Sequence[int] | None:
        """How many of these rows, one after the other, belong to each group that must stay whole; None if none must.

        Raises RunError for rows without groups, if groups must stay whole.
        """
        if not self.whole_groups:
            return None
        if batch.group is None:
            raise RunError("an algorithm with whole_groups must give its rows a group; make them with endpoints()")
        lengths: list[int] = batch.group.cpu()[rows].unique_consecutive(return_counts=True)[1].tolist()
        return lengths


def shuffled(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The batch's rows in random order; rows of one group stay next to each other."""
    rows = torch.randperm(len(batch), generator=generator)
    if batch.group is None:
        return rows
    groups = batch.group.cpu()[rows]
    rank = torch.randperm(int(groups.max()) + 1, generator=generator)
    return rows[rank[groups].argsort(stable=True)]


def drawn(algorithm: Algorithm, policy: Policy, batch: Batch, shared: bool | None = None) -> Batch:
    """The rows with the noise and sigmas that the algorithm asks for; shared: as `training.shared_noise`.

    They are drawn on the host for the whole minibatch, noise first and then sigmas, so that a row's own do not depend
    on how the minibatch is cut.
    """
    wanted, n = algorithm.draws(), len(batch)
    noise = sigma = None
    own = torch.arange(n)
    if (wanted.shared if shared is None or wanted.fixed else shared) and batch.group is not None:
        own = batch.group.cpu().unique(return_inverse=True)[1]
    if wanted.noises:
        latents = policy.draw_noise(n * wanted.noises, HOST)
        noise = StoredRows(latents.view(n, wanted.noises, *latents.shape[1:]), own, batch.x0.device)
    if wanted.sigma:
        sigma = policy.draw_sigmas(n)[own]
    return replace(batch, noise=noise, noise_sigma=sigma)


@torch.no_grad()
def compared(
    algorithm: Algorithm,
    policy: Policy,
    batch: Batch,
    cut: Cut,
    portion: Portion | None = None,
    own: torch.Tensor | None = None,
    processes: Processes = ALONE,
) -> tuple[Batch, Compared]:
    """The rows of a minibatch with the scalars that `compare` gives each of them, and what it says for the log.

    portion: in place of the cut's size, where one is remembered; own: the rows that this process measures, by
    default all; the others are those of the other `processes`.
    """
    scalars: Mapping[str, torch.Tensor] = {}
    if type(algorithm).measure is not Algorithm.measure:  # else no rows need be fetched
        rows = torch.arange(len(batch)) if own is None else own
        portion = portion or Portion(UPDATE, cut.size, "rows")
        measure = partial(_measured, algorithm, policy, batch, rows)
        measured = [*portion.map(measure, len(rows), cut.groups(batch, rows))]
        scalars = gathered_scalars(processes, measured)
    result = algorithm.compare(scalars)
    return replace(batch, scalars={**batch.scalars, **result.scalars}), result


def _measured(
    algorithm: Algorithm, policy: Policy, batch: Batch, rows: torch.Tensor, part: slice
) -> Mapping[str, torch.Tensor]:
    return algorithm.measure(policy, batch.select(rows[part]).fetched())
