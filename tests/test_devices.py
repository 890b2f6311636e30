"""The devices that every method may have, shared noise and a moving anchor; guidance as the documentation states it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.algorithm import no_score
from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import load_preset
from flowbench.registry import algorithms
from flowbench.rollout import Batch
from flowbench.toolkit.critic import Sight
from flowbench.toolkit.seeing import LeastSquaresCritic, make_critic
from flowbench.training.trainer import Trainer

MakeConfig, MakeTrainer = Callable[..., RunConfig], Callable[..., Trainer]
GUIDANCE_PAGE = Path(__file__).parents[1] / "docs" / "guidance.md"


# --- shared noise -----------------------------------------------------------------------------------------------------


def handed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The rows that the algorithm's loss is given in one iteration."""
    seen, loss = [], trainer.algorithm.loss

    def spy(policy: Policy, batch: Batch) -> Any:
        seen.append(batch)
        return loss(policy, batch)

    monkeypatch.setattr(trainer.algorithm, "loss", spy)
    trainer._iterate()
    return seen


@pytest.mark.parametrize("name", ["acflow", "adrpo", "awm", "nft", "orw-cfm-w2", "raft"])
def test_a_run_may_give_shared_noise_to_any_method_that_noises_images_again(
    name: str, tiny_config: MakeConfig, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for shared in (True, False):
        overrides = {"training.shared_noise": shared, "training.minibatch": 16}
        if name == "raft":
            overrides["algorithm.share"] = 1.0
        trainer = make_trainer(tiny_config(name, overrides=overrides), tmp_path / str(shared))
        (batch,) = handed(trainer, monkeypatch)
        levels = [len(batch.noise_sigma[batch.group == g].unique()) for g in batch.group.unique()]
        assert set(levels) == ({1} if shared else {trainer.config.training.images_per_prompt})


@pytest.mark.parametrize(("name", "default"), [("acflow", True), ("adrpo", False), ("nft", False)])
def test_a_run_that_says_nothing_of_shared_noise_leaves_it_to_the_method(
    name: str, default: bool, tiny_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path
):
    overrides = {"training.shared_noise": None}
    assert make_trainer(tiny_config(name, overrides=overrides), tmp_path).algorithm.draws().shared == default


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, "shared_noise") for name in ("acflow", "adrpo", "awm", "nft", "raft")] + [("acflow", "anchor_decay")],
)
def test_the_former_name_of_an_option_is_answered_with_its_new_one(name: str, key: str):
    with pytest.raises(UsageError, match=rf"^setting 'algorithm.{key}' is now 'training.{key}'$"):
        resolve_config(name, "clip", "mini-sd3", overrides={f"algorithm.{key}": None})


def test_devices_that_are_off_leave_hashes_as_they_were(tiny_config: MakeConfig):
    plain = tiny_config("nft").hash()
    for key, value in (
        ("training.shared_noise", False),
        ("training.anchor_decay", 0.9),
        ("evaluation.unguided", False),
    ):
        assert tiny_config("nft", overrides={key: value}).hash() != plain
    assert tiny_config("nft", overrides={"training.shared_noise": None, "training.anchor_decay": None}).hash() == plain


# --- the moving anchor ------------------------------------------------------------------------------------------------


def weights(policy: Policy, view: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.views.parameters(view)]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_anchor_is_the_policys_average_over_iterations(
    tuning: str, tiny_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path
):
    overrides = {"training.anchor_decay": 0.75, "training.tuning": tuning, "training.learning_rate": 1e-3}
    trainer = make_trainer(tiny_config("adrpo", overrides=overrides), tmp_path)
    policy = trainer.policy
    expected = weights(policy, "current")
    for _ in range(2):
        trainer._iterate()
        expected = [0.75 * a + 0.25 * p for a, p in zip(expected, weights(policy, "current"), strict=True)]
        for anchor, average in zip(weights(policy, "anchor"), expected, strict=True):
            torch.testing.assert_close(anchor, average)
    assert not torch.equal(expected[-1], weights(policy, "current")[-1])


def test_a_loss_is_pulled_to_the_anchor_and_an_evaluation_still_knows_the_base_model(
    make_policy: Callable[..., Policy],
):
    policy = make_policy(Tuning("full"))
    policy.add_view("anchor")
    for p in policy.views.parameters("anchor"):
        p.data += 0.01
    x, sigma, cond = policy.draw_noise(2), torch.tensor([0.9, 0.4]), policy.encode(["a red circle", "two crosses"])
    base, anchor = (policy.velocity(x, sigma, cond, weights=name) for name in ("reference", "anchor"))
    with policy.anchored():
        pulled_to = policy.velocity(x, sigma, cond, weights="reference")
    assert torch.equal(pulled_to, anchor)
    assert not torch.allclose(base, anchor)
    assert torch.equal(policy.velocity(x, sigma, cond, weights="reference"), base)


def test_a_critic_in_a_loss_that_is_anchored_looks_through_the_base_model(make_policy: Callable[..., Policy]):
    policy = make_policy(Tuning("full"))
    policy.add_view("anchor")
    critic, x, sigma = make_critic("sees", policy, 8, center=False), policy.draw_noise(2), torch.tensor([0.9, 0.4])
    prompts = ("a red circle", "two crosses")
    rows = Sight(x, sigma, policy.encode(prompts), prompts, torch.zeros(2), torch.arange(2))
    seen = []
    for shift in (0.0, 0.01):  # of the anchor alone
        for p in policy.views.parameters("anchor"):
            p.data += shift
        with policy.anchored():
            critic.measure(policy, rows, no_score)
            seen.append(policy.velocity(x, sigma, rows.cond, weights="reference"))
    assert not torch.allclose(*seen)  # the loss still gets the anchor
    assert isinstance(critic, LeastSquaresCritic)
    assert all(torch.equal(a, b) for a, b in zip(*critic._seen, strict=True))


@pytest.mark.parametrize("name", ["acflow", "adrpo", "awm", "dpok", "flow-grpo", "nft", "orw-cfm-w2"])
def test_a_moving_anchor_changes_what_a_method_with_a_reference_term_learns(
    name: str, tiny_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path
):
    ends = []
    for decay in (None, 0.0):
        overrides = {"training.anchor_decay": decay, "training.learning_rate": 1e-3, "training.max_grad_norm": 1e9}
        overrides |= {"training.prompts_per_iteration": 1, "training.images": 8, "training.minibatch": 16}
        trainer = make_trainer(tiny_config(name, overrides=overrides), tmp_path / str(decay))
        trainer.run()
        ends.append(torch.cat([p.flatten() for p in weights(trainer.policy, "current")]))
    assert not torch.equal(*ends)


def test_a_run_with_a_moving_anchor_resumes_exactly(
    tiny_config: MakeConfig, make_trainer: MakeTrainer, tmp_path: Path, read_log: Callable[[Path], Any]
):
    config = tiny_config("adrpo", overrides={"training.anchor_decay": 0.5, "training.learning_rate": 1e-3})
    whole = make_trainer(config, tmp_path / "whole")
    whole.run()
    first = make_trainer(config, tmp_path / "parts")
    first._iterate()
    first.save()
    second = make_trainer(config, tmp_path / "parts")
    assert second.resume()
    second.run()
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    for a, b in zip(weights(whole.policy, "anchor"), weights(second.policy, "anchor"), strict=True):
        assert torch.equal(a, b)


# --- guidance ---------------------------------------------------------------------------------------------------------


def stated_guidance() -> dict[str, float]:
    """Training's scale per algorithm, as the page's table has it."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([\d.]+) \|", GUIDANCE_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: float(scale) for names, scale in rows for name in re.findall(r"`([\w-]+)`", names)}


def test_the_page_on_guidance_states_every_algorithms():
    assert sorted(stated_guidance()) == sorted(algorithms.names())


@pytest.mark.parametrize("model", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
@pytest.mark.parametrize("name", algorithms.names())
def test_training_is_guided_as_the_page_states(name: str, model: str):
    config, preset = resolve_config(name, "clip", model, overrides={}), load_preset(model)
    scale = config.training.guidance_scale
    stated = stated_guidance()[name]
    own = 3.5 if model == "sd3.5-large" else 4.5  # the page's number is that of the others
    assert (preset.guidance_scale if scale is None else scale) == (own if stated == 4.5 else stated)
    assert (config.evaluation.guidance_scale, config.evaluation.unguided) == (None, True)
