from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flowbench.builders.clip import info_nce
from flowbench.builders.fit import FitPlan, fit, learning_rate
from flowbench.builders.measure import exclusive_captions
from flowbench.builders.transformer import (
    CAPTION_DROPOUT,
    Data,
    LatentPool,
    distil_guidance,
    draw_batch,
    guided_velocity,
    new_transformer,
    velocity,
)
from flowbench.builders.vae import draw_crosses
from flowbench.testbeds.shapes.oracle import judge_images
from flowbench.testbeds.shapes.world import is_compositional

PLAN = FitPlan("line", steps=40, lr=0.05, warmup=5, ema=0.9, checkpoint_every=10)


def quiet(stage: str, step: int, steps: int, loss: float) -> None:
    pass


def line_fit(work: Path, steps: int = 40, stop_at: int | None = None) -> nn.Linear:
    """Fits y = 2 x; `stop_at` breaks off, as a Ctrl-C would."""
    torch.manual_seed(0)
    module = nn.Linear(1, 1)

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
        return (module(x) - 2 * x).square().mean()

    fit(module, loss, PLAN, work, quiet)
    return module


def test_a_stage_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = line_fit(whole)
    with pytest.raises(KeyboardInterrupt):
        line_fit(parts, stop_at=27)
    resumed = line_fit(parts)
    assert torch.equal(resumed.weight, expected.weight)
    assert abs(expected.weight.item() - 2) < 1.5


def test_the_learning_rate_rises_then_falls_to_its_end():
    plan = FitPlan("x", steps=1000, lr=1.0, lr_end=0.1, warmup=100)
    rates = [learning_rate(plan, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[549] == pytest.approx(0.55, abs=2e-3)  # half-way between both, in the middle of the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path):
    module = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="line is nan at step 0"):
        fit(module, lambda step: module.weight.sum() * float("nan"), PLAN, tmp_path, quiet)


def test_contrastive_loss_is_smallest_for_matching_pairs_and_counts_no_twin_as_wrong():
    image = torch.eye(4)
    text = torch.cat([torch.eye(4), -torch.eye(4)])
    tokens = torch.arange(8)[:, None]
    scale = torch.tensor(10.0).log()
    matched = info_nce(image, text, tokens, scale)
    shuffled = info_nce(image, text[[1, 0, 2, 3, 4, 5, 6, 7]], tokens, scale)
    assert matched < 0.01 < shuffled
    # Two pictures with the same caption: each fits both, so the best possible loss is log 2 a row.
    twins = torch.tensor([[0], [0], [2], [3], [4], [5], [6], [7]])
    same = info_nce(image[[0, 0, 2, 3]], text[[0, 0, 2, 3, 4, 5, 6, 7]], twins, scale)
    assert same.item() == pytest.approx(2 * 0.5 * torch.tensor(2.0).log().item(), abs=0.01)


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pool = LatentPool(
        torch.randn(50, 16, 8, 8, generator=generator).half(), torch.randint(5, (50,), generator=generator)
    )
    return Data(pool, torch.randn(6, 4, 32, generator=generator), torch.randn(6, 32, generator=generator))


def test_batches_lie_on_the_straight_path_and_drop_some_captions(data: Data):
    batches = [draw_batch(data, 0, step, torch.device("cpu")) for step in range(40)]
    for b in batches[:5]:
        x0 = b.x - b.sigma[:, None, None, None] * b.u
        distance = (x0[:, None] - data.pool.latents[None].float()).flatten(2).abs().amax(2)
        assert distance.amin(1).max() < 1e-3  # every x0 is one of the pool's latents
    dropped = torch.cat([b.label == data.empty for b in batches]).float()
    tolerance = 4 * (CAPTION_DROPOUT * (1 - CAPTION_DROPOUT) / len(dropped)) ** 0.5
    assert dropped.mean().item() == pytest.approx(CAPTION_DROPOUT, abs=tolerance)
    assert torch.equal(batches[3].x, draw_batch(data, 0, 3, torch.device("cpu")).x)


def test_guided_velocity_is_the_conditional_one_at_scale_one_and_the_empty_one_at_scale_zero(data: Data):
    torch.manual_seed(0)
    transformer = new_transformer(32).eval()
    nn.init.normal_(transformer.proj_out.weight, std=0.1)
    b = draw_batch(data, 0, 0, torch.device("cpu"))
    with torch.no_grad():
        v = velocity(transformer, data, b, b.label)
        v_empty = velocity(transformer, data, b, torch.full_like(b.label, data.empty))
    torch.testing.assert_close(guided_velocity(transformer, data, b, 1.0), v)
    torch.testing.assert_close(guided_velocity(transformer, data, b, 0.0), v_empty)
    torch.testing.assert_close(guided_velocity(transformer, data, b, 3.0), 3 * v - 2 * v_empty, rtol=1e-3, atol=1e-4)


def test_distillation_moves_the_student_towards_its_guided_self(data: Data, tmp_path: Path):
    torch.manual_seed(0)
    student = new_transformer(32)
    nn.init.normal_(student.proj_out.weight, std=0.1)
    b = draw_batch(data, 1, 999, torch.device("cpu"))
    target = guided_velocity(student.eval(), data, b)

    def error() -> float:
        with torch.no_grad():
            return (velocity(student, data, b, b.label) - target).square().mean().item()

    before = error()
    distil_guidance(student, data, tmp_path, 0, quiet, FitPlan("distil", steps=12, lr=1e-3, warmup=2))
    assert error() < 0.7 * before


def test_every_scene_of_the_crosses_stage_has_a_cross_that_may_be_small():
    rng = np.random.default_rng(0)
    captions = draw_crosses(24, rng)
    assert len(captions) == 24
    for caption in captions:
        assert any(o.shape == "cross" and o.size != "large" for o in caption.objects), caption.text
        assert not is_compositional(caption)


def test_no_caption_of_the_retrieval_measure_is_true_of_another_scene():
    images, captions = exclusive_captions(12, np.random.default_rng(0))
    for i, caption in enumerate(captions):
        true_of = [v.exact for v in judge_images(images.numpy(), [caption] * len(captions))]
        assert true_of == [j == i for j in range(len(captions))], caption.text
