from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Loss, Rollout, endpoints
from flowbench.algorithms.orw_cfm_w2 import OrwCfmW2
from flowbench.config import RunConfig, TrainingConfig
from flowbench.errors import RunError, RunInterruptedError
from flowbench.models.policy import Policy
from flowbench.registry import algorithms
from flowbench.reward import Reward, checked_score, register_reward
from flowbench.rollout import Conditioning
from flowbench.training.budget import Budget
from flowbench.training.checkpoint import CHECKPOINT
from flowbench.training.collect import stochastic_steps
from flowbench.training.rows import shuffled
from flowbench.training.state import load_state
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
ReadLog = Callable[[Path], list[dict[str, Any]]]

# What each run needs so that one iteration is enough to change the policy, and everything stateful takes part.
SETTINGS: dict[str, dict[str, Any]] = {
    "acflow": {"algorithm.critic": "shaped", "algorithm.shaping": "normalize", "algorithm.warmup": 1},
    "awm": {"algorithm.average_ramp": 0.1},
    "ddpo": {"training.sampler": "flow-sde", "algorithm.clip_range": 0.1, "training.minibatch": 32},
    "dpok": {"training.minibatch": 32},
    "draft": {"algorithm.noises": 2},
    "flow-grpo": {"training.sde_window": 2},
    "nft": {"algorithm.old_ramp": 0.2},
    "orw-cfm-w2": {"training.ema": 0.9},
    "refl": {},
}


def settings_for(algorithm: str) -> dict[str, Any]:
    budget = {"training.prompts_per_iteration": 2, "training.images": 24, "training.checkpoint_every": 2}
    return {**budget, **SETTINGS.get(algorithm, {})}


def changed(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def failing_reward(clean_registry: None) -> type[Reward]:
    """Mean brightness, until its third call, which gives NaN."""

    @register_reward("brittle", source="tests", licence="none", range=(0.0, 1.0), differentiable=False)
    class Brittle(Reward):
        calls, healed = 0, False

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            self.calls += 1
            scores = images.mean((1, 2, 3))
            if self.calls == 3 and not self.healed:
                scores[1] = math.nan
            return scores

    return Brittle


@dataclass(frozen=True)
class Ended:
    """What a run of three iterations without interruption left. moved: whether it changed the policy's weights."""

    folder: Path
    budget: Budget
    moved: bool


@pytest.fixture(scope="module")
def ended() -> dict[tuple[str, str], Ended]:
    """The runs made so far, by algorithm and tuning."""
    return {}


@pytest.fixture
def uninterrupted(
    ended: dict[tuple[str, str], Ended],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: MakeConfig,
    make_trainer: MakeTrainer,
    clip: Reward,
) -> Callable[[str, str], Ended]:
    """The run of an algorithm with that tuning, made once."""

    def made(algorithm: str, tuning: str) -> Ended:
        if (algorithm, tuning) not in ended:
            folder = tmp_path_factory.mktemp("whole")
            trainer = make_trainer(tuned_config(tiny_config, algorithm, tuning), folder, clip)
            before = copy.deepcopy(trainer.updater.parameters)
            budget = trainer.run()
            ended[algorithm, tuning] = Ended(folder, budget, changed(trainer.updater.parameters, before))
        return ended[algorithm, tuning]

    return made


def tuned_config(tiny_config: MakeConfig, algorithm: str, tuning: str) -> RunConfig:
    extra = {"training.tuning": tuning, "training.lora_rank": 4}
    return tiny_config(algorithm, "clip", overrides={**settings_for(algorithm), **extra})


@pytest.mark.parametrize("algorithm", algorithms.names())
def test_every_algorithm_trains_with_finite_metrics_and_changes_the_policy(
    algorithm: str, uninterrupted: Callable[[str, str], Ended], read_log: ReadLog
):
    run = uninterrupted(algorithm, "full")
    lines = read_log(run.folder)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert [line["images"] for line in lines] == [8, 16, 24]
    for line in lines:
        assert all(math.isfinite(v) for v in (line["reward"], line["reward_std"], *line["metrics"].values()))
    assert run.moved
    assert run.budget.images == 24
    through_the_reward = "reward_grad" in algorithms.get(algorithm).info.needs
    assert run.budget.reward_calls > 24 if through_the_reward else run.budget.reward_calls == 24
    assert run.budget.function_evaluations >= 24 * 4


def test_another_seed_gives_another_run(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer, read_log: ReadLog
):
    for seed in (0, 1):
        config = tiny_config("orw-cfm-w2", seed=seed, overrides={"training.images": 16})
        make_trainer(config, tmp_path / str(seed)).run()
    assert read_log(tmp_path / "0") != read_log(tmp_path / "1")


@pytest.mark.parametrize(
    ("algorithm", "tuning"), [*((name, "full") for name in algorithms.names()), ("acflow", "lora"), ("awm", "lora")]
)
def test_a_seed_decides_every_metric_and_every_weight_bit_for_bit_stopped_and_resumed_or_not(
    algorithm: str,
    tuning: str,
    uninterrupted: Callable[[str, str], Ended],
    tmp_path: Path,
    tiny_config: MakeConfig,
    make_trainer: MakeTrainer,
    read_log: ReadLog,
    clip: Reward,
):
    whole, config = uninterrupted(algorithm, tuning), tuned_config(tiny_config, algorithm, tuning)
    torch.rand(7)  # the global generator is nobody's source
    first = make_trainer(config, tmp_path, clip)
    first.on_iteration = lambda log: setattr(first.stop, "made", log.iteration == 1)
    with pytest.raises(RunInterruptedError, match="interrupted after iteration 1 of 3"):
        first.run()
    torch.rand(7)
    second = make_trainer(config, tmp_path, clip)
    assert second.resume()
    assert second.iteration == 1
    assert second.run().images == 24
    one, other = (load_state(folder / CHECKPOINT) for folder in (tmp_path, whole.folder))
    assert_equal_trees(one, other)
    assert not changed(second.updater.parameters, other["policy"]["current"])
    assert not changed(second.updater.average.weights, other["average"])
    assert read_log(tmp_path) == read_log(whole.folder)


def assert_equal_trees(a: Any, b: Any, path: str = "") -> None:
    """Equal but for wall time."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "timings"}:
            assert_equal_trees(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def test_a_crash_loses_at_most_the_work_since_the_last_checkpoint(
    tmp_path: Path,
    tiny_config: MakeConfig,
    make_trainer: MakeTrainer,
    read_log: ReadLog,
    monkeypatch: pytest.MonkeyPatch,
):
    config = tiny_config("orw-cfm-w2", overrides=settings_for("orw-cfm-w2"))
    whole = make_trainer(config, tmp_path / "whole")
    whole.run()

    crashed = make_trainer(config, tmp_path / "parts")
    monkeypatch.setattr(crashed.checkpoints, "rescue", lambda: None)  # as a process that is gone leaves it

    def crash(log: Any) -> None:
        if log.iteration == 3:
            raise MemoryError

    crashed.on_iteration = crash
    with pytest.raises(MemoryError):
        crashed.run()
    assert len(read_log(tmp_path / "parts")) == 3
    resumed = make_trainer(config, tmp_path / "parts")
    resumed.resume()
    assert resumed.iteration == 2
    assert len(read_log(tmp_path / "parts")) == 2
    resumed.run()
    assert not changed(resumed.updater.parameters, whole.updater.parameters)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_an_interrupt_signal_ends_the_run_after_its_iteration(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=settings_for("orw-cfm-w2")), tmp_path)
    trainer.on_iteration = lambda log: os.kill(os.getpid(), signal.SIGINT) if log.iteration == 2 else None
    with pytest.raises(RunInterruptedError):
        trainer.run()
    assert load_state(tmp_path / CHECKPOINT)["iteration"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_nan_reward_stops_the_run_by_name_and_leaves_a_checkpoint_to_continue_from(
    tmp_path: Path,
    tiny_config: MakeConfig,
    make_trainer: MakeTrainer,
    failing_reward: type[Reward],
    read_log: ReadLog,
):
    config = tiny_config("orw-cfm-w2", "brittle", overrides={**settings_for("orw-cfm-w2"), "training.decode_batch": 64})
    trainer = make_trainer(config, tmp_path / "parts")
    with pytest.raises(RunError, match="reward 'brittle' is nan for the prompt") as raised:
        trainer.run()
    assert len(str(raised.value).splitlines()) == 1
    assert load_state(tmp_path / "parts" / CHECKPOINT)["iteration"] == 2
    assert len(read_log(tmp_path / "parts")) == 2

    healthy = failing_reward()
    healthy.healed = True
    resumed = make_trainer(config, tmp_path / "parts", reward=healthy)
    resumed.resume()
    resumed.run()
    whole = make_trainer(config, tmp_path / "whole", reward=healthy)
    whole.run()
    assert not changed(resumed.updater.parameters, whole.updater.parameters)
    # The iteration that failed is counted once, when it is done.
    for counted in ("images", "reward_calls", "function_evaluations"):
        assert getattr(resumed.budget, counted) == getattr(whole.budget, counted), counted


def test_a_wrong_shape_or_count_of_rewards_is_named():
    class Flat(Reward):
        info = algorithms  # only the name is read

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return images.mean((2, 3))

    Flat.info = type("Info", (), {"name": "flat"})
    with pytest.raises(RunError, match=r"reward 'flat' returned shape \(2, 3\) for 2 images; expected \(2,\)"):
        checked_score(Flat(), torch.zeros(2, 3, 4, 4), ("a", "b"))
    with pytest.raises(RunError, match="was given 2 images for 1 prompts"):
        checked_score(Flat(), torch.zeros(2, 3, 4, 4), ("a",))


def train_with(trainer: Trainer, algorithm: Algorithm) -> None:
    """Put another algorithm in a trainer's hands."""
    for part in (trainer, trainer.collector, trainer.updater):
        part.algorithm = algorithm


class Broken(OrwCfmW2):
    """ORW with a loss of the test's choice."""

    make: Callable[[torch.Tensor], Loss]

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch).policy
        return type(self).make(loss)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda loss: Loss(loss * math.inf), "loss of 'orw-cfm-w2' is inf"),
        (lambda loss: Loss(loss * math.nan), "loss of 'orw-cfm-w2' is nan"),
        (lambda loss: Loss(loss.mean()), "must be one value per row"),
        (lambda loss: Loss(None), "neither a policy nor an auxiliary part"),
        (lambda loss: Loss((loss - loss.detach()).sqrt()), "the gradient of 'orw-cfm-w2' is (nan|inf) in iteration 1"),
    ],
    ids=["infinite", "nan", "reduced", "empty", "bad gradient"],
)
def test_a_faulty_loss_stops_the_run_by_name_before_it_touches_the_weights(
    make: Callable, complaint: str, tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=settings_for("orw-cfm-w2")), tmp_path)
    faulty = Broken(trainer.algorithm.cfg)
    faulty.setup(trainer.policy)
    Broken.make = staticmethod(make)
    train_with(trainer, faulty)
    before = copy.deepcopy(trainer.updater.parameters)
    with pytest.raises(RunError, match=complaint):
        trainer.run()
    assert not changed(trainer.updater.parameters, before)


class Quadratic(Algorithm["Quadratic.Config"]):
    """Rows pull the first trained parameter to zero with their own strength, so that gradients are known."""

    class Config(AlgorithmConfig):
        pass

    info = type("Info", (), {"name": "quadratic", "needs": frozenset({"endpoint"})})

    def prepare(self, rollout: Rollout) -> Batch:
        return endpoints(rollout, torch.arange(len(rollout), dtype=torch.float32))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        p = policy.trainable_parameters()[0]
        return Loss(batch.advantage * p.square().sum(), metrics={"strength": batch.advantage})


@pytest.mark.parametrize("microbatch", [None, 8, 3, 1])
def test_microbatches_give_the_gradient_of_the_whole_minibatch(
    microbatch: int | None, tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    overrides = {
        "training.microbatch": microbatch,
        "training.prompts_per_iteration": 2,
        "training.images": 8,
        "training.minibatch": 8,
        "training.max_grad_norm": 1e9,
    }
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=overrides), tmp_path)
    train_with(trainer, Quadratic(Quadratic.Config()))
    norm = trainer.updater.parameters[0].detach().norm().item()
    logs = []
    trainer.on_iteration = logs.append
    trainer.run()
    # mean of 0..7 is 3.5; the gradient of 3.5 |p|^2 is 7 p
    assert logs[0].metrics["grad_norm"] == pytest.approx(7 * norm, rel=1e-4)
    assert logs[0].metrics["strength"] == pytest.approx(3.5)


def test_the_gradient_norm_is_clipped(tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer):
    overrides = {"training.images": 16, "training.minibatch": 16, "training.max_grad_norm": 1e-3}
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=overrides), tmp_path)
    norms = []
    step = trainer.updater.optimizer.step
    trainer.updater.optimizer.step = lambda: (
        norms.append(
            torch.stack([p.grad.norm() for p in trainer.updater.parameters if p.grad is not None]).norm().item()
        ),
        step(),
    )
    trainer.run()
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_the_average_follows_the_weights_by_its_ramp(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    overrides = {"training.images": 16, "training.minibatch": 16, "training.ema": 0.75}
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=overrides), tmp_path)
    before = copy.deepcopy([p.detach() for p in trainer.updater.parameters])
    trainer.run()
    for a, b, p in zip(trainer.updater.average.weights, before, trainer.updater.parameters, strict=True):
        assert torch.allclose(a, (2 * b + 9 * p) / 11, atol=1e-6)  # (1 + n) / (10 + n) in the first step
    average = copy.deepcopy(trainer.updater.average.weights)
    trainer.updater.use_average()
    assert not changed([p.detach() for p in trainer.updater.parameters], average)


def test_groups_are_the_images_of_one_prompt(tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer):
    overrides = {"training.prompts_per_iteration": 3, "training.images_per_prompt": 4, "training.images": 24}
    trainer = make_trainer(tiny_config("orw-cfm-w2", overrides=overrides), tmp_path)
    seen = []
    trainer.algorithm.prepare = lambda rollout: (seen.append(rollout), endpoints(rollout, rollout.reward))[1]
    trainer.run()
    for rollout in seen:
        assert rollout.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert [len(set(rollout.prompts[4 * g : 4 * g + 4])) for g in range(3)] == [1, 1, 1]
        assert len(set(rollout.prompts)) == 3
        assert len({tuple(x.flatten().tolist()) for x in rollout.x0}) == 12
    assert seen[0].prompts != seen[1].prompts


def test_minibatches_keep_the_rows_of_a_group_together():
    group = torch.tensor([0, 1, 2, 3] * 3)
    batch = Batch((("a",) * 12), Conditioning({}, torch.zeros(12)), torch.zeros(12, 1), torch.zeros(12), group=group)
    for seed in range(5):
        rows = shuffled(batch, torch.Generator().manual_seed(seed))
        assert sorted(rows.tolist()) == list(range(12))
        assert all(len(set(group[part].tolist())) == 1 for part in rows.split(3))


def windows(iterations: int, **settings: Any) -> list[range | None]:
    training = TrainingConfig(sampler="flow-sde", **settings)
    return [stochastic_steps(training, 6, 0, k) for k in range(iterations)]


def test_a_window_that_stays_slides_over_the_steps_and_starts_again():
    starts = [w.start for w in windows(10, sde_window=3, sde_window_stay=2)]
    assert starts == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_a_window_without_stay_is_placed_at_random_and_never_holds_the_last_step():
    placed = windows(200, sde_window=2)
    assert {w.start for w in placed} == {0, 1, 2, 3}
    assert all(len(w) == 2 for w in placed)
    assert placed[3:5] == [stochastic_steps(TrainingConfig(sde_window=2), 6, 0, k) for k in (3, 4)]
    assert windows(3) == [None, None, None]


def test_only_the_windows_steps_are_trained_on(tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer):
    overrides = {"training.sde_window": 2, "training.sde_window_stay": 1, "training.images": 32}
    trainer = make_trainer(tiny_config("ddpo", overrides=overrides), tmp_path)
    seen, prepare = [], trainer.algorithm.prepare
    trainer.algorithm.prepare = lambda rollout: seen.append((rollout, prepare(rollout))) or seen[-1][1]
    trainer.run()
    for k, (rollout, batch) in enumerate(seen):
        assert len(batch) == 2 * len(rollout)
        assert set(batch.sigma.tolist()) == set(rollout.sigmas[k : k + 2].tolist())


class Counting(OrwCfmW2):
    """ORW that notes when its hooks are called."""

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.calls: list[str] = []

    def prepare(self, rollout: Rollout) -> Batch:
        self.calls.append("prepare")
        return super().prepare(rollout)

    def after_update(self, policy: Policy) -> None:
        self.calls.append("update")

    def after_iteration(self, policy: Policy) -> None:
        self.calls.append("iteration")


def test_the_hooks_are_called_after_each_update_and_after_each_iteration(
    tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    trainer = make_trainer(tiny_config("orw-cfm-w2"), tmp_path)  # two iterations of 16 rows, in minibatches of 8
    train_with(trainer, Counting(trainer.algorithm.cfg))
    trainer.algorithm.setup(trainer.policy)
    trainer.run()
    assert trainer.algorithm.calls == ["prepare", "update", "update", "iteration"] * 2


def test_reward_calls_of_a_loss_are_on_the_budget(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer]
):
    budget = make_trainer(tiny_config("refl", "clip", overrides={"training.images": 16}), tmp_path).run()
    assert budget.images == 16
    assert budget.reward_calls == 32  # once for the rollout, once for the gradient


def test_every_pass_over_an_iteration_is_a_step_more(
    tiny_config: Callable[..., RunConfig], make_trainer: Callable[..., Trainer], tmp_path: Path
):
    spent = []
    for epochs in (1, 3):
        config = tiny_config("raft", overrides={"training.epochs": epochs})
        trainer = make_trainer(config, tmp_path / str(epochs))
        trainer.updater.update(trainer.algorithm.prepare(trainer.collector.collect(0, Budget())), 0)
        spent.append(trainer.updater.updates)
    assert spent[1] == 3 * spent[0] > 0


def test_every_iteration_has_noise_of_its_own_and_the_same_one_again(
    tiny_config: Callable[..., RunConfig],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    collector = make_trainer(tiny_config("raft"), tmp_path).collector
    same = collector._draw_prompts(0)
    monkeypatch.setattr(collector, "_draw_prompts", lambda iteration: same)
    first, second, again = (collector.collect(k, Budget()).x0 for k in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).all(-1).all(-1).all(-1).any()


@pytest.mark.parametrize(("algorithm", "moves"), [("nft", False), ("raft", True)])
def test_images_come_from_the_behaviour_policy_where_a_method_keeps_one(
    algorithm: str,
    moves: bool,
    tiny_config: Callable[..., RunConfig],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
):
    trainer = make_trainer(tiny_config(algorithm), tmp_path)
    first = trainer.collector.collect(0, Budget()).x0
    for p in trainer.updater.parameters:
        p.data += 0.02
    assert torch.equal(first, trainer.collector.collect(0, Budget()).x0) is not moves
