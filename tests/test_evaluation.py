from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flowbench.config import EvaluationConfig
from flowbench.evaluation.protocol import (
    Judges,
    SplitScores,
    by_category,
    protocol_hash,
    score_split,
    within_prompt_diversity,
)
from flowbench.evaluation.statistics import mean_ci95
from flowbench.models.policy import Policy
from flowbench.prompts import FOLDER, Prompt, PromptSplit, load_split, prompt_sets, splits, spread
from flowbench.reward import Reward

TEST = load_split("shapes", "test")


class Brightness(Reward):
    info = type("Info", (), {"name": "brightness", "truth": False})

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mean((1, 2, 3))


def score(policy: Policy, weights: str = "current", judges: Judges | None = None, **config: Any) -> SplitScores:
    settings = EvaluationConfig(**{"prompts": 5, "images_per_prompt": 3, **config})
    judges = judges or Judges({"brightness": Brightness()}, oracle=False)
    return score_split(policy, weights, TEST, judges, settings, lambda n: None)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = mean_ci95(generator.normal(0.3, 1.0, 60), seed=trial)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_the_bootstrap_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 3.0, 4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(4000)
    assert mean_ci95(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_the_bootstrap_interval_of_equal_values_is_their_value():
    assert mean_ci95(np.full(7, 0.25)) == (0.25, 0.25)
    assert mean_ci95(np.array([0.5])) is None  # nothing says how far other prompts lie from it


def test_the_bootstrap_interval_is_reproducible():
    values = np.random.default_rng(2).normal(size=30)
    assert mean_ci95(values) == mean_ci95(values)


def test_diversity_is_zero_for_equal_images_and_known_for_two_points():
    same = torch.randn(1, 1, 8).expand(3, 4, 8)
    assert within_prompt_diversity(same).tolist() == [0, 0, 0]
    two = torch.stack([torch.zeros(16), torch.full((16,), 3.0)])[None]
    assert within_prompt_diversity(two).tolist() == [pytest.approx(3.0)]
    three = torch.cat([two, torch.zeros(1, 1, 16)], 1)  # distances 3, 3 and 0
    assert within_prompt_diversity(three).tolist() == [pytest.approx(2.0)]


def test_diversity_of_independent_gaussians_is_root_two_of_their_deviation():
    latents = 0.7 * torch.randn(40, 6, 3000, generator=torch.Generator().manual_seed(0))
    assert within_prompt_diversity(latents).mean().item() == pytest.approx(0.7 * math.sqrt(2), rel=0.005)


def test_diversity_is_computed_within_each_prompt():
    latents = torch.randn(2, 3, 8)
    shifted = latents + torch.tensor([0.0, 100.0]).view(2, 1, 1)
    assert torch.allclose(within_prompt_diversity(shifted), within_prompt_diversity(latents), atol=1e-3)


def test_scores_do_not_depend_on_the_batch_size(shared_policy: Policy):
    one, seven, all_ = (score(shared_policy, batch=n) for n in (1, 7, 64))
    for name, values in all_.scores.items():
        for other in (one, seven):
            assert np.allclose(other.scores[name], values, atol=2e-4), name
    assert torch.allclose(one.grid, all_.grid, atol=2e-3)
    assert np.ptp(all_.scores["brightness"]) > 0.01  # far more than the tolerance


def test_the_noise_depends_on_seed_split_prompt_and_image_alone(shared_policy: Policy, monkeypatch: pytest.MonkeyPatch):
    def noises(**config: Any) -> torch.Tensor:
        seen = []
        rollout = Policy.rollout

        def spy(self: Policy, cond: Any, noise: torch.Tensor, **arguments: Any) -> Any:
            seen.append(noise)
            return rollout(self, cond, noise, **arguments)

        monkeypatch.setattr(Policy, "rollout", spy)
        score(shared_policy, "reference", num_steps=1, **config)
        monkeypatch.setattr(Policy, "rollout", rollout)
        return torch.cat(seen)

    plain = noises()
    assert len(plain) == 15
    assert torch.equal(plain, noises(batch=4))
    assert torch.equal(plain[:6].view(2, 3, -1), noises(prompts=2).view(2, 3, -1))
    assert torch.equal(plain.view(5, 3, -1)[:, :2], noises(images_per_prompt=2).view(5, 2, -1))
    assert not torch.equal(plain, noises(seed=1))
    assert len({tuple(x.flatten().tolist()) for x in plain}) == 15


def test_base_and_untrained_model_score_the_same(shared_policy: Policy):
    base, tuned = score(shared_policy, "reference"), score(shared_policy, "current")
    assert base.prompts == tuned.prompts
    for name in base.scores:
        assert np.allclose(base.scores[name], tuned.scores[name], atol=1e-6), name
    assert tuned.scores["w2"].max() < 1e-9


def test_the_divergence_is_the_velocitys_squared_distance_to_the_base(make_policy: Callable[..., Policy]):
    """A bias b on the output of every latent dimension moves the velocity by b, hence w2 = b^2 exactly."""
    policy = make_policy()
    policy.transformer.proj_out.bias.data += 0.3
    assert score(policy).scores["w2"].tolist() == pytest.approx([0.09] * 5, rel=1e-3)
    assert score(policy, "reference").scores["w2"].tolist() == [0.0] * 5


def test_the_oracle_is_asked_only_where_it_can_read(shared_policy: Policy):
    with_oracle = score(shared_policy, judges=Judges({}, oracle=True))
    assert set(with_oracle.scores) == {"oracle_exact", "oracle_soft", "w2", "diversity"}
    assert set(score(shared_policy).scores) == {"brightness", "w2", "diversity"}


def test_progress_counts_every_image_once(shared_policy: Policy):
    seen = []
    judges, config = Judges({}, oracle=False), EvaluationConfig(prompts=5, images_per_prompt=3, batch=4)
    score_split(shared_policy, "reference", TEST, judges, config, seen.append)
    assert sum(seen) == 15


def test_prompts_are_spread_over_the_categories():
    chosen = spread(TEST, 12)
    categories = [p.category for p in TEST.prompts]
    present = list(dict.fromkeys(categories))
    assert [p.category for p in chosen[: len(present)]] == present
    counts = [sum(p.category == c for p in chosen) for c in present]
    assert max(counts) - min(counts) <= 1
    assert len(set(chosen)) == 12
    assert spread(TEST, 10**6)
    assert len(spread(TEST, 10**6)) == len(TEST.prompts)


def test_categories_partition_the_prompts():
    prompts = tuple(Prompt(f"p{i}", c) for i, c in enumerate("abcab"))
    split = SplitScores(prompts, {"m": np.arange(5.0)}, torch.zeros(0))
    assert {c: v.tolist() for c, v in by_category(split, "m")} == {"a": [0, 3], "b": [1, 4], "c": [2]}


def test_the_protocols_hash_changes_with_its_settings_and_its_prompts():
    plain = protocol_hash(EvaluationConfig(), [TEST])
    assert plain == protocol_hash(EvaluationConfig(), [TEST])
    assert plain != protocol_hash(EvaluationConfig(seed=1), [TEST])
    assert plain != protocol_hash(EvaluationConfig(), [PromptSplit("test", TEST.prompts, "0" * 64)])


@pytest.mark.parametrize("name", prompt_sets())
def test_every_prompt_set_has_disjoint_splits(name: str):
    assert {"train", "test"} <= set(splits(FOLDER / name))
    texts = [{p.text for p in load_split(name, split).prompts} for split in splits(FOLDER / name)]
    assert all(texts)
    assert sum(map(len, texts)) == len(set.union(*texts))
