"""Readers of prompt files: what people have is read as it is meant, and what fits no format is refused by line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flowbench.errors import UsageError
from flowbench.prompts import Prompt, read_prompts

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    'the words "Fly an airplane"\tOutdoor Scenes\tComplex\t\n'
    '"G I G G L E" painted on a wall\tOutdoor Scenes\tWriting & Symbols\t\n'
)
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [], "prompt": "a photo of two cats"},
]


def read(path: Path, content: str | bytes) -> tuple[Prompt, ...]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path)


def test_plain_text_has_a_prompt_a_line(tmp_path: Path):
    prompts = read(tmp_path / "a.txt", 'a cat\na\tdog, "two"\na bird')
    assert prompts == ("a cat", 'a\tdog, "two"', "a bird")
    assert [p.category for p in prompts] == [""] * 3


def test_parti_prompts_are_read_with_their_categories_and_quote_marks(tmp_path: Path):
    bond, words, giggle = read(tmp_path / "PartiPrompts.tsv", PARTI)
    assert (bond, bond.category) == ("bond", "Abstract")
    assert bond.metadata == {"Challenge": "Basic", "Note": "Biology-inspired concepts with multiple meanings"}
    assert words == 'the words "Fly an airplane"'
    assert words.metadata == {"Challenge": "Complex"}
    assert giggle == '"G I G G L E" painted on a wall'


def test_draw_bench_is_read_with_quoted_commas(tmp_path: Path):
    text = 'Prompts,Category\nA red car.,Colors\n"A pear, cut in ""halves""\nand a bowl.",Descriptions\nA sign.,Text\n'
    car, pear, sign = read(tmp_path / "drawbench.csv", text)
    assert (car, car.category, sign.category) == ("A red car.", "Colors", "Text")
    assert pear == 'A pear, cut in "halves"\nand a bowl.'


def test_genevals_metadata_arrives_whole(tmp_path: Path):
    bench, cats = read(tmp_path / "metadata.jsonl", "".join(json.dumps(e) + "\n" for e in GENEVAL))
    assert (bench, bench.category) == ("a photo of a bench", "single_object")
    assert bench.metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    assert cats.metadata["exclude"] == []


def test_a_table_without_header_is_category_and_prompt(tmp_path: Path):
    prompts = read(tmp_path / "a.tsv", 'single\ta cat\ncounting\t"two" dogs \n')
    assert [(p.category, p.text) for p in prompts] == [("single", "a cat"), ("counting", '"two" dogs')]


@pytest.mark.parametrize("header", ["prompt", "PROMPT", "Prompts", "caption", "Text"])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_the_prompts_column_has_usual_names_in_any_case_and_place(header: str, suffix: str, tmp_path: Path):
    mark = {"tsv": "\t", "csv": ","}[suffix]
    lines = [("id", "Tag", header), ("1", "animals", "a cat")]
    (prompt,) = read(tmp_path / f"a.{suffix}", "".join(mark.join(line) + "\n" for line in lines))
    assert (prompt, prompt.category, prompt.metadata["id"]) == ("a cat", "animals", "1")


def test_a_column_named_text_beside_the_prompt_is_what_is_to_be_written(tmp_path: Path):
    (prompt,) = read(tmp_path / "a.jsonl", '{"text": "EXIT", "prompt": "a sign"}\n')
    assert (prompt, prompt.metadata) == ("a sign", {"text": "EXIT"})


def test_only_newlines_end_lines(tmp_path: Path):
    separated = "a cat\u2028asleep\u0085now\x0b\x1cindeed"
    assert read(tmp_path / "a.txt", separated + "\r\na dog\r\n") == (separated, "a dog")
    assert read(tmp_path / "a.tsv", f"single\t{separated}\r\nsingle\ta dog\r\n") == (separated, "a dog")
    assert read(tmp_path / "a.csv", f"prompt\r\n{separated}\r\na dog\r\n") == (separated, "a dog")
    entry = json.dumps({"prompt": separated}, ensure_ascii=False)
    assert read(tmp_path / "a.jsonl", entry + '\r\n{"prompt": "a dog"}\r\n') == (separated, "a dog")


@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt_or_column(suffix: str, tmp_path: Path):
    text = {"txt": "a cat\n", "tsv": "prompt\na cat\n", "csv": "prompt\na cat\n", "jsonl": '{"prompt": "a cat"}\n'}
    assert read(tmp_path / f"a.{suffix}", b"\xef\xbb\xbf" + text[suffix].encode()) == ("a cat",)


def test_a_reference_is_a_path_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"")
    monkeypatch.chdir("/")
    cat, dog = read(tmp_path / "a.csv", "prompt,reference\na cat,pictures/cat.png\na dog,\n")
    assert cat.reference == tmp_path / "pictures" / "cat.png"
    assert "reference" not in cat.metadata
    assert dog.reference is None
    with pytest.raises(UsageError, match=r"a\.csv line 2: there is no reference image 'no\.png' beside the file"):
        read(tmp_path / "a.csv", "prompt,reference\na cat,no.png\n")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "", "line 1 holds no prompt; expected one prompt per line"),
        ("a.tsv", "", "line 1 holds no prompt; expected a header with a column 'prompt', or lines of"),
        ("a.tsv", "Prompt\tCategory\n", "line 1 holds no prompt"),
        ("a.csv", "", "line 1 is no header; expected a header with a column prompt, prompts, caption or text"),
        ("a.jsonl", "\n", "line 1 holds no prompt"),
        ("a.txt", "a cat\n\na dog\n", "line 2: the prompt is empty"),
        ("a.txt", "a cat\n \n", "line 2: the prompt is empty"),
        ("a.tsv", "single\ta cat\nsingle\t \n", "line 2: the prompt is empty"),
        ("a.csv", 'prompt,category\n"",x\n', "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": null}\n', "line 1: the prompt is empty"),
        ("a.jsonl", '{"prompt": ["a"]}\n', "line 1: 'prompt' is [\"a\"]; expected a string"),
        ("a.jsonl", '{"prompt": "a", "category": 3}\n', "line 1: 'category' is 3; expected a string"),
        ("a.jsonl", '{"caption_en": "a"}\n', "line 1 has no prompt; expected a key prompt, prompts, caption or text"),
        ("a.jsonl", '{"prompt": "a"}\n"a"\n', "line 2 is not an object"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1 is not JSON: a key stands twice"),
        ("a.jsonl", '{"prompt": "a", "Prompt": "b"}\n', "line 1 has both 'prompt' and 'Prompt'"),
        ("a.jsonl", '{"prompt": "a", "score": NaN}\n', "line 1 is not JSON: NaN is no JSON value"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1: the prompt holds half a character"),
        ("a.tsv", "single\ta cat\na dog\n", "line 2 is not 'category<TAB>prompt'"),
        ("a.tsv", "single\ta cat\tbasic\n", "line 1 is not 'category<TAB>prompt', nor a header with a column 'prompt'"),
        ("a.tsv", "Prompt\tNote\na\tb\tc\n", "line 2 has 3 columns; expected 2 as in the header: Prompt, Note"),
        ("a.tsv", "text\ta sign that says EXIT\n", "line 1 may be a header or a first prompt; begin the file with"),
        ("a.csv", "prompt,note\na cat\n", "line 2 has 1 columns; expected 2"),
        ("a.csv", 'prompt,note\n"a, b\nc",d\ne\n', "line 4 has 1 columns; expected 2"),
        ("a.csv", 'prompt\n"a cat\n', "line 2 is no row of a table"),
        ("a.csv", "a cat,animals\n", "line 1 is no header"),
        ("a.csv", "prompt;category\na cat;animals\n", "line 1 is no header"),
        ("a.csv", ",prompt\n0,a cat\n", "line 1: column 1 has no name"),
        ("a.csv", "prompt,note,note\na,b,c\n", "line 1: column 'note' stands twice"),
        ("a.csv", "prompt,Prompt\na,b\n", "line 2 has both 'prompt' and 'Prompt'"),
        ("a.txt", b"a cat\nd\xfcnn\n", "line 2 is not UTF-8 text"),
        ("a.parquet", "", "is no file of prompts; its name must end in .txt, .tsv, .csv, .jsonl"),
    ],
)
def test_what_fits_no_format_is_refused_by_file_and_line(
    name: str, content: str | bytes, complaint: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=rf"{re.escape(name)}'? {re.escape(complaint)}") as raised:
        read(tmp_path / name, content)
    assert len(str(raised.value).splitlines()) == 1


def test_a_line_of_a_header_names_columns_even_if_two(tmp_path: Path):
    for header, row in (("Category\tPrompt", "x\ta cat"), ("image\tcaption", "x\ta cat"), ("text\ttag", "a cat\tx")):
        (prompt,) = read(tmp_path / "a.tsv", f"{header}\n{row}\n")
        assert prompt == "a cat"


def test_a_file_that_is_absent_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"prompt file '.*a\.txt' cannot be read: No such file"):
        read_prompts(tmp_path / "a.txt")
