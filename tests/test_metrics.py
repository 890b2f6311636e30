"""What an update logs, and how seldom the host waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowbench.config import RunConfig
from flowbench.errors import RunError
from flowbench.training.metrics import Finite, Metrics, fetch
from flowbench.training.optimizer import adamw, step
from flowbench.training.trainer import Trainer


class Waits(TorchDispatchMode):
    """Counts how often a tensor's number is asked for: on a GPU the host then waits for all that was begun."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_means_are_those_of_all_values_however_they_come_to_the_last_bit() -> None:
    values = torch.randn(11, generator=torch.Generator().manual_seed(0))
    whole, cut = Metrics(), Metrics()
    whole.add("a", values)
    for part in values.split(4):
        cut.add("a", part)
    assert whole.fetched() == {"a": values.mean().item()}
    parts = [(part.mean().item(), len(part)) for part in values.split(4)]
    assert cut.fetched() == {"a": sum(mean * n for mean, n in parts) / 11}


def test_a_value_without_rows_is_left_out_and_a_plain_number_stands_for_itself() -> None:
    metrics = Metrics()
    metrics.add("none", torch.zeros(0))
    metrics.add("number", 0.25)
    assert metrics.fetched() == {"number": 0.25}
    assert fetch([]) == []


def test_the_first_number_that_is_not_finite_is_named_once() -> None:
    finite = Finite()
    finite.watch("first is {}", torch.tensor(1.0))
    finite.watch("second is {}", torch.tensor(torch.nan))
    finite.watch("third is {}", torch.tensor(torch.inf))
    with pytest.raises(RunError, match=r"^second is nan$"):
        finite.check()
    finite.check()


@pytest.mark.parametrize("algorithm", ["acflow", "flow-grpo", "nft"])
def test_no_step_and_no_microbatch_waits_for_a_number(
    tmp_path: Path,
    tiny_config: Callable[..., RunConfig],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
) -> None:
    monkeypatch.setattr("flowbench.training.optimizer.fused", lambda device: True)  # as on a GPU
    brief = {"training.images": 16, "training.prompts_per_iteration": 2, "training.num_steps": 2}
    counts = []
    for minibatch, microbatch in ((64, None), (64, 4), (4, None)):
        settings = {**brief, "training.minibatch": minibatch, "training.microbatch": microbatch}
        trainer = make_trainer(tiny_config(algorithm, overrides=settings), tmp_path / f"{minibatch}-{microbatch}")
        trainer._encode_prompts()
        batch = trainer.algorithm.prepare(trainer.collector.collect(0, trainer.budget))
        with Waits() as waits:
            trainer.updater.update(batch, 0)
        counts.append(waits.count)
    assert counts[0] == counts[1]
    # AC-Flow's statistics of a minibatch ask which ranges of sigma have rows.
    assert counts[0] == counts[2] or algorithm == "acflow"


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_changes_no_weight(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr("flowbench.training.optimizer.fused", lambda device: fused)
    p, finite = torch.nn.Parameter(torch.ones(3)), Finite()
    optimizer = adamw([p], lr=0.1)

    def take(gradient: float) -> None:
        p.grad = torch.full((3,), gradient)
        norm = torch.nn.utils.clip_grad_norm_([p], 1.0)
        finite.watch("the gradient is {}", norm)
        step(optimizer, norm, finite)
        finite.check()

    take(1.0)
    before = p.detach().clone()
    assert (before < 1).all()
    with pytest.raises(RunError, match="the gradient is nan"):
        take(torch.nan)
    assert torch.equal(p, before)
    take(1.0)
    assert (p < before).all()
