"""Whether a loss is a function of rows: how a minibatch is cut and ordered must not change its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flowbench.conformance.bench import AlgorithmBench
from flowbench.conformance.verdict import Verdict, failed, passed, skipped
from flowbench.rollout import Batch
from flowbench.seeding import generator_for
from flowbench.training.rows import Cut, shuffled
from flowbench.training.trainer import Trainer

ROWS = 24
MICROBATCHES = (3, 1)
TOLERANCE_FLOAT64, TOLERANCE_FLOAT32 = 1e-6, 1e-4  # relative; float64 on an analytic model

Gradients = Mapping[str, torch.Tensor]


def loss_is_a_function_of_rows(bench: AlgorithmBench) -> Verdict:
    """A minibatch has the same gradient whatever its microbatches and the order of its rows."""
    if bench.observed.fault:
        return skipped(f"its run ended early: {bench.observed.fault[1]}")
    trainer = bench.trainer(bench.short(bench.iterations))
    trainer.run()
    batch = minibatch(trainer, ROWS)
    if bench.analytic:
        batch = in_float64(trainer, batch)
    tolerance = TOLERANCE_FLOAT64 if bench.analytic else TOLERANCE_FLOAT32
    whole = gradients(trainer, batch, None)
    worst = 0.0
    for size in MICROBATCHES:
        name, error = largest_error(gradients(trainer, batch, size), whole)
        if not error <= tolerance:
            return failed(f"with microbatches of {size} rows the gradient of {name} differs by {error:.1e} (relative)")
        worst = max(worst, error)
    order = shuffled(batch, generator_for(0, "rows-order")).to(batch.x0.device)
    name, error = largest_error(gradients(trainer, batch.select(order), None), whole)
    if not error <= tolerance:
        return failed(f"with its rows in another order the gradient of {name} differs by {error:.1e} (relative)")
    return passed(f"largest relative difference {max(worst, error):.0e}")


def minibatch(trainer: Trainer, rows: int) -> Batch:
    """The first so many rows of the trainer's next iteration, each with what it is handed."""
    batch = trainer.algorithm.prepare(trainer.collector.collect(trainer.iteration, trainer.budget))
    order = shuffled(batch, generator_for(0, "rows"))
    chosen = next(Cut(rows, trainer.algorithm.whole_groups).parts(batch, order))
    trainer.policy.generator = generator_for(0, "rows-noise")
    return trainer.updater.drawn(batch.select(chosen))


def in_float64(trainer: Trainer, batch: Batch) -> Batch:
    """The rows in float64, for a trainer whose model and networks compute in float64 from here on."""
    trainer.policy.double()
    for network in trainer.algorithm.networks().values():
        network.double()
    wide: dict[str, Any] = {
        name: value.double()
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(batch, scalars={name: v.double() for name, v in batch.scalars.items()}, **wide)


def gradients(trainer: Trainer, batch: Batch, microbatch: int | None) -> Gradients:
    """The gradient of a minibatch's loss, as one vector for the policy and one for each of the algorithm's networks."""
    updater = trainer.updater
    modules = {name: list(network.parameters()) for name, network in trainer.algorithm.networks().items()}
    parameters = {"the policy": updater.parameters, **modules}
    for ps in parameters.values():
        for p in ps:
            p.grad = None
    updater.gradient(batch, microbatch)
    updater.finite.check()
    return {
        name: torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in ps])
        for name, ps in parameters.items()
    }


def largest_error(found: Gradients, expected: Gradients) -> tuple[str, float]:
    """Where two gradients differ most, and by how much relative to the expected one's norm."""
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
