"""How the rows of an iteration become minibatches, and what each row is handed there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from flowbench.algorithm import Algorithm
from flowbench.errors import RunError
from flowbench.models.policy import Policy
from flowbench.rollout import Batch, Compared
from flowbench.training.processes import gathered_scalars


@dataclass(frozen=True)
class Cut:
    """How a minibatch is divided: rows per part, and whether groups must stay whole."""

    size: int
    whole_groups: bool = False

    def parts(self, batch: Batch, order: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The rows (on the batch's device) of each part in turn, in this order (default: as they are).

        Rows of a group must stand next to each other; a group that is larger than `size` is a part of its own.
        Raises RunError for rows without groups, if groups must stay whole.
        """
        rows = torch.arange(len(batch)) if order is None else order
        for part in rows.split(self.size) if not self.whole_groups else self._whole(batch, rows):
            if len(part):  # a process may have no rows of a minibatch
                yield part.to(batch.x0.device)

    def _whole(self, batch: Batch, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        if batch.group is None:
            raise RunError("an algorithm with whole_groups must give its rows a group; make them with endpoints()")
        group = batch.group.cpu()[rows]
        ends = [*(1 + (group[1:] != group[:-1]).nonzero()[:, 0]).tolist(), len(rows)]
        start = 0
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if following is None or following - start > self.size:
                yield rows[start:end]
                start = end


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
    if wanted.noises:
        noise = policy.draw_noise(n * wanted.noises)
        noise = noise.view(n, wanted.noises, *noise.shape[1:])
    if wanted.sigma:
        sigma = policy.draw_sigmas(n)
    if (wanted.shared if shared is None or wanted.fixed else shared) and batch.group is not None:
        own = batch.group.unique(return_inverse=True)[1]
        noise, sigma = (None if values is None else values[own] for values in (noise, sigma))
    return replace(batch, noise=noise, noise_sigma=sigma)


@torch.no_grad()
def compared(
    algorithm: Algorithm, policy: Policy, batch: Batch, cut: Cut, own: torch.Tensor | None = None
) -> tuple[Batch, Compared]:
    """The rows of a minibatch with the scalars that `compare` gives each of them, and what it says for the log.

    own: the rows that this process measures, the others' being those of other processes; default: all.
    """
    scalars: Mapping[str, torch.Tensor] = {}
    if type(algorithm).measure is not Algorithm.measure:  # else no rows need be copied
        measured = [algorithm.measure(policy, batch.select(rows)) for rows in cut.parts(batch, own)]
        scalars = gathered_scalars(policy.processes, measured)
    result = algorithm.compare(scalars)
    return replace(batch, scalars={**batch.scalars, **result.scalars}), result
