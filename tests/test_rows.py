from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Compared, Draws, Loss, Rollout, endpoints
from flowbench.config import RunConfig
from flowbench.conformance.row_claims import gradients, largest_error
from flowbench.errors import RunError
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.rollout import Conditioning
from flowbench.seeding import generator_for
from flowbench.toolkit.matching import renoised
from flowbench.training.rows import Cut, compared, drawn, shuffled
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]


def rows_of(group: list[int] | None, n: int = 0) -> Batch:
    n = len(group) if group else n
    cond = Conditioning({"tokens": torch.zeros(1, 1, 1)}, torch.zeros(n, dtype=torch.int64))
    x0 = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 2, 1, 1)
    return Batch(("p",) * n, cond, x0, torch.zeros(n), group=torch.tensor(group) if group else None)


def cuts(cut: Cut, batch: Batch, order: list[int] | None = None) -> list[list[int]]:
    return [part.tolist() for part in cut.parts(batch, None if order is None else torch.tensor(order))]


def test_rows_are_cut_by_number_where_groups_may_be_cut():
    assert cuts(Cut(3), rows_of([0, 0, 1, 1, 1])) == [[0, 1, 2], [3, 4]]
    assert cuts(Cut(2), rows_of(None, 3), [2, 0, 1]) == [[2, 0], [1]]


def test_whole_groups_fill_a_part_as_far_as_they_fit_and_a_large_one_stands_alone():
    batch = rows_of([0, 0, 1, 1, 2, 2, 2, 2, 2, 3])
    assert cuts(Cut(4, whole_groups=True), batch) == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9]]
    assert cuts(Cut(1, whole_groups=True), batch) == [[0, 1], [2, 3], [4, 5, 6, 7, 8], [9]]
    assert cuts(Cut(100, whole_groups=True), batch) == [[*range(10)]]
    assert cuts(Cut(3, whole_groups=True), rows_of([0, 1, 0, 1]), [1, 3, 2, 0]) == [[1, 3], [2, 0]]


def test_whole_groups_of_rows_without_a_group_are_refused():
    with pytest.raises(RunError, match="must give its rows a group"):
        list(Cut(2, whole_groups=True).parts(rows_of(None, 4)))


class Wants(Algorithm[AlgorithmConfig]):
    """Asks for what it is told."""

    def __init__(self, draws: Draws) -> None:
        super().__init__(AlgorithmConfig())
        self.wanted = draws

    def draws(self) -> Draws:
        return self.wanted


def test_each_row_has_noise_and_a_sigma_of_its_own_and_those_of_a_group_share_them_on_request(shared_policy: Policy):
    x0 = torch.zeros(6, *shared_policy.latent_shape)
    batch = replace(rows_of([5, 5, 2, 2, 7, 7]), x0=x0)
    seen = []
    for shared in (False, True):
        shared_policy.generator = generator_for(0, "draws")
        seen.append(drawn(Wants(Draws(noises=2, sigma=True, shared=shared)), shared_policy, batch))
    own, shared_ = seen
    assert own.noise.shape == (6, 2, *shared_policy.latent_shape)
    assert len(own.noise_sigma.unique()) == 6
    assert len({tuple(e.flatten().tolist()[:4]) for e in own.noise.flatten(0, 1)}) == 12
    assert shared_.noise_sigma.view(3, 2).unique(dim=1).shape == (3, 1)
    assert torch.equal(shared_.noise[0], shared_.noise[1])
    assert not torch.equal(shared_.noise[1], shared_.noise[2])
    assert abs(own.noise.mean().item()) < 0.05
    assert own.noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("own", "fixed", "asked", "shared"),
    [
        (False, False, True, True),
        (True, False, False, False),
        (True, False, None, True),
        (False, True, True, False),  # copies of one image must not be noised alike
        (True, True, False, True),  # the formula decides
    ],
)
def test_the_run_decides_whether_a_prompts_images_share_their_noise_unless_the_algorithm_has_to(
    shared_policy: Policy, own: bool, fixed: bool, asked: bool | None, shared: bool
):
    batch = replace(rows_of([1, 1]), x0=torch.zeros(2, *shared_policy.latent_shape))
    batch = drawn(Wants(Draws(noises=1, sigma=True, shared=own, fixed=fixed)), shared_policy, batch, asked)
    assert torch.equal(batch.noise[0], batch.noise[1]) == shared
    assert (batch.noise_sigma[0] == batch.noise_sigma[1]).item() == shared


def test_rows_that_were_handed_no_noise_say_so():
    with pytest.raises(RunError, match=r"ask for it with draws\(\)"):
        renoised(rows_of([0, 0]))


def test_a_selection_of_rows_takes_their_noise_and_scalars_along(shared_policy: Policy):
    batch = replace(
        rows_of([0, 1, 2]), x0=torch.zeros(3, *shared_policy.latent_shape), scalars={"w": torch.arange(3.0)}
    )
    batch = drawn(Wants(Draws(noises=1, sigma=True)), shared_policy, batch)
    part = batch.select(torch.tensor([2, 0]))
    assert torch.equal(part.noise, batch.noise[[2, 0]])
    assert torch.equal(part.noise_sigma, batch.noise_sigma[[2, 0]])
    assert part.scalars["w"].tolist() == [2, 0]


class Relative(Algorithm["Relative.Config"]):
    """Weighs rows by what they are within the minibatch, or compares those of a group with gradient."""

    class Config(AlgorithmConfig):
        within_groups: bool = False

    info = type("Info", (), {"name": "relative", "needs": frozenset({"endpoint"})})

    def draws(self) -> Draws:
        return Draws(noises=1, sigma=True)

    def prepare(self, rollout: Rollout) -> Batch:
        return endpoints(rollout, rollout.reward, copies=2)

    def measure(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"error": self.error(policy, batch)}

    def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
        error = scalars["error"]
        return Compared({"weight": error - error.median()}, {"median": error.median()})

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        error = self.error(policy, batch)
        if self.cfg.within_groups:
            same = (batch.group[:, None] == batch.group).float()
            return Loss((error - same @ error / same.sum(1)).square() + error)
        return Loss(batch.scalars["weight"] * error)

    @staticmethod
    def error(policy: Policy, batch: Batch) -> torch.Tensor:
        noisy = renoised(batch)
        return velocity_error(policy.velocity(noisy.x, noisy.sigma, batch.cond), noisy.u)


class WholeGroups(Relative):
    whole_groups = True


@pytest.mark.parametrize(("kind", "within"), [(Relative, False), (WholeGroups, True)])
def test_what_compares_rows_has_the_same_gradient_however_its_minibatch_is_cut(
    kind: Any, within: bool, tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    trainer = make_trainer(tiny_config("orw-cfm-w2"), tmp_path)
    algorithm = kind(Relative.Config(within_groups=within))
    algorithm.setup(trainer.policy)
    for part in (trainer, trainer.collector, trainer.updater):
        part.algorithm = algorithm
    batch = algorithm.prepare(trainer.collector.collect(0, trainer.budget))
    order = shuffled(batch, generator_for(1, "order"))
    batch = drawn(algorithm, trainer.policy, batch.select(next(Cut(16, kind.whole_groups).parts(batch, order))))
    whole = gradients(trainer, batch, None)
    assert whole["the policy"].norm() > 0.01
    for size in (5, 1):
        assert largest_error(gradients(trainer, batch, size), whole)[1] < 1e-4
    backwards = batch.select(torch.arange(len(batch)).flip(0))
    assert largest_error(gradients(trainer, backwards, 3), whole)[1] < 1e-4


def test_comparing_a_groups_rows_in_a_loss_that_does_not_declare_it_is_seen(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    trainer = make_trainer(tiny_config("orw-cfm-w2"), tmp_path)
    algorithm = Relative(Relative.Config(within_groups=True))
    for part in (trainer, trainer.collector, trainer.updater):
        part.algorithm = algorithm
    batch = drawn(algorithm, trainer.policy, algorithm.prepare(trainer.collector.collect(0, trainer.budget)))
    assert largest_error(gradients(trainer, batch, 1), gradients(trainer, batch, None))[1] > 1e-2


def test_what_compare_says_of_a_row_stands_in_the_place_of_what_prepare_said(shared_policy: Policy):
    class Twice(Algorithm[AlgorithmConfig]):
        def compare(self, scalars: Mapping[str, torch.Tensor]) -> Compared:
            return Compared({"weight": torch.full((4,), 2.0)}, {})

    told = replace(rows_of([0, 0, 1, 1]), scalars={"weight": torch.ones(4), "kept": torch.zeros(4)})
    batch, _ = compared(Twice.__new__(Twice), shared_policy, told, Cut(4))
    assert {name: value.tolist() for name, value in batch.scalars.items()} == {"weight": [2.0] * 4, "kept": [0.0] * 4}
