"""YAML files: read once and the same everywhere, or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbench.config import load_run_config
from flowbench.errors import UsageError
from flowbench.experiments.suite import load_suite
from flowbench.experiments.tuning.files import read_chosen
from flowbench.models.presets import load_preset
from flowbench.reading.documents import MAX_BYTES, DocumentError, parse_yaml, read_yaml
from flowbench.settings import read_config_file
from flowbench.workloads import load_workload

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 9)
)


def test_plain_data_and_aliases_are_read():
    assert parse_yaml("a: [1, 2.5, true, null, text]\nb: {c: x}\n") == {
        "a": [1, 2.5, True, None, "text"],
        "b": {"c": "x"},
    }
    assert parse_yaml("a: &one {x: 1}\nb: *one\nc: {<<: *one, x: 2}\n") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands twice, first in line 1; keep one"),
        ("s:\n  x: 1\n  y: {k: 1, k: 2}\n", "line 3: 'k' stands twice, first in line 3"),
        ("yes: 1\ntrue: 2\n", "line 2: 'true' stands twice"),
        ("a: [\n", "is not YAML: line 2: "),
        ("a: 'x\n", "is not YAML: line 2: found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "is not YAML: line 2: but found another document"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML: line 1: could not determine a constructor"),
        ("a: &a [*a]\n", "line 1: contains itself"),
        ("a: " + "[" * 40 + "]" * 40, "is nested more than 32 deep"),
        ("a: " + "[" * 5000, "is nested more than 32 deep"),
        (BOMB, "holds more than 100000 values"),
        ("a: 2026-13-41\n", "is not YAML: month must be in 1..12"),
        ("\x00", "is not YAML: "),
        ("a: 1\n" + " " * MAX_BYTES, "is larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_plain_bounded_yaml_is_refused_in_one_line(text: str, complaint: str):
    with pytest.raises(DocumentError) as raised:
        parse_yaml(text)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_are_utf8_with_or_without_a_mark(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert read_yaml(path) == {"a": "é"}
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(DocumentError, match="line 2 is not UTF-8"):
        read_yaml(path)
    with pytest.raises(DocumentError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("read", [read_config_file, load_run_config, read_chosen, *(
    lambda path, load=load: load(str(path)) for load in (load_preset, load_suite, load_workload)
)])  # fmt: skip
@pytest.mark.parametrize("content", [b"seed: 1\nname: x\nseed: 2\n", b"seed: \xff", b"[1, 2]", b"", b"3", b"seed: ["])
def test_every_kind_of_file_is_read_by_the_one_reader(read: object, content: bytes, tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    if read is read_config_file and not content:
        assert read_config_file(path) == {}
        return
    with pytest.raises(UsageError, match=r"file\.yaml") as raised:
        read(path)  # type: ignore[operator]
    assert "\n" not in str(raised.value)
    if b"seed: 2" in content:
        assert "line 3: 'seed' stands twice" in str(raised.value)
