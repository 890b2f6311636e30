from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.config import RunConfig, resolve_config
from flowbench.errors import RunError, RunInterruptedError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.folder import run_folder
from flowbench.experiments.run import execute
from flowbench.models.presets import load_preset
from flowbench.names import path_name
from flowbench.reward import Reward, check_signal, checked_score, register_reward
from flowbench.scoring.combination import Moments, WeightedSum
from flowbench.terms import Term, combined_info, parse_reward, spell, term_names
from flowbench.training.checkpoint import CHECKPOINT
from flowbench.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
CPU = torch.device("cpu")


@pytest.fixture
def two_rewards(clean_registry: None) -> None:
    """Brightness, which has a gradient, and the share of red pixels, which has none."""
    arguments: dict[str, Any] = {"source": "tests", "licence": "none"}

    @register_reward("bright", range=(0.0, 1.0), differentiable=True, **arguments)
    class Bright(Reward):
        """Mean brightness."""

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return images.mean((1, 2, 3))

    @register_reward("reddish", range=(-1.0, 3.0), differentiable=False, **arguments)
    class Reddish(Reward):
        """Mean red less mean green."""

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return (images[:, 0] - images[:, 1]).detach().mean((1, 2))


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("clip", "clip"),
        ("clip:1", "clip"),
        ("clip:0.5+jpeg:0.5", "clip:0.5+jpeg:0.5"),
        (" jpeg:.50 + clip : 5e-1", "clip:0.5+jpeg:0.5"),
        ("jpeg:-0.25+clip", "clip+jpeg:-0.25"),
        ("oracle:2", "oracle:2"),
    ],
)
def test_a_sum_has_one_spelling_that_reads_back(text: str, spelling: str):
    terms = parse_reward(text)
    assert spell(terms) == spelling
    assert parse_reward(spelling) == terms
    assert term_names(text) == tuple(t.name for t in terms)


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", 1.0),
        ("https://host/path/x", "https://host/path/x", 1.0),
        ("http://127.0.0.1:8000/:0.5", "http://127.0.0.1:8000/", 0.5),
        ("http://host:80/a/b:-2", "http://host:80/a/b", -2.0),
    ],
)
def test_a_colon_before_a_port_is_no_weight(text: str, name: str, weight: float):
    from flowbench.terms import _term

    assert _term(text, text) == Term(name, weight)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cilp:0.5+jpeg:0.5", "unknown reward 'cilp'; did you mean 'clip'?"),
        ("clip:0.5+jpge:0.5", "unknown reward 'jpge'; did you mean 'jpeg'?"),
        ("clip:half+jpeg", "the weight 'half' of reward 'clip' is not a number other than 0"),
        ("clip:nan", "the weight 'nan' of reward 'clip'"),
        ("clip:inf", "the weight 'inf' of reward 'clip'"),
        ("clip:0+jpeg", "the weight '0' of reward 'clip'"),
        ("clip:", "the weight '' of reward 'clip'"),
        ("clip+jpeg+", "reward 'clip+jpeg+' has no name in ''"),
        (":0.5", "has no name in ':0.5'"),
        ("", "has no name in ''"),
        ("clip:0.5+clip:0.5", "reward 'clip' stands twice in 'clip:0.5+clip:0.5'"),
        ("clip+linear", "reward 'clip' scores images and reward 'linear' scores points"),
    ],
)
def test_a_wrong_sum_is_one_line_that_names_the_part(text: str, complaint: str):
    with pytest.raises(UsageError) as raised:
        combined_info(parse_reward(text))
    assert complaint in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_sum_is_differentiable_only_if_all_its_parts_are(two_rewards: None):
    both = combined_info(parse_reward("bright:2+reddish:-0.5"))
    assert not both.differentiable
    assert both.range == (2 * 0 - 0.5 * 3, 2 * 1 + 0.5 * 1)
    assert combined_info(parse_reward("bright:0.5+clip:0.5")).differentiable
    with pytest.raises(UsageError, match="refl needs the reward's gradient; reward 'reddish' has none"):
        resolve_config("refl", "bright+reddish", "mini-sd3", overrides={})


def test_a_plain_reward_stays_what_it_is(preset_file: str):
    assert combined_info(parse_reward("oracle")).truth
    assert not isinstance(build_reward("jpeg", load_preset(preset_file), CPU), WeightedSum)


def test_the_raw_sum_is_the_weighted_sum_of_the_scores_and_of_their_gradients(two_rewards: None, preset_file: str):
    preset = load_preset(preset_file)
    images = torch.rand(5, 3, 32, 32, requires_grad=True)
    prompts = ("a red circle",) * 5
    total = build_reward("bright:2+clip:-0.5", preset, CPU)
    scores = checked_score(total, images, prompts)
    alone = {name: checked_score(build_reward(name, preset, CPU), images, prompts) for name in ("bright", "clip")}
    assert torch.allclose(scores, 2 * alone["bright"] - 0.5 * alone["clip"], atol=1e-6)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    parts = {name: torch.autograd.grad(value.sum(), images)[0] for name, value in alone.items()}
    assert torch.allclose(gradient, 2 * parts["bright"] - 0.5 * parts["clip"], atol=1e-6)


def test_the_running_moments_are_those_of_all_values():
    values, moments = 3 + 0.2 * torch.randn(1000, dtype=torch.float64), Moments()
    assert (moments.mean, moments.std) == (0.0, 1.0)
    for part in values.split([1, 7, 492, 500]):
        moments.add(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert moments.std == pytest.approx(values.std(correction=0).item(), rel=1e-10)


def test_standardized_parts_have_the_deviation_of_their_weights(two_rewards: None):
    terms = parse_reward("bright:0.5+reddish:2")
    total = WeightedSum(terms, {}, standardized=True)
    scores = {"bright": 0.01 * torch.randn(4000) + 7, "reddish": 100 * torch.randn(4000) - 30}
    total.observe(scores)
    each = [total.combine({**scores, other: torch.full((4000,), total.moments[other].mean)}) for other in scores]
    # The other part stands at its mean, so that it adds 0: the rest has its own weight as deviation.
    assert each[0].std().item() == pytest.approx(2.0, rel=1e-3)
    assert each[1].std().item() == pytest.approx(0.5, rel=1e-3)
    assert all(abs(part.mean().item()) < 1e-3 for part in each)


def test_a_part_that_never_varies_adds_nothing(two_rewards: None):
    total = WeightedSum(parse_reward("bright+reddish"), {}, standardized=True)
    scores = {"bright": torch.full((6,), 0.25), "reddish": torch.arange(6.0)}
    total.observe(scores)
    assert total.combine(scores).isfinite().all()
    assert total.combine(scores).mean().abs().item() < 1e-6


def test_a_sums_run_logs_each_part_and_lies_in_a_safe_folder(
    two_rewards: None, tmp_path: Path, tiny_config: MakeConfig, read_log: Callable
):
    config = tiny_config("orw-cfm-w2", "jpeg:0.1+bright:0.5")
    folder = run_folder(tmp_path, config)
    assert folder.parts[-3] == "bright-0.5+jpeg-0.1"
    execute(config, folder, "", resume=False)
    for line in read_log(folder):
        parts = line["metrics"]
        assert line["reward"] == pytest.approx(0.5 * parts["reward_bright"] + 0.1 * parts["reward_jpeg"], abs=1e-5)
    record = json.loads((folder / "record.json").read_text())
    assert record["reward"] == "bright:0.5+jpeg:0.1"
    assert record["budget"]["reward_calls"] == 2 * record["budget"]["images"]
    assert {name: part["weight"] for name, part in record["reward_provenance"].items()} == {"bright": 0.5, "jpeg": 0.1}


@pytest.mark.parametrize("name", ["a/b", "../../etc", "http://host:8000/x?y=1", "a:0.5+b", "…", "", ".", "..", "a\\b"])
def test_every_name_is_one_harmless_component_of_a_path(name: str):
    safe = path_name(name)
    assert len(Path(safe).parts) == 1
    assert safe not in (".", "..")
    assert not set(safe) & set('/\\:*?"<>| ')


def test_statistics_survive_stopping_and_resuming_bit_for_bit(
    two_rewards: None, tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer, read_log: Callable
):
    overrides = {"training.images": 48, "training.reward_scale": "standardized"}
    config = tiny_config("orw-cfm-w2", "bright:0.5+jpeg:0.5", overrides=overrides)

    def trainer(name: str) -> Trainer:
        reward = build_reward(config.reward, load_preset(config.model), CPU, standardized=True)
        return make_trainer(config, tmp_path / name, reward)

    whole = trainer("whole")
    whole.run()
    first = trainer("parts")
    first.on_iteration = lambda log: setattr(first.stop, "made", log.iteration == 1)
    with pytest.raises(RunInterruptedError):
        first.run()
    second = trainer("parts")
    second.resume()
    second.run()
    assert second.reward.state_dict() == whole.reward.state_dict()
    assert second.reward.moments["bright"].count == 48
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_a_plain_rewards_hash_does_not_know_of_sums_and_a_sums_does(preset_file: str):
    def hash_of(reward: str, **overrides: Any) -> str:
        return resolve_config("acflow", reward, preset_file, overrides=overrides).hash()

    plain, scaled = hash_of("clip"), {"training.reward_scale": "standardized"}
    assert len({plain, hash_of("clip", **scaled), hash_of("clip+jpeg"), hash_of("clip:0.5+jpeg")}) == 4
    assert hash_of("jpeg+clip") == hash_of("clip+jpeg:1")


@pytest.mark.parametrize("discrete", [False, True])
def test_constant_scores_stop_a_continuous_reward_and_are_mentioned_for_a_discrete_one(
    discrete: bool, clean_registry: None, caplog: pytest.LogCaptureFixture
):
    @register_reward("stuck", source="tests", licence="none", range=(0.0, 1.0), differentiable=False, discrete=discrete)
    class Stuck(Reward):
        """Says nothing."""

    message = "reward 'stuck' is 0 for all 16 images of iteration 3"
    if discrete:
        check_signal(Stuck.info, torch.zeros(16), 3)
        assert [message in r.getMessage() for r in caplog.records] == [True]
    else:
        with pytest.raises(RunError, match=message):
            check_signal(Stuck.info, torch.zeros(16), 3)
    check_signal(Stuck.info, torch.zeros(1), 3)  # a single image has nothing to differ from
    check_signal(Stuck.info, torch.tensor([0.5] * 15 + [math.nextafter(0.5, 1) + 1e-6]), 3)


def test_a_constant_reward_stops_a_run_before_it_changes_anything(
    clean_registry: None, tmp_path: Path, tiny_config: MakeConfig, make_trainer: MakeTrainer
):
    @register_reward("zeros", source="tests", licence="none", range=(0.0, 1.0), differentiable=False)
    class Zeros(Reward):
        """A reward whose weights were never loaded."""

        def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
            return torch.zeros(len(images))

    trainer = make_trainer(tiny_config("orw-cfm-w2", "zeros"), tmp_path)
    before = [p.detach().clone() for p in trainer.updater.parameters]
    with pytest.raises(RunError, match="reward 'zeros' is 0 for all 16 images of iteration 1, so nothing can be"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.updater.parameters, strict=True))
    assert (tmp_path / CHECKPOINT).is_file()
