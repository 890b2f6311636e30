"""Prompt sets: their files are what their generators write, and their splits keep what they promise."""

from collections import Counter
from pathlib import Path

import pytest

from flowbench.config import EvaluationConfig
from flowbench.errors import UsageError
from flowbench.models.presets import load_preset, preset_names
from flowbench.prompts import FOLDER, load_split, objects, prompt_sets, splits, spread
from flowbench.testbeds.shapes import splits as shapes

SPLITS = ("train", "test", "compositional")


@pytest.mark.parametrize(("name", "write"), [("objects", objects.write_splits), ("shapes", shapes.write_splits)])
def test_the_files_under_version_control_are_what_the_generator_writes(name: str, write, tmp_path: Path):
    write(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.tsv").read_bytes() == (FOLDER / name / f"{split}.tsv").read_bytes()


@pytest.mark.parametrize("name", prompt_sets())
def test_no_prompt_stands_in_two_splits_or_twice_in_one(name: str):
    texts = Counter(p.text for split in splits(FOLDER / name) for p in load_split(name, split).prompts)
    assert max(texts.values()) == 1


def test_objects_has_all_six_categories_equally_often():
    for split, count in (("train", 50), ("test", 20), ("compositional", 16)):
        categories = Counter(p.category for p in load_split("objects", split).prompts)
        assert categories == dict.fromkeys(objects.CATEGORIES, count)


def test_only_the_compositional_split_of_objects_has_held_out_pairs_and_pairings():
    held_out = {f"a photo of {p.text}": p.held_out for c in objects.CATEGORIES for p in objects.all_phrases(c)}
    for split in SPLITS:
        texts = [p.text for p in load_split("objects", split).prompts]
        assert {held_out[text] for text in texts} == {split == "compositional"}


def test_every_presets_prompt_set_has_the_splits_that_its_runs_use():
    for name in preset_names():
        preset = load_preset(name)
        for split in ("train", *EvaluationConfig(**preset.evaluation).splits):
            assert load_split(preset.prompts, split).prompts


def test_spread_takes_the_categories_in_turn():
    chosen = spread(load_split("objects", "test"), 12)
    assert Counter(p.category for p in chosen) == dict.fromkeys(objects.CATEGORIES, 2)


def test_an_unknown_set_or_split_names_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'objects'"):
        load_split("object", "test")
    with pytest.raises(UsageError, match="did you mean 'test'"):
        load_split("objects", "tset")


def test_a_line_without_a_tab_is_named(tmp_path: Path):
    (tmp_path / "test.tsv").write_text("single\ta cat\na dog\n", encoding="utf-8")
    with pytest.raises(UsageError, match="line 2"):
        load_split(str(tmp_path), "test")
