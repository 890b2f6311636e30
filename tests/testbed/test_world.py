from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from flowbench.builders.data import draw_captions, training_captions
from flowbench.prompts import FOLDER, load_split
from flowbench.testbeds.shapes.splits import write_splits
from flowbench.testbeds.shapes.world import (
    CATEGORIES,
    COLORS,
    IMAGE_SIZE,
    PALETTE,
    RADII,
    RELATIONS,
    SHAPES,
    SIZES,
    ObjectSpec,
    Scenes,
    all_captions,
    coverage,
    describe,
    is_compositional,
    mutate,
    parse,
    render,
    sample_scenes,
)

SPLITS = ("train", "test", "compositional")


def one_object(shape: str, color: str = "red", radius: float = 5.0, x: float = 16.0, y: float = 16.0) -> Scenes:
    """A scene of one object on a background of 0.1, the other slots empty."""
    column = np.zeros((1, 4), dtype=np.float32)
    shapes = np.full((1, 4), -1)
    shapes[0, 0] = SHAPES.index(shape)
    colors = np.full((1, 4), COLORS.index(color))
    place = [column + value for value in (radius, x, y)]
    return Scenes(shapes, colors, *place, np.full(1, 0.1, dtype=np.float32))


@pytest.fixture(scope="module")
def captions() -> list:
    return all_captions()


@pytest.fixture(scope="module")
def drawn(captions: list) -> tuple:
    """2,000 captions of all categories and a scene of each."""
    rng = np.random.default_rng(11)
    chosen = [captions[i] for i in rng.integers(len(captions), size=2000)]
    return chosen, sample_scenes(chosen, rng)


def test_every_caption_parses_back_to_what_it_describes(captions: list):
    assert len(captions) == 3084
    for caption in captions:
        assert parse(caption.text) == caption
        assert describe(caption.category, caption.objects, caption.relation) == caption


def test_no_two_captions_share_a_text(captions: list):
    assert len({c.text for c in captions}) == len(captions)


def test_every_category_has_captions(captions: list):
    assert {c.category for c in captions} == set(CATEGORIES)


def test_captions_say_what_the_grammar_means():
    assert parse("a small red circle").objects == (ObjectSpec("circle", "red", "small"),)
    assert parse("Three green crosses.").objects == (ObjectSpec("cross", "green"),) * 3
    position = parse("an orange square left of a blue cross")
    assert position.relation == "left of"
    assert position.objects == (ObjectSpec("square", "orange"), ObjectSpec("cross", "blue"))


@pytest.mark.parametrize("text", ["", "a", "a cat", "a red", "five circles", "a red circle beside a square"])
def test_a_text_outside_the_grammar_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match=r"cannot read the prompt .* write for example 'a red circle'"):
        parse(text)


def test_splits_are_disjoint_and_without_repetition():
    texts = [[p.text for p in load_split("shapes", name).prompts] for name in SPLITS]
    for split in texts:
        assert len(set(split)) == len(split)
    for a, b in combinations(texts, 2):
        assert not set(a) & set(b)


def test_splits_hold_captions_of_their_category():
    for name in SPLITS:
        split = load_split("shapes", name)
        assert {p.category for p in split.prompts} >= set(CATEGORIES) - {"colors"}
        assert all(parse(p.text).category == p.category for p in split.prompts)


def test_only_the_compositional_split_is_compositional():
    for name in SPLITS:
        held_out = {is_compositional(parse(p.text)) for p in load_split("shapes", name).prompts}
        assert held_out == {name == "compositional"}


def test_no_held_out_combination_is_in_the_pre_training_data():
    drawn = draw_captions(5000, np.random.default_rng(0))
    assert not any(is_compositional(c) for c in drawn)
    assert not any(is_compositional(c) for pool in training_captions().values() for c in pool)
    held_out = {parse(p.text) for p in load_split("shapes", "compositional").prompts}
    assert not held_out & {c for pool in training_captions().values() for c in pool}


def test_every_word_of_the_compositional_split_occurs_in_the_training_split():
    train, compositional = (
        {w for p in load_split("shapes", name).prompts for w in p.text.split()} for name in ("train", "compositional")
    )
    assert compositional <= train


def test_the_split_files_are_what_the_splitter_writes(tmp_path: Path):
    write_splits(tmp_path)
    for name in SPLITS:
        assert (tmp_path / f"{name}.tsv").read_bytes() == (FOLDER / "shapes" / f"{name}.tsv").read_bytes()


def test_objects_neither_overlap_nor_leave_the_picture(drawn: tuple):
    _, scenes = drawn
    centers = np.arange(-2, IMAGE_SIZE + 2) + 0.5
    inside = np.pad(np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool), 2)
    for i in range(len(scenes)):
        present = np.flatnonzero(scenes.shape[i] >= 0)
        masks = [
            coverage(
                int(scenes.shape[i, j]),
                centers[None, :] - scenes.x[i, j],
                centers[:, None] - scenes.y[i, j],
                scenes.radius[i, j],
            )
            for j in present
        ]
        for a, b in combinations(masks, 2):
            assert np.minimum(a, b).sum() < 0.25  # pixels, of soft edges
        for mask in masks:
            assert mask[inside].sum() > 10
            assert mask[~inside].sum() < 0.1


def test_scenes_show_what_their_captions_say(drawn: tuple):
    for i, caption in enumerate(drawn[0]):
        scenes = drawn[1]
        assert (scenes.shape[i] >= 0).sum() == len(caption.objects)
        for j, spec in enumerate(caption.objects):
            assert SHAPES[scenes.shape[i, j]] == spec.shape
            if spec.color:
                assert COLORS[scenes.color[i, j]] == spec.color
            if spec.size:
                low, high = RADII[spec.size]
                assert low - 1e-5 <= scenes.radius[i, j] <= high + 1e-5


def test_relations_hold_along_their_own_axis(drawn: tuple):
    seen = set()
    for i, caption in enumerate(drawn[0]):
        if not caption.relation:
            continue
        seen.add(caption.relation)
        dx, dy = (v[i, 1] - v[i, 0] for v in (drawn[1].x, drawn[1].y))
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[caption.relation]
        along, across = (sign * dx, dy) if axis == 0 else (sign * dy, dx)
        assert along > abs(across)
    assert seen == set(RELATIONS)


def test_what_a_caption_leaves_unsaid_varies():
    scenes = sample_scenes([parse("a circle")] * 600, np.random.default_rng(0))
    assert set(scenes.color[:, 0]) == set(range(len(COLORS)))
    assert 0.3 < (scenes.radius[:, 0] > 4.6).mean() < 0.7
    assert 0.3 < (scenes.background > 0.5).mean() < 0.7
    assert scenes.x[:, 0].std() > 4
    assert scenes.y[:, 0].std() > 4


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 25),
        ("square", (2 * 0.92 * 5) ** 2),
        ("triangle", 3 * 3**0.5 * (0.62 * 5) ** 2),  # equilateral with this inradius
        ("cross", 2 * (2 * 0.36 * 5) * 10 - (2 * 0.36 * 5) ** 2),
    ],
)
def test_rendered_area_is_the_shapes_area(shape: str, area: float):
    image = render(one_object(shape, x=15.8, y=16.3))[0]
    paint = PALETTE[COLORS.index("red")]
    covered = ((image - 0.1) / (paint - np.float32(0.1))[:, None, None]).mean(0)
    assert covered.sum() == pytest.approx(area, rel=0.03)


def test_rendered_position_is_where_the_scene_says():
    image = render(one_object("circle", color="blue", x=10.25, y=20.75))[0]
    weight = image[2] - 0.1
    centers = np.arange(IMAGE_SIZE) + 0.5
    assert (weight.sum(0) @ centers) / weight.sum() == pytest.approx(10.25, abs=0.02)
    assert (weight.sum(1) @ centers) / weight.sum() == pytest.approx(20.75, abs=0.02)


def test_rendered_pixels_stay_in_the_unit_interval(drawn: tuple):
    images = render(drawn[1])
    assert images.dtype == np.float32
    assert images.shape == (2000, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert 0 <= images.min() <= images.max() <= 1


def test_the_renderer_makes_two_thousand_images_per_second(drawn: tuple):
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        render(drawn[1])
        times.append(time.perf_counter() - begun)
    assert 2000 / min(times) >= 2000


def test_a_seed_means_the_same_scenes(captions: list):
    one, two = (render(sample_scenes(captions[:200], np.random.default_rng(5))) for _ in range(2))
    other = render(sample_scenes(captions[:200], np.random.default_rng(6)))
    assert (one == two).all()
    assert (one != other).any()


def test_a_mutated_caption_changes_exactly_one_thing(captions: list):
    rng = np.random.default_rng(1)
    for caption in captions:
        other = mutate(caption, rng)
        assert other.text != caption.text
        assert other.category == caption.category
        changed = int(other.relation != caption.relation)
        if len(other.objects) != len(caption.objects):
            assert caption.category == "counting"
            changed += 1
        elif caption.category == "counting":
            changed += differences(caption.objects[0], other.objects[0])
        else:
            changed += sum(differences(a, b) for a, b in zip(caption.objects, other.objects, strict=True))
        assert changed == 1, (caption.text, other.text)


def differences(a: ObjectSpec, b: ObjectSpec) -> int:
    assert (a.color is None) == (b.color is None)
    assert (a.size is None) == (b.size is None)
    assert b.size is None or b.size in SIZES
    return sum(getattr(a, name) != getattr(b, name) for name in ("shape", "color", "size"))
