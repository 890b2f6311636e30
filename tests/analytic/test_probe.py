"""What an update is worth, on the analytic models, where the true gradient is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowbench.errors import RunError, UsageError
from flowbench.evaluation.directions import worth
from flowbench.evaluation.exact import exact_evaluation
from flowbench.evaluation.exact_gradient import exact_gradient
from flowbench.experiments.probe import ProbePlan, probe, probe_configs, sampling_path
from flowbench.experiments.run import execute
from flowbench.experiments.updates import measure_updates, shuffle_rewards, update_direction
from flowbench.models.families.plane import exact_field
from flowbench.models.flow import SAMPLERS
from flowbench.models.policy import Policy
from flowbench.rollout import Conditioning, Rollout
from flowbench.testbeds.plane.density import QuadraticForm
from flowbench.training.budget import Budget
from flowbench.training.trainer import Trainer

MakePolicy = Callable[..., Policy]
MakeTrainer = Callable[..., Trainer]
Form = Callable[..., QuadraticForm]


def disturbed(policy: Policy) -> Policy:
    """With small random weights, so that no gradient is 0 by symmetry."""
    generator = torch.Generator().manual_seed(3)
    for p in policy.trainable_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return policy


def slope_along(policy: Policy, direction: torch.Tensor, value: Callable[[], float], h: float) -> float:
    """Central difference of a function of the weights along a direction (D,)."""
    parameters = policy.trainable_parameters()
    before = [p.data.clone() for p in parameters]
    ends = []
    for shift in (h, -h):
        for p, start, part in zip(parameters, before, direction.split([p.numel() for p in parameters]), strict=True):
            p.data = start + shift * part.view_as(p)
        ends.append(value())
    for p, start in zip(parameters, before, strict=True):
        p.data = start
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("model", ["gaussian", "mixture"])
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_the_exact_gradient_is_that_of_the_exact_mean_reward(
    make_analytic_policy: MakePolicy, form: Form, model: str, reward: str
):
    policy, steps = disturbed(make_analytic_policy(model, dtype=torch.float64)), 8
    sigmas, quadratic = policy.sigmas(steps), form(reward, model)
    found = exact_gradient(policy, quadratic, SAMPLERS["ode"], sigmas, 0.0)
    assert found is not None
    exact = exact_evaluation(policy, quadratic, steps)

    def value() -> float:
        point = exact.point(exact_field(policy))
        assert point is not None
        return point.reward

    for seed in range(2):
        direction = torch.randn(len(found), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = slope_along(policy, direction / direction.norm(), value, 1e-5)
        assert (found @ direction / direction.norm()).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_exact_gradient_of_a_stochastic_sampler_counts_the_variance_that_it_adds(
    make_analytic_policy: MakePolicy, form: Form
):
    """Against differences of 200,000 samples' mean with common noise, for a quadratic reward."""
    policy, quadratic, n = disturbed(make_analytic_policy(dtype=torch.float64)), form("quadratic"), 200_000
    found = exact_gradient(policy, quadratic, SAMPLERS["flow-sde"], policy.sigmas(5), 0.7)
    assert found is not None
    cond = policy.encode(["p"] * n)

    def value() -> float:
        policy.generator = torch.Generator().manual_seed(0)
        noise = policy.draw_noise(n).double()
        x0 = policy.rollout(cond, noise, sampler=SAMPLERS["flow-sde"], num_steps=5).x0
        return quadratic(x0.flatten(1)).mean().item()

    direction = found / found.norm()
    assert slope_along(policy, direction, value, 1e-4) == pytest.approx(found.norm().item(), rel=0.02)


# --- the figures: a policy gradient is the truth on average, and shuffled rewards leave nothing of it -----------------


def test_the_mean_of_a_policy_gradient_points_along_the_closed_form_and_that_of_shuffled_rewards_vanishes(
    make_analytic_trainer: MakeTrainer, form: Form
):
    """Coordinate by coordinate: within 4.5 standard errors over 40 batches of 256 images."""
    trainer = make_analytic_trainer(
        "ddpo", training__num_steps=6, training__minibatch=10_000, training__images_per_prompt=16
    )
    disturbed(trainer.policy)
    truth = exact_gradient(
        trainer.policy, form("linear"), SAMPLERS["flow-sde"], trainer.policy.sigmas(6), trainer.config.training.eta
    )
    assert truth is not None
    before = [p.clone() for p in trainer.policy.trainable_parameters()]
    found = measure_updates(trainer, 40)
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.policy.trainable_parameters(), strict=True))
    plain, shuffled = torch.stack(found.plain).double(), torch.stack(found.shuffled).double()
    scale = (plain.mean(0) @ truth) / truth.square().sum()
    assert scale > 0
    for updates, expected in ((plain, scale * truth), (shuffled, torch.zeros(()))):
        error = updates.std(0) / math.sqrt(len(updates))
        assert ((updates.mean(0) - expected).abs() < 4.5 * error).all()
    result = worth(found.plain, found.shuffled, [truth], found.images)
    assert result.cosine.value > 0.97
    assert result.drift.value < 0.05
    assert result.drift.low == 0


def test_weights_without_a_mean_of_zero_drift_and_centred_ones_do_not(make_analytic_trainer: MakeTrainer, form: Form):
    shares = []
    for center in (False, True):
        trainer = make_analytic_trainer(
            "acflow",
            algorithm__weight="exp",
            algorithm__center=center,
            algorithm__critic="none",
            algorithm__alpha=0.0,
            algorithm__tau=0.1,
        )
        disturbed(trainer.policy)  # an exact field is its own samples' best fit, and does not drift
        found = measure_updates(trainer, 8)
        shares.append(worth(found.plain, found.shuffled, found.plain, found.images).drift.value)
    assert shares[0] > 0.5
    assert shares[1] < 0.1


# --- how updates are taken --------------------------------------------------------------------------------------------


def test_the_direction_is_the_sum_of_what_the_optimizer_is_handed(
    make_analytic_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_analytic_trainer("adrpo", training__max_grad_norm=1e9, training__minibatch=64)
    updater, handed = trainer.updater, []
    batch = trainer.algorithm.prepare(trainer.collector.collect(0, Budget()))
    direction = update_direction(trainer, batch, 0)
    assert all(p.grad is None for p in updater.parameters)
    monkeypatch.setattr(
        updater.optimizer, "step", lambda: handed.append(torch.cat([p.grad.flatten() for p in updater.parameters]))
    )
    updater.update(batch, 0)
    assert len(handed) > 1
    assert torch.allclose(direction, -torch.stack(handed).sum(0), rtol=1e-4, atol=1e-6)


def test_a_warm_up_happens_on_the_side_and_is_counted(make_analytic_trainer: MakeTrainer):
    trainer = make_analytic_trainer("acflow", algorithm__warmup=2)
    critic, policy = trainer.algorithm.networks()["critic"], trainer.policy
    fresh, before = [p.clone() for p in critic.parameters()], [p.clone() for p in policy.trainable_parameters()]
    found = measure_updates(trainer, 3)
    assert (found.warmup_iterations, found.warmup_images) == (2, 512)
    assert found.images == 256
    learned = [p.clone() for p in critic.parameters()]
    assert any(not torch.equal(p, q) for p, q in zip(fresh, learned, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(before, policy.trainable_parameters(), strict=True))
    assert measure_updates(make_analytic_trainer("acflow", algorithm__warmup=2), 3, warmup=3).warmup_iterations == 3


def test_batches_are_measured_from_one_state_of_the_algorithm(make_analytic_trainer: MakeTrainer):
    trainer = make_analytic_trainer("acflow", algorithm__warmup=1, algorithm__shaping="standardize")
    measure_updates(trainer, 3)
    after_three = trainer.algorithm.state_dict()
    other = make_analytic_trainer("acflow", algorithm__warmup=1, algorithm__shaping="standardize")
    measure_updates(other, 4)
    assert str(after_three) == str(other.algorithm.state_dict())


def test_a_warm_up_without_an_end_is_an_error_with_the_remedy(make_analytic_trainer: MakeTrainer):
    trainer = make_analytic_trainer("acflow")
    trainer.iterations = 2  # a configuration in which the warm-up takes them all is refused before
    with pytest.raises(RunError, match=r"shorten its warm-up or raise training\.images"):
        measure_updates(trainer, 3)


def test_rewards_are_shuffled_within_prompts_and_every_order_is_as_likely():
    reward, group = torch.arange(6.0), torch.tensor([0, 1, 0, 1, 0, 1])
    empty = torch.zeros(6, 1)
    cond = Conditioning({}, group)
    rollout = Rollout(0, ("p",) * 6, group, cond, empty, empty, empty, reward, components={"r": 10 * reward})
    generator, totals, n = torch.Generator().manual_seed(0), torch.zeros(6), 600
    for _ in range(n):
        found = shuffle_rewards(rollout, generator)
        assert torch.equal(found.components["r"], 10 * found.reward)
        for g in (0, 1):
            assert found.reward[group == g].sort().values.tolist() == reward[group == g].tolist()
        totals += found.reward
    expected = torch.tensor([2.0, 3.0, 2.0, 3.0, 2.0, 3.0])
    assert torch.allclose(totals / n, expected, atol=4.5 * math.sqrt(8 / 3 / n))


# --- the command's function -------------------------------------------------------------------------------------------


def configs(*algorithms: str, reward: str | None = "linear", run: Path | None = None, **settings: object):
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return probe_configs(algorithms, reward, None if run else "gaussian", run, 0, "cpu", given)


def test_a_report_has_a_row_for_each_algorithm_and_failures_do_not_end_it(tmp_path: Path):
    draft, acflow = configs("draft", "acflow")
    short = acflow.training.model_copy(update={"images": 512})  # acflow's warm-up of five iterations takes them all
    chosen = [draft, acflow.model_copy(update={"training": short})]
    report = probe(chosen, ProbePlan(batches=3, cache=tmp_path), output=tmp_path / "p.json")
    assert [row.algorithm for row in report.rows] == ["draft", "acflow"]
    assert report.rows[0].worth is not None
    assert report.rows[0].worth.drift is None  # it never sees the rollout's rewards
    assert report.rows[1].worth is None
    assert "warm-up" in str(report.rows[1].failure)
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]  # what is exact needs no file
    from flowbench.reporting.probe import picture, to_markdown

    assert "failed: acflow" in to_markdown(report)
    picture(tmp_path / "p.png", report)
    assert len(json.loads((tmp_path / "p.json").read_text())["rows"]) == 2
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_run_gives_its_weights_model_and_reward(tmp_path: Path):
    (config,) = configs("raft", training__images=512, evaluation__images_per_prompt=2, evaluation__prompts=2)
    execute(config, tmp_path / "run", "", resume=False)
    chosen = configs("draft", reward=None, run=tmp_path / "run")
    assert (chosen[0].reward, chosen[0].model) == ("linear", "gaussian")
    plan = ProbePlan(batches=3, cache=tmp_path / "cache")
    base, moved = probe(chosen, plan), probe(chosen, plan, tmp_path / "run")
    assert moved.weights == str(tmp_path / "run")
    assert base.rows[0].truth.key != moved.rows[0].truth.key
    assert base.rows[0].worth.cosine.value != moved.rows[0].worth.cosine.value
    with pytest.raises(UsageError, match="leave --model out"):
        probe_configs(["draft"], None, "mixture", tmp_path / "run", 0, "cpu", {})


def test_the_true_gradients_path_is_the_evaluations_or_the_algorithms_own(make_analytic_trainer: MakeTrainer):
    trainer = make_analytic_trainer("ddpo", training__num_steps=6)
    paths = [sampling_path(trainer.config, trainer.policy, which) for which in ("evaluation", "own")]
    assert [(p.sampler, len(p.sigmas) - 1) for p in paths] == [("ode", 40), ("flow-sde", 6)]
