"""Prompts and their sets: files are what their generators write, and splits keep what they promise."""

import copy
import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from flowbench.config import EvaluationConfig
from flowbench.errors import UsageError
from flowbench.models.presets import load_preset, preset_names
from flowbench.prompts import (
    FOLDER,
    Prompt,
    as_prompt,
    available_splits,
    load_split,
    locate,
    objects,
    present_splits,
    prompt_sets,
    save_split,
    splits,
    spread,
    whole_file,
)
from flowbench.testbeds.shapes import splits as shapes
from flowbench.testbeds.shapes.world import CATEGORIES, all_captions, is_compositional, parse

SPLITS = ("train", "test", "compositional")
# Published results rest on these files.
FROZEN = {"train": "6142da6c64475c57", "test": "8ca3d55110a0106c", "compositional": "267f89588bbe0ec8"}


def test_a_prompt_is_a_string_that_knows_more(tmp_path: Path):
    prompt = Prompt("a sign", "text", {"written": "EXIT", "objects": [{"class": "sign"}]}, tmp_path)
    assert prompt == "a sign"
    assert hash(prompt) == hash("a sign")
    assert {prompt: 1}["a sign"] == 1
    assert type(prompt.text) is str
    assert json.dumps([prompt]) == '["a sign"]'
    assert (prompt.category, prompt.metadata["written"], prompt.reference) == ("text", "EXIT", tmp_path)
    chosen = (Prompt("b"), prompt)[1:][0]
    for other in (chosen, copy.copy(prompt), copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert isinstance(other, Prompt)
        assert other == prompt
        assert (other.category, other.metadata, other.reference) == ("text", prompt.metadata, tmp_path)


def test_a_prompts_attributes_are_read_only():
    prompt, given = Prompt("a"), {"k": 1}
    for name in ("category", "metadata", "reference", "text"):
        with pytest.raises(AttributeError):
            setattr(prompt, name, "x")
    told = Prompt("a", metadata=given)
    with pytest.raises(TypeError):
        told.metadata["k"] = 2
    given["k"] = 2
    assert told.metadata == {"k": 1}


def test_a_plain_string_is_a_prompt_of_which_nothing_more_is_known():
    plain = as_prompt("a cat")
    assert (plain, plain.category, dict(plain.metadata), plain.reference) == ("a cat", "", {}, None)
    assert as_prompt(plain) is plain


def test_dev_leaves_the_other_files_of_shapes_as_they_were():
    for split, start in FROZEN.items():
        assert hashlib.sha256((FOLDER / "shapes" / f"{split}.tsv").read_bytes()).hexdigest().startswith(start)


def test_dev_of_shapes_is_unseen_meanings_of_seen_combinations():
    dev = [parse(p) for p in load_split("shapes", "dev").prompts]
    assert Counter(c.category for c in dev) == {"two": 9, "position": 26, "binding": 25}
    assert not any(is_compositional(c) for c in dev)
    meanings = {shapes._meaning(c) for c in dev}
    assert len(meanings) == len(dev)
    others = {shapes._meaning(parse(p)) for name in SPLITS for p in load_split("shapes", name).prompts}
    assert not meanings & others


def test_the_categories_that_dev_lacks_have_nothing_left():
    used = {p.text for name in ("train", "test") for p in load_split("shapes", name).prompts}
    left = Counter(c.category for c in all_captions() if c.text not in used and not is_compositional(c))
    assert {c for c in CATEGORIES if not left[c]} == {"single", "counting", "colors"}


@pytest.mark.parametrize(("name", "write"), [("objects", objects.write_splits), ("shapes", shapes.write_splits)])
def test_the_files_under_version_control_are_what_the_generator_writes(name: str, write, tmp_path: Path):
    write(tmp_path)
    for split in splits(FOLDER / name):
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


# --- folders and files --------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_has_a_file_of_any_format_per_split(tmp_path: Path):
    write(tmp_path / "train.tsv", "single\ta cat\n")
    write(tmp_path / "dev.jsonl", '{"prompt": "a dog"}\n')
    write(tmp_path / "test.csv", "prompt\na bird\n")
    write(tmp_path / "own.txt", "a fish\n")
    write(tmp_path / "README.md", "not a split")
    assert splits(tmp_path) == ["dev", "own", "test", "train"]
    loaded = [load_split(str(tmp_path), name) for name in splits(tmp_path)]
    assert [split.prompts for split in loaded] == [("a dog",), ("a fish",), ("a bird",), ("a cat",)]
    assert loaded[0].sha256 == hashlib.sha256((tmp_path / "dev.jsonl").read_bytes()).hexdigest()


def test_two_files_of_one_split_are_refused(tmp_path: Path):
    write(tmp_path / "test.tsv", "single\ta cat\n")
    write(tmp_path / "test.txt", "a cat\n")
    with pytest.raises(UsageError, match=r"two files of split 'test', test\.tsv and test\.txt; keep one"):
        load_split(str(tmp_path), "test")


def test_a_built_in_name_means_the_built_in_set_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("shapes") == "shapes"
    assert locate("./shapes") == str(tmp_path / "shapes")
    with pytest.raises(UsageError, match=r"unknown prompt set 'shape', .*did you mean 'shapes'"):
        locate("shape")


def test_a_file_is_cut_into_train_and_test_by_the_hash_of_each_text(tmp_path: Path):
    texts = [f"a picture of {k} things" for k in range(200)]
    path = write(tmp_path / "mine.txt", "".join(f"{t}\n" for t in texts + texts[:50]))
    train, test = (load_split(str(path), name) for name in ("train", "test"))
    assert available_splits(str(path)) == ["test", "train"]
    assert not set(train.prompts) & set(test.prompts)
    assert sorted(train.prompts + test.prompts) == sorted(texts + texts[:50])  # repetitions stay together
    assert 25 <= len(set(test.prompts)) <= 55
    fewer = write(tmp_path / "fewer.txt", "".join(f"{t}\n" for t in texts[::-1][:150]))
    assert set(load_split(str(fewer), "test").prompts) <= set(test.prompts)
    assert train.sha256 != test.sha256
    with pytest.raises(UsageError, match="has no split 'dev'"):
        load_split(str(path), "dev")


@pytest.mark.parametrize("count", range(3, 9))
def test_of_a_small_file_two_are_test_and_one_is_train(count: int, tmp_path: Path):
    path = write(tmp_path / "few.txt", "".join(f"prompt {k}\n" for k in range(count)))
    assert len(load_split(str(path), "test").prompts) >= 2
    assert load_split(str(path), "train").prompts


def test_two_prompts_are_too_few_to_cut(tmp_path: Path):
    path = write(tmp_path / "few.txt", "a\nb\na\n")
    with pytest.raises(UsageError, match=r"has 2 different prompts; .* at least 3"):
        load_split(str(path), "train")


def test_splits_that_a_set_lacks_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture):
    assert present_splits("points", ("test", "compositional")) == ("test",)
    assert caplog.messages == ["prompts 'points' have no split 'compositional'; evaluated on: test"]
    with pytest.raises(UsageError, match=r"have no split 'dev' to evaluate on; there are: test, train; choose with"):
        present_splits("points", ("dev",))


def test_a_kept_split_reads_back_with_everything_and_needs_no_original(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(b"a picture")
    entries = [
        {"prompt": "a sign", "tag": "text", "text": "EXIT", "objects": [{"n": 1}], "reference": "pictures/0.png"},
        {"prompt": "a cat\u2028asleep", "category": "single"},
    ]
    path = write(tmp_path / "test.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries))
    split = whole_file(path)
    save_split(split, tmp_path / "kept", with_references=True)
    (tmp_path / "pictures" / "0.png").unlink()
    path.unlink()
    again = load_split(str(tmp_path / "kept"), "test").prompts
    assert again == split.prompts
    assert [(p.category, p.metadata) for p in again] == [(p.category, p.metadata) for p in split.prompts]
    assert again[0].metadata == {"tag": "text", "text": "EXIT", "objects": [{"n": 1}]}
    assert again[0].reference is not None
    assert again[0].reference.read_bytes() == b"a picture"


def test_a_file_without_references_is_kept_byte_for_byte(tmp_path: Path):
    split = load_split("shapes", "test")
    save_split(split, tmp_path, with_references=True)
    assert load_split(str(tmp_path), "test").sha256 == split.sha256
