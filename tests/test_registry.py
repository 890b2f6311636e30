from __future__ import annotations

from pathlib import Path

import pytest

from flowbench.algorithm import Algorithm
from flowbench.errors import UsageError, did_you_mean
from flowbench.registry import Registry, algorithms, load_plugin_file, register_algorithm, register_reward, rewards
from flowbench.reward import Reward

pytestmark = pytest.mark.usefixtures("clean_registry")

REWARD = """
import torch
from flowbench.reward import Reward, register_reward

@register_reward("{name}", source="here", licence="none", range=(0.0, 1.0), differentiable=False)
class Mine(Reward):
    '''What it is, in a line.

    More words.
    '''
    def score(self, images, prompts):
        return images.mean((1, 2, 3))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def make_package(folder: Path, name: str, entry_points: str, code: str) -> None:
    """An installed package as pip leaves it: a module beside its .dist-info."""
    write(folder / f"{name}.py", code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(info / "entry_points.txt", entry_points)


def test_a_near_name_is_suggested():
    assert did_you_mean("acflw", ["acflow", "ddpo"]) == "; did you mean 'acflow'?"


def test_a_far_name_gets_the_list():
    assert did_you_mean("zzz", ["ddpo", "acflow"]) == "; there are: acflow, ddpo"
    assert did_you_mean("zzz", []) == "; there are: none"


@pytest.mark.parametrize(("registry", "wrong", "right"), [(algorithms, "ddop", "ddpo"), (rewards, "oracel", "oracle")])
def test_a_misspelt_name_is_answered_with_the_nearest(registry: Registry, wrong: str, right: str):
    with pytest.raises(UsageError, match=f"unknown {registry.kind} '{wrong}'; did you mean '{right}'"):
        registry.get(wrong)


def test_every_built_in_plugin_loads_under_its_own_name():
    assert {"acflow", "ddpo", "orw-cfm-w2", "refl"} <= set(algorithms.names())
    assert {"clip", "jpeg", "oracle"} <= set(rewards.names())
    for registry in (algorithms, rewards):
        for name in registry.names():
            assert registry.get(name).info.name == name
            assert len(registry.get(name).info.summary) > 10


def test_two_classes_cannot_share_a_name():
    @register_algorithm("twice", paper="none", needs=set())
    class One(Algorithm): ...

    with pytest.raises(UsageError, match=r"algorithm 'twice' is defined twice: in .*; rename one"):

        @register_algorithm("twice", paper="none", needs=set())
        class Two(Algorithm): ...

    assert algorithms.get("twice").cls is One


def test_two_rewards_cannot_share_a_name():
    arguments = {"source": "here", "licence": "none", "range": (0.0, 1.0), "differentiable": False}

    @register_reward("double", **arguments)
    class One(Reward): ...

    with pytest.raises(UsageError, match="reward 'double' is defined twice"):

        @register_reward("double", **arguments)
        class Two(Reward): ...


def test_a_plugin_cannot_take_a_built_in_name(tmp_path: Path):
    path = write(tmp_path / "mine.py", REWARD.format(name="jpeg"))
    with pytest.raises(UsageError, match="reward 'jpeg' is defined twice"):
        load_plugin_file(path)
    del rewards.loaded["jpeg"]  # as in a process that has not needed it yet
    with pytest.raises(UsageError, match=r"reward 'jpeg' is defined twice: in flowbench\.rewards\.jpeg and in"):
        load_plugin_file(path)


def test_an_unknown_need_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="needs 'logprob', which is unknown; did you mean 'log_prob'"):

        @register_algorithm("needy", paper="none", needs={"logprob"})
        class Needy(Algorithm): ...


def test_a_plugin_file_registers_its_reward_with_the_docstrings_first_line(tmp_path: Path):
    load_plugin_file(write(tmp_path / "mine.py", REWARD.format(name="mine")))
    assert "mine" in rewards.names()
    assert rewards.get("mine").info.summary == "What it is, in a line."


def test_a_plugin_file_may_be_loaded_again_and_then_counts_anew(tmp_path: Path):
    path = write(tmp_path / "mine.py", REWARD.format(name="mine"))
    load_plugin_file(path)
    first = rewards.get("mine").cls
    load_plugin_file(path)
    assert rewards.get("mine").cls is not first


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("x = 1\n", "registers nothing"),
        ("import flowbench_absent\n", "fails on import: ModuleNotFoundError"),
        ("def broken(:\n", "fails on import: SyntaxError"),
    ],
)
def test_a_useless_plugin_file_is_named_with_its_fault(tmp_path: Path, content: str, complaint: str):
    path = write(tmp_path / "useless.py", content)
    with pytest.raises(UsageError, match=complaint) as raised:
        load_plugin_file(path)
    assert str(path) in str(raised.value)


def test_a_missing_plugin_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"absent\.py' does not exist"):
        load_plugin_file(tmp_path / "absent.py")


def test_a_plugin_file_must_be_python(tmp_path: Path):
    with pytest.raises(UsageError, match=r"must end in \.py"):
        load_plugin_file(write(tmp_path / "mine.txt", "x = 1\n"))


def test_an_installed_package_is_known_before_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "raise RuntimeError('imported too early')\n"
    make_package(tmp_path, "early_package", "[flowbench.rewards]\nearly = early_package\n", code)
    monkeypatch.syspath_prepend(tmp_path)
    assert "early" in rewards.names()


def test_an_installed_package_supplies_its_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_package(tmp_path, "good_package", "[flowbench.rewards]\ngood = good_package\n", REWARD.format(name="good"))
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.get("good").cls.__module__ == "good_package"


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_package(tmp_path, "bad_package", "[flowbench.rewards]\nbad = bad_package\n", "import flowbench_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"reward 'bad' \(bad_package\) cannot be imported: .*flowbench_absent"):
        rewards.get("bad")


def test_a_package_that_fails_on_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_package(tmp_path, "sad_package", "[flowbench.rewards]\nsad = sad_package\n", "1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"reward 'sad' \(sad_package\) cannot be imported: .*division by zero"):
        rewards.get("sad")


def test_a_package_without_the_promised_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_package(tmp_path, "odd_package", "[flowbench.rewards]\nodd = odd_package\n", REWARD.format(name="even"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="registers no reward of that name"):
        rewards.get("odd")


def test_two_packages_cannot_claim_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("first_package", "second_package"):
        make_package(tmp_path, name, f"[flowbench.rewards]\nclaimed = {name}\n", REWARD.format(name="claimed"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"'claimed' is claimed by (first|second)_package and (first|second)_package"):
        rewards.get("claimed")
