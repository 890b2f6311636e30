from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.errors import RunError, UsageError
from flowbench.registry import rewards
from flowbench.reward import Reward
from flowbench.scoring.preprocess import Preprocessing, TensorPreprocessing, pad_longest_side
from flowbench.scoring.workers.environment import Environment, State
from flowbench.scoring.workers.reward import make_reward as make_native_reward
from flowbench.services import parity
from flowbench.services.parity import CASES, Finding, compare, given_weights, to_markdown, verdict

installed = pytest.mark.skipif(
    Environment(rewards.get("hpsv2-package").info.requirements).state is not State.READY,
    reason="the packages are not installed; flowbench rewards install imagereward hpsv2",
)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Reward], None]], None]:
    """Puts a second native reward, changed by a function, in place of the package."""

    def replace(change: Callable[[Any], None]) -> None:
        def make(name: str, arguments: dict[str, Any]) -> Reward:
            given = {k: v for k, v in arguments.items() if k != "backend"}
            reward = make_native_reward(name, given)
            if "backend" in arguments:
                load = reward.load

                def load_and_change(device: torch.device) -> None:
                    load(device)
                    change(reward)

                reward.load = load_and_change  # type: ignore[method-assign]
            return reward

        monkeypatch.setattr(parity, "make_reward", make)
        monkeypatch.setattr(parity.Environment, "check", lambda self, name: None)

    return replace


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {f.what: f for f in findings}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_backend_equals_itself_and_every_control_is_noticed(name: str, twin: Callable[..., None]):
    twin(lambda reward: None)
    findings = compare(name, reduced=True)
    assert [f.difference for f in findings if not f.control] == [0.0] * 7
    assert all(f.ok for f in findings)
    assert len([f for f in findings if f.control]) >= 3
    verdict(name, findings)


def test_a_wrong_epsilon_of_the_layer_norms_fails(twin: Callable[..., None]):
    def loosen(reward: Any) -> None:
        for module in reward.model.vision.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5

    twin(loosen)
    findings = compare("imagereward", reduced=True)
    assert not by_name(findings)["scores, 224 x 224"].ok
    assert not by_name(findings)["gradients, 224 x 224, relative"].ok
    with pytest.raises(RunError, match=r"not shown to be equal: scores, 224 x 224: differ by [\d.]+e-0\d"):
        verdict("imagereward", findings)


def test_resizing_by_pil_where_the_package_resizes_tensors_fails_only_where_images_are_resized(
    twin: Callable[..., None],
):
    def by_pil(reward: Any) -> None:
        reward.preprocess = Preprocessing(224, pad_longest_side)

    twin(by_pil)
    findings = by_name(compare("hpsv2", reduced=True))
    assert findings["scores, 224 x 224"].ok
    assert not findings["scores, 640 x 384"].ok


def test_a_wrong_gradient_fails_though_the_scores_are_right(twin: Callable[..., None]):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 0.999 * g

    def halve(reward: Any) -> None:
        score = reward.score
        reward.score = lambda images, prompts: score(Half.apply(images), prompts)

    twin(halve)
    findings = by_name(compare("hpsv2", reduced=True))
    assert findings["scores with gradient, 224 x 224"].ok
    assert findings["gradients, 224 x 224, relative"].difference == pytest.approx(1e-3, rel=0.01)


def test_another_checkpoint_has_another_hash(twin: Callable[..., None]):
    def nudge(reward: Any) -> None:
        reward.towers.model = copy.deepcopy(reward.towers.model)
        reward.towers.model.logit_scale.data.add_(1)  # no score depends on it

    twin(nudge)
    findings = by_name(compare("hpsv2", reduced=True))
    assert findings["scores, 224 x 224"].ok
    assert not findings["hash of the weights"].ok


def test_a_control_that_changes_nothing_makes_the_comparison_worthless():
    findings = [Finding("scores", 0.0, 1e-6), Finding("prompts swapped", 1e-7, 1e-5, control=True)]
    with pytest.raises(RunError, match="not shown to be equal: prompts swapped: went unnoticed"):
        verdict("any", findings)
    assert to_markdown(findings).splitlines()[-1] == "| control: prompts swapped | 1.0e-07 | > 1e-05 | FAILS |"


def test_a_reward_without_a_package_cannot_be_compared():
    with pytest.raises(UsageError, match="reward 'clip' has no package to be compared with; there are: hpsv2, image"):
        compare("clip")
    with pytest.raises(UsageError, match="unknown reward 'hpsv3'; did you mean 'hpsv2"):
        compare("hpsv3")


def test_a_missing_environment_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path))
    with pytest.raises(RunError, match="'hpsv2-package' is not installed; create it with 'flowbench rewards install"):
        compare("hpsv2", reduced=True)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path):
    weights = tmp_path / "w.safetensors"
    assert given_weights("hpsv2", None, None, None, True) is None
    assert given_weights("hpsv2", weights, None, "v2.0", False) == {"model": str(weights), "version": "v2.0"}
    for arguments, complaint in (
        (("hpsv2", None, None, "v2.0", False), "belong to --weights"),
        (("hpsv2", weights, None, None, True), "not both"),
        (("hpsv2", weights, tmp_path, None, False), "--tokenizer says nothing to reward 'hpsv2'"),
        (("imagereward", weights, None, "v2.1", False), "--version says nothing to reward 'imagereward'"),
    ):
        with pytest.raises(UsageError, match=complaint):
            given_weights(*arguments)


def test_hpsv2_resizes_tensors_and_keeps_what_bicubic_overshoots():
    """A white bar on black: bicubic interpolation leaves [0, 1] beside it."""
    images = torch.zeros(1, 3, 448, 448)
    images[..., 200:240] = 1
    x = TensorPreprocessing(224, pad_longest_side)(images)
    assert x.min() < -0.01
    assert x.max() > 1.01


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_native_backend_equals_the_package_on_reduced_networks(name: str):
    verdict(name, compare(name, reduced=True))


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_native_backend_equals_the_package_at_full_size(name: str):
    verdict(name, compare(name))


@installed
@pytest.mark.slow
def test_weights_that_do_not_fit_and_missing_ones_are_one_line(tmp_path: Path):
    for name in ("hpsv2", "imagereward"):
        reward = make_native_reward(name, {"backend": "package", "model": str(tmp_path)})
        with pytest.raises(RunError, match=rf"reward '{name}-package' .*has no .*safetensors in"):
            reward.load(torch.device("cpu"))
