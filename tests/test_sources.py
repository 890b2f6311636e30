"""What identifies a result: the source of every plug-in that is not flowbench's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from flowbench import plugin_sources
from flowbench.config import RunConfig, resolve_config
from flowbench.errors import UsageError
from flowbench.experiments.outcome import failed_record
from flowbench.models.presets import FOLDER
from flowbench.plugin_sources import source, sources
from flowbench.record import Record
from flowbench.registry import algorithms, load_plugin_file, rewards
from flowbench.testbeds.shapes.weights import weights_folder

pytestmark = pytest.mark.usefixtures("clean_registry")

REWARD = """
from flowbench.reward import Reward, register_reward
{line}

@register_reward("mine", source="here", licence="none", range=(-1.0, 1.0), differentiable=False)
class Mine(Reward):
    '''Brightness.'''
    def score(self, images, prompts):
        return {sign}images.mean((1, 2, 3))
"""


def config() -> RunConfig:
    return resolve_config("raft", "mine", "mini-sd3", overrides={}, device="cpu")


def loaded(file: Path, sign: str) -> RunConfig:
    rewards.loaded.pop("mine", None)
    file.write_text(REWARD.format(sign=sign, line=""), encoding="utf-8")
    load_plugin_file(file)
    return config()


def test_a_sign_flipped_in_a_plugin_file_is_another_run_and_another_result(tmp_path: Path):
    records = [failed_record(loaded(tmp_path / "mine.py", sign), "", "none") for sign in ("", "-", "")]
    assert records[0].config_hash == records[2].config_hash != records[1].config_hash
    assert records[0].identity == records[2].identity != records[1].identity
    assert records[0].sources["mine"].distribution is None


def test_a_package_is_hashed_as_a_whole_and_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package, info = tmp_path / "foreign_rewards", tmp_path / "foreign_rewards-2.1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("SCALE = 1.0\n", encoding="utf-8")
    code = REWARD.format(sign="SCALE * ", line="from foreign_rewards.helper import SCALE")
    (package / "mine.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-rewards\nVersion: 2.1\n", encoding="utf-8")
    (info / "top_level.txt").write_text("foreign_rewards\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[flowbench.rewards]\nmine = foreign_rewards.mine\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = source(rewards, "mine")
    assert (found.distribution, found.version) == ("foreign-rewards", "2.1")
    before = config().hash()
    (package / "helper.py").write_text("SCALE = -1.0\n", encoding="utf-8")
    assert source(rewards, "mine") == found  # what was imported is what counts
    plugin_sources._foreign.cache_clear()
    assert source(rewards, "mine").sha256 != found.sha256
    assert config().hash() != before
    for name in [name for name in sys.modules if name.startswith("foreign_rewards")]:
        del sys.modules[name]


def test_flowbenchs_own_files_are_in_the_record_and_in_no_hash():
    own = sources("acflow", ("clip", "http://localhost:1/"))
    assert {s.distribution for s in own.values()} == {"flowbench"}
    assert len({s.sha256 for s in own.values()}) == 3
    run = resolve_config("acflow", "clip", "mini-sd3", overrides={}, device="cpu")
    record = failed_record(run, "", "none")
    changed = {name: s.model_copy(update={"sha256": "0" * 64}) for name, s in record.sources.items()}
    assert record.model_copy(update={"sources": changed}).identity == record.identity
    assert {"algorithm", "clip", "preset", "imagereward"} <= {*record.sources}


def test_other_weights_of_model_or_reward_are_another_result_wherever_they_lie(tmp_path: Path):
    for name in ("mini-sd3", "mini-clip"):
        shutil.copytree(weights_folder() / name, tmp_path / name)
    preset = yaml.safe_load((FOLDER / "mini-sd3.yaml").read_text(encoding="utf-8"))
    preset |= {"source": "mini-sd3", "rewards": {"clip": {"model": "mini-clip"}}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")

    def failed() -> Record:
        run = resolve_config("raft", "clip", str(tmp_path / "m.yaml"), overrides={}, device="cpu")
        return failed_record(run, "", "none")

    before = failed()
    assert {*before.weights} == {"model", "clip"}
    assert before.model_copy(update={"status": "finished", "reward_provenance": {"sha256": "x"}}).identity == (
        before.identity
    )
    seen = {before.identity}
    for file in ("mini-clip/open_clip_model.safetensors", "mini-sd3/vae/diffusion_pytorch_model.safetensors"):
        with (tmp_path / file).open("r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"\1")
        changed = failed()
        assert changed.config_hash == before.config_hash
        seen.add(changed.identity)
        assert changed.weights_key != before.weights_key
    assert len(seen) == 3


def test_weights_that_are_known_once_loaded_identify_a_result_by_their_provenance():
    run = resolve_config("raft", "jpeg", "mini-sd3", overrides={}, device="cpu")
    record = failed_record(run, "", "none")
    assert record.weights["jpeg"] == ""
    behind = record.model_copy(update={"weights": {**record.weights, "jpeg": None}})
    assert behind.weights_key == ""  # of a run that failed before it was known
    known = [behind.model_copy(update={"reward_provenance": {"scorer": {"sha256": d}}}) for d in ("a", "b")]
    assert len({known[0].identity, known[1].identity, record.identity}) == 3


def test_a_class_without_a_file_is_known_by_its_methods():
    found = []
    for sign in ("", "-"):
        rewards.loaded.pop("mine", None)
        exec(compile(REWARD.format(sign=sign, line=""), "<prompt>", "exec"), {"__name__": "nowhere"})
        found.append(source(rewards, "mine"))
    assert found[0] != found[1]


def test_an_unknown_plugin_has_no_source():
    with pytest.raises(UsageError, match="unknown algorithm 'acflw'"):
        source(algorithms, "acflw")


def test_a_failed_run_is_a_record_that_says_why_in_one_line():
    run = resolve_config("raft", "jpeg", "mini-sd3", overrides={}, seed=4, device="cpu")
    record = failed_record(run, "flowbench run raft", "\nout of memory\nTraceback: ...", device="cpu x 1")
    assert (record.status, record.failure, record.device) == ("failed", "out of memory", "cpu x 1")
    assert (record.version, record.scores, record.seed) == (2, {}, 4)
    assert {*record.prompt_hashes} == {"train", "test", "compositional"}
    missing = run.model_copy(update={"prompts": "/nowhere"})
    assert failed_record(missing, "", "").prompt_hashes == {}
