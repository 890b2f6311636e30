from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from test_docs import DOCS, first_block

from flowbench.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    Defaults,
    Draws,
    LogUniform,
    Loss,
    Rollout,
    endpoints,
    register_algorithm,
)
from flowbench.conformance import Finding, Status, algorithm_claims, check, reward_claims
from flowbench.conformance.bench import AlgorithmBench, difference
from flowbench.conformance.reward_claims import RewardBench
from flowbench.errors import RunError, UsageError
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.registry import algorithms, load_plugin_file, rewards
from flowbench.reward import Reward, register_reward
from flowbench.toolkit.matching import renoised

Main = Callable[..., int]
# Their updates have a row per sampler step, so that they take longer to learn.
BRIEF = {model: Defaults({"images": 2560}) for model in ("gaussian", "mixture")}  # enough to see what is badly wrong
LONG = {"acflow", "ddpo", "dpok", "flow-grpo", "orw-cfm-w2"}


class Sound(Algorithm["Sound.Config"]):
    """Advantage-weighted flow matching with a baseline of its own; keeps every promise."""

    class Config(AlgorithmConfig):
        alpha: float = Field(0.1, description="pull towards the reference")

    ablations: ClassVar = ({"alpha": 0.0},)

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.level = 0.0
        torch.manual_seed(0)
        self.baseline = torch.nn.Linear(2, 1)

    def draws(self) -> Draws:
        return Draws(noises=1, sigma=True)

    def prepare(self, rollout: Rollout) -> Batch:
        self.level = 0.9 * self.level + 0.1 * rollout.reward.mean().item()
        return endpoints(rollout, rollout.reward - self.level)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        noisy = renoised(batch)
        v = policy.velocity(noisy.x, noisy.sigma, batch.cond)
        v_ref = policy.velocity(noisy.x, noisy.sigma, batch.cond, weights="reference")
        value = self.baseline(noisy.x.flatten(1))[:, 0]
        advantage = batch.advantage - value.detach()
        loss = advantage * velocity_error(v, noisy.u) + self.cfg.alpha * velocity_error(v, v_ref)
        return Loss(loss, (value - batch.advantage).square(), {"level": self.level})

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"baseline": self.baseline}

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


def register(cls: type[Algorithm], needs: set[str] | None = None, paper: str = "tests") -> str:
    """Register a class under the name "tried"; returns that name."""
    cls.__doc__ = cls.__doc__ or "Made for a test."
    register_algorithm("tried", paper=paper, needs=needs or {"endpoint"})(cls)
    return "tried"


def try_claim(claim: Callable, tmp_path: Path) -> tuple[Status, str]:
    verdict = claim(AlgorithmBench("tried", "gaussian", tmp_path))
    return verdict.status, verdict.reason


def failures(findings: list[Finding]) -> list[str]:
    return [f"{f.plugin}: {f.claim}: {f.verdict.reason}" for f in findings if f.verdict.status == Status.FAIL]


# --- algorithms ---------------------------------------------------------------------------------------------------


def test_a_sound_algorithm_passes_every_claim(clean_registry: None):
    findings = list(check([register(Sound)]))
    expected = [Status.PASS] * (len(algorithm_claims.CLAIMS) - 1) + [Status.SKIPPED]  # it is not anchored
    assert [f.verdict.status for f in findings] == expected, failures(findings)


class Undescribed(Sound):
    class Config(AlgorithmConfig):
        alpha: float = 0.1


class RefusedAblation(Sound):
    ablations: ClassVar = ({"beta": 1.0},)


class RefusedDefault(Sound):
    defaults: ClassVar = {"mini-sd3": Defaults({"learning_rate": -1.0})}


class RefusedDimension(Sound):
    search_space: ClassVar = {"algorithm.beta": LogUniform(0.1, 1.0)}


class TakesStates(Sound):
    def prepare(self, rollout: Rollout) -> Batch:
        assert rollout.states is not None
        return super().prepare(rollout)


class TakesTheReward(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        self.score(policy.decode(batch.x0), batch.prompts)
        return super().loss(policy, batch)


class Summed(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy.mean(), loss.auxiliary)


class TwoValuesPerRow(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(torch.cat([loss.policy, loss.policy]), loss.auxiliary)


class Double(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy, loss.auxiliary.double())


class NotFinite(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy / torch.zeros(()), loss.auxiliary)


class BreaksAfterAnUpdate(Sound):
    def after_update(self, policy: Policy) -> None:
        raise KeyError("mean")


class NeverBegins(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        return Loss(None, super().loss(policy, batch).auxiliary)


class MovesTheReference(Sound):
    def after_update(self, policy: Policy) -> None:
        with torch.no_grad():
            for p in policy.views.parameters("reference"):
                p.add_(0.01)


class MovesTheOldViewInItsLoss(Sound):
    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        policy.add_view("old")

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        policy.update_view("old", 0.5)
        return super().loss(policy, batch)


class LeaksIntoThePolicy(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy, loss.auxiliary + loss.policy)


class LeaksInItsExtraSteps(Sound):
    def auxiliary_loss(self, policy: Policy, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch).policy


class LeaksIntoTheBaseline(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy + self.baseline(batch.x0.flatten(1))[:, 0], loss.auxiliary)


class Detached(Sound):
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy.detach(), loss.auxiliary)


class UnnamedNetwork(Sound):
    def networks(self) -> dict[str, torch.nn.Module]:
        return {"baseline": torch.nn.Linear(1, 1)}


class SavesButDoesNotLoad(Sound):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class HiddenState(Sound):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class GlobalRandomness(Sound):
    def prepare(self, rollout: Rollout) -> Batch:
        batch = super().prepare(rollout)
        return endpoints(rollout, batch.advantage + torch.randn(len(rollout)))


class Descends(Sound):
    defaults: ClassVar = BRIEF

    def prepare(self, rollout: Rollout) -> Batch:
        return endpoints(rollout, -rollout.center(rollout.reward))


class SaysThatItIsAnchored(Sound):
    defaults: ClassVar = BRIEF
    anchored: ClassVar = True


class ShiftsItsSamples(Sound):
    defaults: ClassVar = BRIEF

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        policy.decode = lambda latents: latents + 1.0


@pytest.mark.parametrize(
    ("cls", "claim", "reason"),
    [
        (Undescribed, "metadata_is_complete", "missing: the description of alpha"),
        (RefusedAblation, "metadata_is_complete", "its ablation {'beta': 1.0} is refused: unknown setting"),
        (RefusedDefault, "metadata_is_complete", "its defaults for mini-sd3 are refused: setting 'training.learning_r"),
        (RefusedDimension, "metadata_is_complete", "its search dimension 'algorithm.beta' reaches 0.1, which is refus"),
        (
            TakesStates,
            "needs_are_honoured",
            "its prepare fails with a rollout that holds only endpoint: algorithm 'tried' fails in prepare",
        ),
        (TakesTheReward, "needs_are_honoured", "it calls self.score, but does not declare the need 'reward_grad'"),
        (Summed, "loss_is_per_row", "its policy loss has shape () for 32 rows; expected (32,)"),
        (TwoValuesPerRow, "loss_is_per_row", "its policy loss has shape (64,) for 32 rows"),
        (Double, "loss_is_per_row", "its auxiliary loss is float64; expected float32"),
        (NotFinite, "loss_is_per_row", "its policy loss is not finite"),
        (BreaksAfterAnUpdate, "loss_is_per_row", "its run ended early: algorithm 'tried' fails in after_update"),
        (NeverBegins, "loss_is_per_row", "the policy has no loss in 40 iterations"),
        (MovesTheReference, "gradients_stay_in_place", "it changes reference, which no update may touch"),
        (MovesTheOldViewInItsLoss, "gradients_stay_in_place", "it changes old, which no update may touch"),
        (LeaksIntoThePolicy, "gradients_stay_in_place", "the gradient of its auxiliary loss reaches the policy"),
        (LeaksInItsExtraSteps, "gradients_stay_in_place", "the gradient of its auxiliary loss reaches the policy"),
        (LeaksIntoTheBaseline, "gradients_stay_in_place", "the gradient of its policy loss reaches its own networks"),
        (Detached, "gradients_stay_in_place", "the gradient of its policy loss does not reach the policy"),
        (UnnamedNetwork, "gradients_stay_in_place", "does not reach the networks that networks() names"),
        (
            SavesButDoesNotLoad,
            "state_round_trips",
            "after a checkpoint is read back, algorithm's state_dict.level differs",
        ),
        (HiddenState, "resuming_is_exact", "interrupted after iteration 3, metrics.level differs in iteration 4"),
        (GlobalRandomness, "the_seed_decides", "differs in iteration 2; draw from policy.generator"),
        (GlobalRandomness, "resuming_is_exact", "interrupted after iteration 3"),
        (Descends, "it_improves_the_reward", "E[r] -"),
        (SaysThatItIsAnchored, "it_comes_to_rest", "on mixture E[r] moves by"),
        (ShiftsItsSamples, "it_respects_the_frontier", "no distribution exceeds"),
    ],
)
def test_a_broken_promise_is_found(cls: type[Algorithm], claim: str, reason: str, clean_registry: None, tmp_path: Path):
    register(cls)
    status, said = try_claim(getattr(algorithm_claims, claim), tmp_path)
    assert status == Status.FAIL
    assert reason in said


class WakesTheVae(Sound):
    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        self.baseline = torch.nn.Linear(policy.draw_noise(1).numel(), 1)
        policy.pipeline.vae.requires_grad_(True)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        loss = super().loss(policy, batch)
        return Loss(loss.policy + policy.decode(batch.x0).mean((1, 2, 3)), loss.auxiliary)


def test_a_gradient_that_reaches_the_vae_is_found(clean_registry: None, preset_file: str, tmp_path: Path):
    register(WakesTheVae)
    verdict = algorithm_claims.gradients_stay_in_place(AlgorithmBench("tried", preset_file, tmp_path))
    assert verdict.status == Status.FAIL
    assert verdict.reason == "its gradient reaches parameters of vae that are not trained"


def test_a_missing_paper_is_found(clean_registry: None, tmp_path: Path):
    register(Sound, paper=" ")
    assert try_claim(algorithm_claims.metadata_is_complete, tmp_path) == (Status.FAIL, "missing: paper")


def test_a_need_that_is_declared_and_not_used_is_found(clean_registry: None, tmp_path: Path):
    register(Sound, needs={"endpoint", "reward_grad"})
    status, reason = try_claim(algorithm_claims.needs_are_honoured, tmp_path)
    assert (status, reason) == (Status.FAIL, "it declares the need 'reward_grad', but never calls self.score")


@pytest.mark.parametrize("name", ["ddpo", "refl"])
def test_a_need_that_is_not_enforced_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowbench.config.check_needs", lambda *_: None)
    verdict = algorithm_claims.needs_are_honoured(AlgorithmBench(name, "gaussian", tmp_path))
    assert verdict.status == Status.FAIL
    assert "is not refused with" in verdict.reason


def test_claims_about_runs_are_skipped_with_the_reason_when_it_does_not_run(clean_registry: None):
    verdicts = {f.claim: f.verdict for f in check([register(TakesStates)])}
    skipped = [claim for claim, verdict in verdicts.items() if verdict.status == Status.SKIPPED]
    assert len(skipped) == len(verdicts) - 2
    assert all(
        verdicts[claim].reason.startswith("its run ended early: algorithm 'tried' fails in") for claim in skipped
    )


def test_on_a_model_without_a_known_optimum_learning_is_not_judged(clean_registry: None, tmp_path: Path):
    register(Sound)
    bench = AlgorithmBench("tried", "mini-sd3", tmp_path)
    verdict = algorithm_claims.it_improves_the_reward(bench)
    assert (verdict.status, verdict.reason) == (
        Status.SKIPPED,
        "model 'mini-sd3' has no known optimum; use --model gaussian",
    )


@pytest.mark.parametrize("name", algorithms.names())
def test_built_in_algorithms_keep_their_promises(name: str, tmp_path: Path):
    bench = AlgorithmBench(name, "gaussian", tmp_path)
    verdicts = {claim.text: claim.check(bench) for claim in algorithm_claims.CLAIMS[:7]}
    assert {text: v.reason for text, v in verdicts.items() if v.status != Status.PASS} == {}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in algorithms.names()]
)
def test_built_in_algorithms_learn_within_what_theory_allows(name: str, tmp_path: Path):
    bench = AlgorithmBench(name, "gaussian", tmp_path)
    end = None if bench.plugin.cls.anchored else -1  # only what is anchored comes to rest
    verdicts = {claim.text: claim.check(bench) for claim in algorithm_claims.CLAIMS[7:end]}
    assert {text: v.reason for text, v in verdicts.items() if v.status != Status.PASS} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", algorithms.names())
def test_built_in_algorithms_keep_their_promises_on_the_embedded_model(name: str, tmp_path: Path):
    bench = AlgorithmBench(name, "mini-sd3", tmp_path)
    verdicts = {claim.text: claim.check(bench) for claim in algorithm_claims.CLAIMS[:7]}
    assert {text: v.reason for text, v in verdicts.items() if v.status != Status.PASS} == {}


def test_the_example_of_the_documentation_passes(clean_registry: None, tmp_path: Path):
    plugin = tmp_path / "better_half.py"
    plugin.write_text(first_block(DOCS / "write-an-algorithm.md", "python"), encoding="utf-8")
    load_plugin_file(plugin)
    assert failures(list(check(["better-half"]))) == []


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({"x": [1, {"y": torch.ones(2)}]}, {"x": (1, {"y": torch.ones(2)})}, None),
        ({"x": [1, {"y": torch.ones(2)}]}, {"x": [1, {"y": torch.zeros(2)}]}, "x[1].y"),
        ({"x": 1}, {"x": 1, "z": 2}, "z"),
        ({"x": [1]}, {"x": [1, 2]}, "x"),
        ({"x": float("nan")}, {"x": float("nan")}, None),
        ({"x": 1.0}, {"x": 1.0 + 1e-15}, "x"),
    ],
)
def test_the_first_difference_of_two_states_is_named(a: Any, b: Any, where: str | None):
    assert difference(a, b) == where


# --- rewards ------------------------------------------------------------------------------------------------------


class Primaries(Reward):
    """How much more there is of the primary colours that the prompt says than of the others; bright is better."""

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        channels = images.mean((2, 3))
        said = torch.tensor([[float(color in p) for color in ("red", "green", "blue")] for p in prompts])
        return (said * (channels - channels.mean(1, keepdim=True))).sum(1) + 0.01 * channels.mean(1)


class Column(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images, prompts)[:, None]


class DoubleReward(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images, prompts).double()


class Infinite(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images, prompts) / 0


class OutOfRange(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images, prompts) + 2


class Noisy(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images, prompts) + 1e-3 * torch.rand(len(images))


class Ranked(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        scores = super().score(images, prompts)
        return scores - scores.mean()


class Blind(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images[:, 0].mean((1, 2))


class Contrary(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return -super().score(images, prompts)


class Cut(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return super().score(images.detach(), prompts)


class WrongGradient(Primaries):
    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        rounded = images + ((images * 8).round() / 8 - images).detach() * 3  # straight-through
        return super().score(rounded.square(), prompts)


class Weightless(Primaries):
    def load(self, device: torch.device) -> None:
        raise RunError("no weights here; fetch them")


def register_tried(cls: type[Reward], **changed: Any) -> str:
    metadata = {"source": "tests", "licence": "none", "range": (-1.0, 1.0), "differentiable": True}
    cls.__doc__ = cls.__doc__ or "Made for a test."
    register_reward("tried", **{**metadata, **changed})(cls)
    return "tried"


@pytest.mark.parametrize(
    ("cls", "claim", "reason"),
    [
        (Column, "scores_are_sound", "its score of 32 images has shape (32, 1); expected (32,)"),
        (DoubleReward, "scores_are_sound", "its score is float64; expected float32"),
        (Infinite, "scores_are_sound", "its score is not finite"),
        (OutOfRange, "scores_are_sound", "outside of its range -1 to 1"),
        (Noisy, "it_is_deterministic", "differently the second time"),
        (Ranked, "batches_do_not_matter", "scored alone, an image differs by"),
        (Blind, "prompts_matter", "the prompt does not change its score; declare reads_prompt=False"),
        (Contrary, "prompts_matter", "a right scene scores -"),
        (Cut, "the_gradient_is_right", "its gradient does not reach the pixels"),
        (WrongGradient, "the_gradient_is_right", "its gradient differs from a finite difference by"),
    ],
)
def test_a_broken_reward_is_found(cls: type[Reward], claim: str, reason: str, clean_registry: None):
    bench = RewardBench(register_tried(cls), None)
    verdict = getattr(reward_claims, claim)(bench)
    assert verdict.status == Status.FAIL
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("changed", "claim", "reason"),
    [
        ({"source": ""}, "metadata_is_complete", "missing: source"),
        ({"range": (1.0, 0.0)}, "metadata_is_complete", "its range 1 to 0 is empty"),
        ({"reads_prompt": False}, "prompts_matter", "it declares reads_prompt=False, but the prompt changes its score"),
    ],
)
def test_a_wrong_declaration_is_found(changed: dict[str, Any], claim: str, reason: str, clean_registry: None):
    verdict = getattr(reward_claims, claim)(RewardBench(register_tried(Primaries, **changed), None))
    assert (verdict.status, verdict.reason) == (Status.FAIL, reason)


def test_a_sound_reward_passes_every_claim(clean_registry: None):
    findings = list(check([register_tried(Primaries)]))
    assert [f.verdict.status for f in findings] == [Status.PASS] * len(reward_claims.CLAIMS), failures(findings)


def test_a_reward_without_weights_is_skipped_with_the_remedy(clean_registry: None):
    verdicts = {f.claim: f.verdict for f in check([register_tried(Weightless)])}
    assert verdicts["it loads"].status == Status.SKIPPED
    assert verdicts["it loads"].reason == "cannot be loaded: no weights here; fetch them"
    assert {v.status for v in verdicts.values()} == {Status.PASS, Status.SKIPPED}


@pytest.mark.parametrize("name", sorted({*load_preset("mini-sd3").rewards, "jpeg", "linear", "oracle", "quadratic"}))
def test_built_in_rewards_that_need_no_download_keep_their_promises(name: str):
    findings = list(check([name]))
    assert failures(findings) == []
    assert next(f for f in findings if f.claim == "it loads").verdict.status == Status.PASS


@pytest.mark.parametrize("name", rewards.names())
def test_built_in_rewards_describe_themselves(name: str):
    assert reward_claims.metadata_is_complete(RewardBench(name, None)).status == Status.PASS


# --- command ------------------------------------------------------------------------------------------------------

PLUGIN = '''
"""A reward {what}."""

from flowbench.reward import Reward, register_reward


@register_reward(
    "brightness", source="tests", licence="none", range=(0.0, 1.0), differentiable=True, reads_prompt=False
)
class Brightness(Reward):
    """Mean of all pixels."""

    def score(self, images, prompts):
        return images{path}.mean((1, 2, 3))
'''


def test_the_command_checks_what_a_plugin_file_registers(
    flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture
):
    good = tmp_path / "good.py"
    good.write_text(PLUGIN.format(what="as it should be", path=""), encoding="utf-8")
    assert flowbench_main("check", "--plugin", good) == 0
    printed = capsys.readouterr().out
    assert "reward brightness" in printed
    assert "6 pass, 1 skipped" in printed


def test_the_command_fails_with_the_reason(flowbench_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture):
    bad = tmp_path / "bad.py"
    bad.write_text(PLUGIN.format(what="without a gradient", path=".detach()"), encoding="utf-8")
    assert flowbench_main("check", "brightness", "jpeg", "--plugin", bad) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "fail it declares differentiable=True, but its gradient does not reach the pixels" in printed
    assert "reward jpeg" in printed


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["acflw"], "unknown algorithm or reward 'acflw'; did you mean 'acflow'?"),
        ([], "name an algorithm or a reward, or use --all"),
        (["ddpo", "--model", "gausian"], "unknown model 'gausian'; did you mean 'gaussian'?"),
    ],
)
def test_wrong_usage_is_answered_in_one_line(
    arguments: list[str], answer: str, flowbench_main: Main, capsys: pytest.CaptureFixture
):
    assert flowbench_main("check", *arguments) == 2
    assert capsys.readouterr().err.splitlines() == [f"flowbench: {answer}"]


def test_a_name_is_looked_up_before_anything_is_tried():
    with pytest.raises(UsageError, match="did you mean 'jpeg'"):
        check(["acflow", "jpg"])
