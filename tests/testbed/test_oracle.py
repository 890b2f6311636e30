from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import ndimage

from flowbench.testbeds.shapes.oracle import judge, judge_images, see
from flowbench.testbeds.shapes.world import all_captions, mutate, parse, render, sample_scenes

SCENES = 2000


@pytest.fixture(scope="module")
def fresh() -> tuple:
    """Captions of all categories, and the picture of a fresh scene of each."""
    rng = np.random.default_rng(2024)
    pool = all_captions()
    categories = sorted({c.category for c in pool})
    by_category = {k: [c for c in pool if c.category == k] for k in categories}
    captions = [by_category[k][rng.integers(len(by_category[k]))] for k in rng.choice(categories, SCENES)]
    return captions, render(sample_scenes(captions, rng))


def mean_soft(images: np.ndarray, captions: list) -> float:
    return float(np.mean([v.soft for v in judge_images(images.astype(np.float32), captions)]))


def test_the_oracle_says_yes_to_fresh_scenes(fresh: tuple):
    captions, images = fresh
    verdicts = judge_images(images, captions)
    assert np.mean([v.exact for v in verdicts]) >= 0.995
    assert np.mean([v.soft for v in verdicts]) >= 0.95


def test_the_oracle_says_no_when_one_said_attribute_is_wrong(fresh: tuple):
    captions, _ = fresh
    rng = np.random.default_rng(7)
    images = render(sample_scenes([mutate(c, rng) for c in captions], rng))
    assert np.mean([not v.exact for v in judge_images(images, captions)]) >= 0.995


def test_the_soft_score_of_a_true_scene_beats_that_of_a_wrong_one(fresh: tuple):
    captions, images = (part[:400] for part in fresh)
    rng = np.random.default_rng(8)
    wrong = judge_images(render(sample_scenes([mutate(c, rng) for c in captions], rng)), captions)
    true = judge_images(images, captions)
    assert np.mean([t.soft > w.soft for t, w in zip(true, wrong, strict=True)]) >= 0.98


def test_the_soft_score_falls_gracefully_with_blur(fresh: tuple):
    captions, images = (part[:200] for part in fresh)
    curve = [mean_soft(ndimage.gaussian_filter(images, (0, 0, s, s)), captions) for s in (0, 0.5, 0.8, 1.2, 1.8, 3.0)]
    assert_graceful(curve)


def test_the_soft_score_falls_gracefully_with_noise(fresh: tuple):
    captions, images = (part[:200] for part in fresh)
    noise = np.random.default_rng(3).standard_normal(images.shape)
    curve = [mean_soft(np.clip(images + s * noise, 0, 1), captions) for s in (0, 0.03, 0.06, 0.1, 0.15, 0.25)]
    assert_graceful(curve)


def assert_graceful(curve: list[float]) -> None:
    """Strictly falling from near 1 to near 0, without one cliff that takes it all."""
    steps = -np.diff(curve)
    assert (steps > 0).all(), curve
    assert curve[0] > 0.95
    assert curve[-1] < 0.35
    assert steps.max() < 0.6 * (curve[0] - curve[-1]), curve


def test_the_oracle_reads_positions_sizes_and_colors_to_the_pixel(fresh: tuple):
    captions = [c for c in fresh[0] if c.category == "single"][:200]
    scenes = sample_scenes(captions, np.random.default_rng(4))
    for i, view in enumerate(see(render(scenes))):
        (seen,) = view.objects
        assert abs(seen.x - scenes.x[i, 0]) < 1
        assert abs(seen.y - scenes.y[i, 0]) < 1
        assert abs(seen.radius - scenes.radius[i, 0]) < 0.7


def test_surplus_objects_are_not_the_captions_scene():
    rng = np.random.default_rng(0)
    two = render(sample_scenes([parse("a red circle and a blue square")] * 50, rng))
    verdicts = judge_images(two, [parse("a red circle")] * 50)
    assert not any(v.exact for v in verdicts)
    assert all(0 < v.soft < 0.7 for v in verdicts)


def test_missing_objects_are_not_the_captions_scene():
    one = render(sample_scenes([parse("a red circle")] * 50, np.random.default_rng(0)))
    verdicts = judge_images(one, [parse("two red circles")] * 50)
    assert not any(v.exact for v in verdicts)
    assert all(0 < v.soft < 0.7 for v in verdicts)


def test_an_empty_picture_scores_zero():
    (verdict,) = judge_images(np.full((1, 3, 32, 32), 0.5, dtype=np.float32), [parse("a circle")])
    assert (verdict.exact, verdict.soft) == (False, 0.0)


def test_the_oracle_is_deterministic(fresh: tuple):
    captions, images = (part[:100] for part in fresh)
    assert judge_images(images, captions) == judge_images(images.copy(), captions)


def test_a_verdict_does_not_depend_on_the_other_pictures(fresh: tuple):
    captions, images = (part[:60] for part in fresh)
    together = judge_images(images, captions)
    assert [judge_images(images[i : i + 1], captions[i : i + 1])[0] for i in range(60)] == together


def test_a_verdict_does_not_depend_on_the_order_of_interchangeable_words(fresh: tuple):
    rng = np.random.default_rng(5)
    images = render(sample_scenes([parse("a red circle and a blue square")] * 30, rng))
    swapped = judge_images(images, [parse("a blue square and a red circle")] * 30)
    assert [v.exact for v in swapped] == [True] * 30


def test_a_picture_full_of_blobs_is_judged_without_delay():
    blocks = np.random.default_rng(0).random((2, 3, 8, 8)).astype(np.float32).repeat(4, 2).repeat(4, 3)
    views = see(blocks)
    assert min(len(view.objects) for view in views) > 15
    begun = time.perf_counter()
    for view in views:
        assert not judge(view, parse("four circles")).exact
        assert not judge(view, parse("a red circle left of a blue square")).exact
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 64, 64), (2, 1, 32, 32), (1, 32, 32, 3)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"images of shape \(N, 3, 32, 32\)"):
        see(np.zeros(shape, dtype=np.float32))
