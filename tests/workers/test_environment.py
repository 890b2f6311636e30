from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
import torch

from flowbench.caches import home
from flowbench.errors import RunError, UsageError
from flowbench.registry import Plugin
from flowbench.scoring.workers.environment import MARKER, Environment, State, _note
from flowbench.scoring.workers.management import install, overview, remove, remove_all


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def everything_installed() -> set[tuple[str, str]]:
    return {(d.metadata["Name"], d.version) for d in distributions()}


def ask(environment: Environment, code: str) -> str:
    done = subprocess.run([str(environment.python), "-P", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_home_is_in_the_users_cache_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("FLOWBENCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache" / "flowbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "flowbench"


def test_an_overlay_has_its_own_packages_over_the_main_ones_which_stay_as_they_are(own_home: Path, wheels: Path):
    """One package that conflicts with the main environment's, and one that only the overlay has."""
    before = everything_installed()
    names = {"tinyrule": "1.0", "packaging": "0.1"}
    both = [f"{n} @ {(wheels / f'{n}-{v}-py3-none-any.whl').as_uri()}" for n, v in names.items()]
    environment = Environment(tuple(both))
    assert environment.state is State.ABSENT
    notes: list[str] = []
    environment.install("any", notes.append)
    assert environment.state is State.READY
    assert "installing 2 packages" in notes
    assert environment.versions() == names
    assert environment.megabytes < 1
    where = "__import__('importlib.util').util.find_spec('torch').origin"
    seen = ask(environment, f"import packaging, tinyrule; print(packaging.OLD, tinyrule.SEED, {where})")
    assert seen == f"True 7 {torch.__file__}"
    assert everything_installed() == before
    assert importlib.util.find_spec("tinyrule") is None
    environment.remove()
    assert environment.state is State.ABSENT
    assert not environment.folder.exists()


def test_an_interrupted_installation_is_known_and_completed(ruled: Plugin):
    environment = Environment(ruled.info.requirements)
    (environment.folder / MARKER).unlink()
    assert environment.state is State.INCOMPLETE
    with pytest.raises(RunError, match=r"of reward 'ruled' is incomplete; complete it with 'flowbench rewards install"):
        environment.check("ruled")
    (found,) = [o for o in overview() if o.info.name == "ruled"]
    assert found.state is State.INCOMPLETE
    (installed,) = install(["ruled"], lambda reward, note: None)
    assert installed.state is State.READY
    environment.check("ruled")


def test_an_environment_whose_python_is_gone_is_made_anew(own_home: Path, requirement: str):
    environment = Environment((requirement,))
    environment.folder.joinpath("bin").mkdir(parents=True)
    environment.python.symlink_to("/gone/python")
    assert environment.state is State.INCOMPLETE
    environment.install("any")
    assert environment.state is State.READY
    assert ask(environment, "import tinyrule; print(tinyrule.SEED)") == "7"


def test_an_environment_that_is_there_is_not_made_again(ruled: Plugin):
    assert install(["ruled"], lambda reward, note: pytest.fail(note))[0].state is State.READY


def test_what_pip_cannot_install_is_named_with_the_log(own_home: Path, tmp_path: Path):
    missing = (tmp_path / "missing-1.0-py3-none-any.whl").as_uri()
    environment = Environment((f"missing @ {missing}",))
    with pytest.raises(RunError, match=r"reward 'any' requires: .*missing.* \(all of pip's output: .*install\.log\)"):
        environment.install("any")
    assert environment.state is State.INCOMPLETE
    assert "missing" in (environment.folder / "install.log").read_text(encoding="utf-8")


def test_equal_requirements_share_an_environment_and_others_do_not(monkeypatch: pytest.MonkeyPatch):
    assert Environment(("a==1", "b")).folder == Environment(("b", "a==1")).folder
    assert Environment(("a==1",)).folder != Environment(("a==2",)).folder
    folder = Environment(("a",)).folder
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert Environment(("a",)).folder != folder


def test_the_overlay_may_not_bring_another_torch():
    assert f"torch=={version('torch')}" in Environment(("image-reward",))._constraints()
    assert not [c for c in Environment(("torch==1.13", "torchvision<1"))._constraints() if c.startswith("torch")]


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("Collecting timm==0.6.13 (from image-reward==1.5)\n", "collecting timm==0.6.13"),
        (
            "  Downloading https://x/y/timm-0.6.13-py3-none-any.whl (549 kB)\n",
            "downloading timm-0.6.13-py3-none-any.whl (549 kB)",
        ),
        ("Installing collected packages: a, b, c\n", "installing 3 packages"),
        ("Requirement already satisfied: torch in /x\n", ""),
    ],
)
def test_pips_steps_are_told_in_a_few_words(line: str, note: str):
    assert _note(line) == note


def test_a_reward_without_requirements_needs_no_environment():
    with pytest.raises(UsageError, match="reward 'jpeg' needs no environment of its own; it runs in the main one"):
        install(["jpeg"], lambda reward, note: None)
    with pytest.raises(UsageError, match="unknown reward 'jpg'"):
        install(["jpg"], lambda reward, note: None)


def test_the_variant_that_needs_packages_is_meant_by_the_plain_name(own_home: Path):
    with pytest.raises(UsageError, match="reward 'imagereward-package' has no environment on this machine"):
        remove(["imagereward"])


def test_all_environments_can_be_removed(own_home: Path):
    lost = own_home / "environments" / "0123456789"
    lost.mkdir(parents=True)
    assert remove_all() == []
    assert not lost.exists()


def test_the_commands_show_install_and_remove(
    flowbench_main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    own_home: Path,
    plugin_file: Path,
):
    plugin = ["--plugin", plugin_file]
    assert flowbench_main("rewards", "list", *plugin) == 0
    assert "not installed" in capsys.readouterr().out
    assert flowbench_main("rewards", "install", "ruled", *plugin) == 0
    out = capsys.readouterr().out
    assert "ruled: creating the environment" in out
    assert "ruled: installed, 0 MB in" in out.replace("\n", " ")
    assert flowbench_main("rewards", "remove", "ruled", *plugin) == 0
    assert "ruled: removed" in capsys.readouterr().out
    assert flowbench_main("rewards", "remove", "ruled", *plugin) == 2
    assert flowbench_main("rewards", "remove") == 2
    assert "or give --all" in capsys.readouterr().err
