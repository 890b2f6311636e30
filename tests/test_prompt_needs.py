"""What a reward needs of its prompts: declared, checked before anything is loaded, and handed over."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flowbench.config import RunConfig, resolve_config
from flowbench.conformance.reward_claims import check_reward
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_judges
from flowbench.experiments.reevaluate import evaluate
from flowbench.experiments.run import execute
from flowbench.models.presets import load_preset
from flowbench.prompts import Prompt, load_split
from flowbench.registry import RewardInfo, load_plugin_file, register_reward, rewards
from flowbench.reward import Reward, checked_score
from flowbench.rewards.remote import Remote
from flowbench.scoring.remote import ScoreRequest, pack, unpack
from flowbench.scoring.workers.child import Server
from flowbench.scoring.workers.wire import Score, Scored
from flowbench.services.serving import Limits, RewardServer, serve_reward
from flowbench.terms import combined_info, parse_reward

CPU = torch.device("cpu")
SMALL = {"training.images": 8, "training.prompts_per_iteration": 2, "training.images_per_prompt": 4}
SMALL |= {"evaluation.prompts": 3, "evaluation.images_per_prompt": 2}
TOLD = [
    {"prompt": f"a photo of {n} cats", "tag": "counting", "objects": [{"class": "cat", "count": n}]} for n in range(9)
]
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TWO = (Prompt("a", "x", {"objects": [1], "note": None}), Prompt("b", metadata={"objects": [2]}))


class Counter(Reward):
    """Brightness plus the number of objects."""

    seen: tuple[Any, ...] = ()

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        type(self).seen += prompts
        return images.mean((1, 2, 3)) + torch.tensor([float(len(p.metadata["objects"])) for p in prompts])


@pytest.fixture(autouse=True)
def counter(clean_registry: None) -> type[Counter]:
    """A reward that needs each prompt's objects."""

    @register_reward(
        "counter", source="tests", licence="none", range=(0.0, 99.0), differentiable=False, needs_metadata=["objects"]
    )
    class Fresh(Counter):
        """Counts."""

    return Fresh


@pytest.fixture
def told(tmp_path: Path) -> str:
    """A file of prompts with objects."""
    path = tmp_path / "told.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in TOLD), encoding="utf-8")
    return str(path)


@pytest.fixture
def resolve(preset_file: str) -> Callable[..., RunConfig]:
    def make(
        reward: str = "counter", model: str = preset_file, prompts: str | None = None, **changed: Any
    ) -> RunConfig:
        overrides = {**SMALL, **{key.replace("__", "."): value for key, value in changed.items()}}
        return resolve_config("nft", reward, model, overrides=overrides, device="cpu", prompts=prompts)

    return make


def test_needs_are_read_from_a_plugins_source_without_running_it(tmp_path: Path):
    assert rewards.describe("jpeg").needs_metadata == ()
    assert rewards.describe("counter").needs_metadata == ("objects",)
    info = combined_info(parse_reward("counter:0.5+jpeg"))
    assert (info.needs_metadata, info.needs_reference) == (("objects",), False)
    file = tmp_path / "mine.py"
    file.write_text(
        "from flowbench.reward import Reward, register_reward\n"
        "@register_reward('mine', source='x', licence='x', range=(0, 1), "
        "differentiable=False, needs_metadata='objects')\n"
        "class Mine(Reward):\n    '''Mine.'''\n"
    )
    with pytest.raises(UsageError, match=r"reward 'mine': write needs_metadata=\('objects',\), a tuple of keys"):
        load_plugin_file(file)


@pytest.mark.parametrize("reward", ["counter", "counter:0.5+jpeg:0.5"])
def test_prompts_without_what_the_reward_needs_are_refused_at_once(reward: str, resolve: Callable[..., RunConfig]):
    first = load_split("shapes", "train").prompts[0]
    complaint = f"reward 'counter' cannot score .* needs 'objects' .*split 'train' of 'shapes' has none for '{first}'"
    with pytest.raises(UsageError, match=complaint):
        resolve(reward)


def test_a_named_judge_looks_at_evaluated_splits_alone(resolve: Callable[..., RunConfig], tmp_path: Path):
    for name, entries in (("train", [{"prompt": "plain"}]), ("test", TOLD)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    settings = {"evaluation__judges": ["counter"], "prompts": str(tmp_path)}
    assert resolve("jpeg", evaluation__splits=["test"], **settings).evaluation.splits == ("test",)
    with pytest.raises(UsageError, match=r"split 'train' of '.*' has none for 'plain'"):
        resolve("jpeg", evaluation__splits=["test", "train"], **settings)


def test_the_category_and_a_reference_image_can_be_needed(counter: type, resolve: Callable[..., RunConfig]):
    described = {"source": "tests", "licence": "none", "range": (0.0, 9.0), "differentiable": False}
    register_reward("kinds", needs_metadata=("category",), **described)(type("Kinds", (Counter,), {}))
    register_reward("likeness", needs_reference=True, **described)(type("Likeness", (Counter,), {}))
    assert resolve("kinds").reward == "kinds"
    with pytest.raises(UsageError, match=r"reward 'likeness' .* needs a reference image of every prompt"):
        resolve("likeness")
    with pytest.raises(UsageError, match="needs reference images, which are not sent over HTTP"):
        serve_reward("likeness", "mini-sd3", "cpu", ("127.0.0.1", 0), Limits(), print)


def test_a_default_judge_whose_needs_are_not_met_is_left_out_with_a_word(
    preset_file: str, tmp_path: Path, resolve: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture, told: str
):
    content = yaml.safe_load(Path(preset_file).read_text(encoding="utf-8")) | {"rewards": {"counter": {}}}
    path = tmp_path / "judged.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = resolve("jpeg", str(path))
    splits = [load_split("shapes", name) for name in config.evaluation.splits]
    assert build_judges(config, None, load_preset(str(path)), CPU, splits).held_out == ()
    assert "'counter' is no judge of this run: it needs 'objects' of every prompt" in caplog.text
    config = resolve("jpeg", str(path), prompts=told)
    splits = [load_split(told, "test")]
    assert build_judges(config, None, load_preset(str(path)), CPU, splits).held_out == ("counter",)


def test_training_and_evaluation_hand_over_what_the_file_says(
    counter: type[Counter], resolve: Callable[..., RunConfig], told: str, tmp_path: Path
):
    config = resolve(prompts=told, evaluation__judges=[])
    record = execute(config, tmp_path / "run", "", resume=False)
    assert len(counter.seen) == 8 + 2 * 2 * len(record.prompts["test"])
    assert {p.category for p in counter.seen} == {"counting"}
    assert all(f"{p.metadata['objects'][0]['count']} cats" in p for p in counter.seen)
    assert record.scores["counter/test"].base > 1


def test_a_gallerys_table_may_say_more_of_its_prompts(
    counter: type[Counter], tmp_path: Path, preset_file: str, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        Image.fromarray(np.full((32, 32, 3), 40 * k, dtype=np.uint8)).save(folder / f"{k}.png")
    lines = [{"file": f"{k}.png", "prompt": "a\u2028b", "objects": [k]} for k in range(2)]
    table = folder / "prompts.jsonl"
    table.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in lines), encoding="utf-8")
    judged = {"evaluation.judges": ["counter"]}
    result = evaluate(folder, judged, preset_file, "cpu", lambda done, total: None)
    assert result.images["counter"].prompts == 1
    assert [p.metadata["objects"] for p in counter.seen] == [[0], [1]]
    with pytest.raises(UsageError, match="leave out --prompts"):
        evaluate(folder, judged, preset_file, "cpu", lambda done, total: None, "shapes")
    table.write_text("".join(json.dumps({**e, "objects": None}) + "\n" for e in lines), encoding="utf-8")
    with pytest.raises(UsageError, match="reward 'counter' cannot score these prompts: it needs 'objects'"):
        evaluate(folder, judged, preset_file, "cpu", lambda done, total: None)


def test_every_reward_is_given_prompts_even_where_strings_were_given(counter: type[Counter]):
    with pytest.raises(RunError, match="KeyError: 'objects'"):
        checked_score(counter(), IMAGES, ("a", "b"))
    assert all(isinstance(p, Prompt) for p in counter.seen)


def test_the_check_says_that_it_has_no_prompts_for_such_a_reward():
    verdicts = {finding.claim: finding.verdict for finding in check_reward("counter")}
    assert "needs 'objects' of every prompt, which the prompts of this check have not" in str(verdicts)


# --- workers and servers ------------------------------------------------------------------------------------------


def test_a_worker_is_told_what_the_file_says(counter: type[Counter], tmp_path: Path):
    prompts = (*TWO[:1], Prompt("b", metadata={"objects": []}, reference=tmp_path / "0.png"))
    request = Score.of(IMAGES, prompts, None)
    sent = Score(request.images, request.prompts, None, json.loads(json.dumps(request.details)))
    reply = Server(counter()).answer(sent)
    assert isinstance(reply, Scored)
    assert torch.allclose(reply.scores, IMAGES.mean((1, 2, 3)) + torch.tensor([1.0, 0.0]))
    first, second = counter.seen
    assert (first.category, first.metadata) == ("x", {"objects": [1], "note": None})
    assert second.reference == tmp_path / "0.png"
    assert Score.of(IMAGES, ("a", "b"), None).details is None


def test_metadata_travels_to_servers_that_take_it_and_to_no_other():
    plain = json.loads(pack(IMAGES, TWO, "png"))
    assert set(plain) == {"format", "images", "prompts", "shape"}
    images, prompts = unpack(pack(IMAGES, TWO, "float32", metadata=True).encode())
    assert torch.equal(images, IMAGES)
    assert [(p, p.category, p.metadata) for p in prompts] == [(p, p.category, p.metadata) for p in TWO]
    assert unpack(json.dumps(plain).encode())[1] == ("a", "b")  # of an older client
    assert ScoreRequest.model_validate(plain).metadata is None


@pytest.mark.parametrize("field", ["metadata", "categories"])
def test_a_request_with_another_number_of_details_is_refused(field: str):
    body = json.loads(pack(IMAGES, TWO, "png", metadata=True))
    body[field] = body[field][:1]
    with pytest.raises(ValueError, match=f"1 {field} for 2 prompts"):
        unpack(json.dumps(body).encode())


def test_a_server_refuses_prompts_without_what_its_reward_needs(counter: type[Counter]):
    with RewardServer(("127.0.0.1", 0), counter(), "token") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Remote(server.url, token="token", retries=0, format="float32")
        client.load(CPU)
        assert client.scorer["needs_metadata"] == ["objects"]
        assert torch.allclose(client.score(IMAGES, TWO), IMAGES.mean((1, 2, 3)) + 1)
        with pytest.raises(RunError, match=r"400 .*'counter' needs 'objects' of every prompt; prompt 1 has none"):
            client.score(IMAGES, (TWO[0], Prompt("b")))
        del client.scorer["metadata"]  # as an older server describes itself
        with pytest.raises(RunError, match="prompt 0 has none"):
            client.score(IMAGES, TWO)
        server.shutdown()


def test_older_descriptions_of_rewards_need_nothing():
    info = RewardInfo("old", "tests", "none", (0.0, 1.0), False, False, "Old.")
    assert (info.needs_metadata, info.needs_reference) == ((), False)
