"""What a plug-in does wrong is told with its name, hook, file and line, and harms nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.algorithm import Algorithm, AlgorithmConfig, Batch, Loss
from flowbench.errors import RunError, UsageError
from flowbench.hooks import guarded, hook
from flowbench.names import check_plugin_name, distinct_name, path_name
from flowbench.registry import AlgorithmInfo, RewardInfo, load_plugin_file, rewards
from flowbench.reward import Reward, checked_score

IMAGES = torch.rand(2, 3, 4, 4)
PROMPTS = ("a", "b")
INFO = RewardInfo("odd", "tests", "none", (0.0, 1.0), True, False, "Odd.")
SOURCE = """
from flowbench.reward import Reward, register_reward

{top}

@register_reward("{name}", source="tests", licence="none", range=(0.0, 1.0), differentiable=False)
class Plugged(Reward):
    '''A reward.'''

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) * {factor}
"""


def reward_of(score: Callable[[Any, torch.Tensor, tuple[str, ...]], Any]) -> Reward:
    reward = type("Odd", (Reward,), {"score": score, "info": INFO})()
    assert isinstance(reward, Reward)
    return reward


def raising(error: BaseException) -> Callable[..., Any]:
    def score(self: Any, images: torch.Tensor, prompts: tuple[str, ...]) -> Any:
        raise error

    return score


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (None, r"reward 'odd' returns None from score \(.*test_plugins_told\.py:\d+\); expected a tensor of 2 numbers"),
        (["a", "b"], "returns a list from score"),
        ("text", "returns a str from score"),
        ({}, "returns a dict from score"),
        (torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images; expected \(2,\) \(.*\.py:\d+\)"),
        (0.5, r"returned shape \(\) for 2 images"),
    ],
)
def test_a_score_that_is_none_names_reward_hook_file_and_line(answer: Any, complaint: str):
    with pytest.raises(RunError, match=complaint):
        checked_score(reward_of(lambda self, images, prompts: answer), IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (KeyError("x"), r"reward 'odd' fails in score \(.*test_plugins_told\.py:\d+\): KeyError: 'x'"),
        (SystemExit(0), r"reward 'odd' ends the program in score \(.*\), sys\.exit\(0\)"),
        (ValueError("one\ntwo"), "ValueError: one$"),
    ],
)
def test_what_a_reward_raises_is_told_in_a_line(error: BaseException, complaint: str):
    with pytest.raises(RunError, match=complaint) as raised:
        checked_score(reward_of(raising(error)), IMAGES, PROMPTS)
    assert "\n" not in str(raised.value)


def test_a_lack_of_memory_is_left_to_those_who_can_mend_it():
    with pytest.raises(torch.OutOfMemoryError):
        checked_score(reward_of(raising(torch.OutOfMemoryError("CUDA out of memory"))), IMAGES, PROMPTS)


def test_an_interrupt_is_no_fault_of_the_plugin():
    with pytest.raises(KeyboardInterrupt), hook("reward 'odd'", "score", Reward):
        raise KeyboardInterrupt


def in_place(self: Any, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
    images.detach().numpy()[:] = 0.5
    return images.sub_(0.5).mean((1, 2, 3)) if not images.requires_grad else images.mean((1, 2, 3))


def test_a_reward_that_writes_to_its_images_changes_them_for_nobody_else():
    images = IMAGES.clone()
    checked_score(reward_of(in_place), images, PROMPTS)
    assert torch.equal(images, IMAGES)


def test_writing_to_images_whose_gradient_is_asked_for_is_refused():
    images = IMAGES.clone().requires_grad_() * 1

    def score(self: Any, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mul_(2).mean((1, 2, 3))

    with pytest.raises(RunError, match=r"reward 'odd' changes its images in place in score \(.*\.py:\d+\)"):
        checked_score(reward_of(score), images, PROMPTS)


class Learner(Algorithm[AlgorithmConfig]):
    """Returns what it is told to."""

    info = AlgorithmInfo("learner", "none", frozenset(), "Odd.")
    answer: Any = None

    def prepare(self, rollout: Any) -> Batch:
        return self.answer

    def loss(self, policy: Any, batch: Any) -> Loss:
        raise IndexError("no such row")


def test_hooks_of_an_algorithm_are_told_with_file_and_line():
    learner: Any = guarded(Learner(AlgorithmConfig()))
    with pytest.raises(RunError, match=r"'learner' returns None from prepare \(.*told\.py:\d+\); expected Batch"):
        learner.prepare(None)
    with pytest.raises(RunError, match=r"'learner' fails in loss \(.*told\.py:\d+\): IndexError: no such row"):
        learner.loss(None, None)
    assert learner.state_dict() == {}
    assert learner.draws().noises == 0


def plugin(folder: Path, name: str, factor: int, top: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "plugin.py"
    path.write_text(SOURCE.format(name=name, factor=factor, top=top))
    return path


def test_two_plugin_files_of_one_name_stand_beside_each_other(tmp_path: Path, clean_registry: None):
    for k in (1, 2):
        load_plugin_file(plugin(tmp_path / str(k), f"number-{k}", k))
    one, two = (checked_score(rewards.get(f"number-{k}").cls(), IMAGES, PROMPTS) for k in (1, 2))
    assert torch.allclose(two, 2 * one)


@pytest.mark.parametrize(
    ("top", "complaint"),
    [
        ("import sys; sys.exit(0)", r"it ends the program, sys\.exit\(0\) \(.*plugin\.py:4\)"),
        ("raise SystemExit", r"it ends the program, sys\.exit\(None\)"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*plugin\.py:4\)"),
        ("def", "SyntaxError: .*line 4"),
    ],
)
def test_a_plugin_file_that_exits_or_fails_is_named_with_its_line(
    top: str, complaint: str, tmp_path: Path, clean_registry: None
):
    with pytest.raises(UsageError, match=rf"plug-in file '.*' fails on import: {complaint}"):
        load_plugin_file(plugin(tmp_path, "never", 1, top))


def test_a_plugin_that_exits_ends_the_command_with_a_line(
    tmp_path: Path, flowbench_main: Callable[..., int], capsys: pytest.CaptureFixture
):
    file = plugin(tmp_path, "never", 1, "import sys; sys.exit(0)")
    assert flowbench_main("list", "rewards", "--plugin", file) == 2
    assert "ends the program" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "a:b", "a+b", "[red]", "a b", "x" * 200, "a\n"])
def test_a_plugin_cannot_have_a_name_that_leads_elsewhere(name: str, tmp_path: Path, clean_registry: None):
    with pytest.raises(UsageError, match="cannot be called that"):
        check_plugin_name("reward", name)
    if "\n" not in name:
        with pytest.raises(UsageError, match="cannot be called that"):
            load_plugin_file(plugin(tmp_path, name, 1))


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", "/etc/passwd", "a\0b", "x" * 5000, "☕" * 200, "C:\\x", "a\nb"]
)
def test_a_name_is_one_component_of_a_path(name: str, tmp_path: Path):
    made = tmp_path / path_name(name)
    made.touch()
    assert made.resolve().parent == tmp_path
    assert len(made.name.encode()) <= 120


def test_well_behaved_names_stay_as_they_are():
    for name in ("clip", "clip-0.5+jpeg-2", "orw-cfm-w2", "größe"):
        assert path_name(name) == name


def test_different_prompts_never_share_a_file():
    prompts = [
        "☕",
        "🍵",
        "",
        "a red circle",
        "a red circle!",
        "A red circle",
        "x" * 60 + "a",
        "x" * 60 + "b",
        "../../x",
    ]
    assert len({distinct_name(prompt) for prompt in prompts}) == len(prompts)
    assert distinct_name("a red circle").startswith("a-red-circle-")
    assert all("/" not in distinct_name(prompt) for prompt in prompts)
