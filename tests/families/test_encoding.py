"""Text encoders and transformer never meet: prompts are encoded first, and what they are encoded to is kept on disk."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from transformers import PreTrainedModel

from flowbench.config import RunConfig, resolve_config
from flowbench.experiments.run import Listener, build_policy, execute
from flowbench.models.encoding import EncodedTexts, encode_ahead, encodes_ahead
from flowbench.models.families import load_pipeline
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "two red apples", "a dog left of a bench"]
GROUPS = [PROMPTS[:2], [""], PROMPTS]
KINDS = ["sd3", "flux", "lumina2", "zimage"]


class Live:
    """Text encoders that exist, and how often one was loaded."""

    def __init__(self) -> None:
        self.encoders: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self.loaded = 0
        self.beside_transformer: list[int] = []

    def count(self) -> int:
        gc.collect()
        return len(self.encoders)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Live:
    """Sees every text encoder that is loaded, and how many there are when a transformer is made."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    seen = Live()
    load, build = PreTrainedModel.from_pretrained.__func__, SD3Transformer2DModel.__init__

    def loading(cls: type, *arguments: Any, **options: Any) -> Any:
        loaded = load(cls, *arguments, **options)
        seen.encoders.add(loaded[0] if options.get("output_loading_info") else loaded)
        seen.loaded += 1
        return loaded

    @functools.wraps(build)
    def building(self: Any, *arguments: Any, **options: Any) -> None:
        seen.beside_transformer.append(seen.count())
        build(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    monkeypatch.setattr(SD3Transformer2DModel, "__init__", building)
    return seen


def bits(encoded: EncodedTexts) -> dict[str, torch.Tensor]:
    flat = {f"{text}/{name}": t for text, tensors in encoded.texts.items() for name, t in tensors.items()}
    return flat | {f"negative/{name}": t for name, t in (encoded.negative or {}).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_encodings_made_ahead_and_kept_are_those_of_the_whole_pipeline_to_the_last_bit(
    kind: str, described: Callable[..., ModelPreset], live: Live
) -> None:
    preset = described(kind, guidance_scale=4.0)
    plain = Policy(load_pipeline(preset, CPU), preset)
    expected = [plain.encode(group).rows() for group in GROUPS]
    negative = plain.texts.negative(2).rows()
    before = live.loaded
    for loads in (True, False):  # by encoders, then from the disk
        ahead = Policy(load_pipeline(preset, CPU, "rest"), preset)
        ahead.texts.take(encode_ahead(preset, CPU, GROUPS))
        assert (live.loaded > before) is loads
        before = live.loaded
        for group, rows in zip(GROUPS, expected, strict=True):
            assert same(ahead.encode(group).rows(), rows)
        assert same(ahead.texts.negative(2).rows(), negative)
        assert ahead.text_summary(ahead.encode(PROMPTS)).shape == (3, ahead.text_width)
        assert ahead.family.count_tokens(PROMPTS[0]) > 1


def test_without_t5_the_zeros_in_its_place_are_as_wide(described: Callable[..., ModelPreset], live: Live) -> None:
    preset = described("sd3", has_t5=False)
    plain = Policy(load_pipeline(preset, CPU), preset).encode(PROMPTS).rows()
    ahead = Policy(load_pipeline(preset, CPU, "rest"), preset)
    ahead.texts.take(encode_ahead(preset, CPU, [PROMPTS]))
    assert same(ahead.encode(PROMPTS).rows(), plain)


@pytest.fixture
def config(folders: dict[str, Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of one iteration on tiny SD3 with T5."""

    def make(**overrides: Any) -> RunConfig:
        preset = {
            "source": str(folders["sd3"]),
            "licence": "none",
            "resolution": 64,
            "num_steps": 2,
            "guidance_scale": 1.0,
            "max_sequence_length": 24,
            "has_t5": True,
            "prompts": "objects",
        }
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump(preset), encoding="utf-8")
        small = {"images": 4, "prompts_per_iteration": 2, "images_per_prompt": 2, "tuning": "lora", "lora_rank": 2}
        settings = {f"training.{name}": value for name, value in small.items()}
        settings |= {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2, "evaluation.base_cache": False}
        settings |= {name.replace("__", "."): value for name, value in overrides.items()}
        return resolve_config("orw-cfm-w2", "jpeg", str(path), overrides=settings, device="cpu")

    return make


def test_a_runs_transformer_is_made_when_no_text_encoder_is_left_and_a_second_run_loads_none(
    config: Callable[..., RunConfig], live: Live, tmp_path: Path
) -> None:
    chosen = config(training__encode_first=True)
    execute(chosen, tmp_path / "first", "", resume=False)
    assert live.loaded == 3
    assert live.beside_transformer == [0]

    def begun(iteration: int, iterations: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(chosen, tmp_path / "second", "", resume=False, listener=Listener(on_start=begun))
    assert live.loaded == 3
    assert live.beside_transformer == [0, 0]


def test_encoding_first_changes_neither_a_runs_hash_nor_its_weights(
    config: Callable[..., RunConfig], live: Live
) -> None:
    from flowbench.models.presets import load_preset

    plain, ahead = config(), config(training__encode_first=True)
    assert plain.hash() == ahead.hash()
    preset = load_preset(plain.model)
    ours, theirs = (build_policy(c, preset, CPU, GROUPS) for c in (ahead, plain))
    assert ours.pipeline.text_encoder is None
    assert theirs.pipeline.text_encoder is not None
    for a, b in zip(ours.trainable_parameters(), theirs.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_length_model_or_list_of_prompts_is_encoded_anew(
    described: Callable[..., ModelPreset], live: Live, tmp_path: Path, folders: dict[str, Path]
) -> None:
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    preset = described("sd3", source=str(folder))
    encode_ahead(preset, CPU, [PROMPTS])
    for other, prompts in (
        (preset.model_copy(update={"max_sequence_length": 32}), PROMPTS),
        (preset.model_copy(update={"has_t5": False}), PROMPTS),
        (preset, PROMPTS[:2]),
    ):
        before = live.loaded
        encode_ahead(other, CPU, [prompts])
        assert live.loaded > before
    before = live.loaded
    encode_ahead(preset.model_copy(update={"num_steps": 9, "guidance_scale": 2.0}), CPU, [PROMPTS])
    assert live.loaded == before
    (folder / "text_encoder" / "model.safetensors").touch()
    encode_ahead(preset, CPU, [PROMPTS])
    assert live.loaded > before


def test_a_damaged_or_foreign_file_is_written_anew_and_said(
    described: Callable[..., ModelPreset], live: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preset = described("sd3", has_t5=False)
    expected = bits(encode_ahead(preset, CPU, [PROMPTS]))
    (file,) = (tmp_path / "cache" / "texts").iterdir()
    encode_ahead(preset, CPU, [PROMPTS[:2]])
    (other,) = {*file.parent.iterdir()} - {file}
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), other.read_bytes()):
        file.write_bytes(content)
        caplog.clear()
        before = live.loaded
        assert same(bits(encode_ahead(preset, CPU, [PROMPTS])), expected)
        assert live.loaded > before
        assert str(file) in caplog.text
        assert len(file.read_bytes()) == len(whole)


def test_the_cache_can_be_switched_off(
    described: Callable[..., ModelPreset], live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWBENCH_CACHE", "off")
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path / "home"))
    for _ in range(2):
        encode_ahead(described("sd3", has_t5=False), CPU, [PROMPTS])
    assert live.loaded == 4
    assert not (tmp_path / "home").exists()


def test_encoders_that_do_not_fit_together_take_turns(
    described: Callable[..., ModelPreset], live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusion3Pipeline

    from flowbench.models.families.sd3 import StableDiffusion3

    preset, hooked = described("sd3"), []
    expected = bits(encode_ahead(preset, CPU, [PROMPTS]))
    monkeypatch.setenv("FLOWBENCH_CACHE", "off")
    place = StableDiffusion3.place_text_encoders
    offload = StableDiffusion3Pipeline.enable_model_cpu_offload

    def full(self: Any, device: torch.device) -> None:
        monkeypatch.setattr(StableDiffusion3, "place_text_encoders", place)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def watched(self: Any, **options: Any) -> None:
        offload(self, **options)
        hooked.append(len(self._all_hooks))

    monkeypatch.setattr(StableDiffusion3, "place_text_encoders", full)
    monkeypatch.setattr(StableDiffusion3Pipeline, "enable_model_cpu_offload", watched)
    assert same(bits(encode_ahead(preset, CPU, [PROMPTS])), expected)
    assert hooked == [3]
    assert "the text encoders do not fit on cpu together; they take turns" in caplog.text


def test_a_prompt_that_was_not_announced_is_encoded_by_encoders_that_are_loaded_again(
    described: Callable[..., ModelPreset], live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    preset = described("sd3")
    policy = Policy(load_pipeline(preset, CPU, "rest"), preset)
    policy.texts.take(encode_ahead(preset, CPU, [PROMPTS[:1], [""]]))
    plain = Policy(load_pipeline(preset, CPU), preset)
    assert same(policy.encode(PROMPTS[2:]).rows(), plain.encode(PROMPTS[2:]).rows())
    assert "the text encoders are loaded again for a prompt that was not announced: 'a dog left of a bench'" in (
        caplog.text
    )


def test_on_a_cpu_or_without_text_encoders_prompts_are_encoded_ahead_only_where_asked(
    described: Callable[..., ModelPreset],
) -> None:
    from flowbench.models.presets import load_preset

    sd3, plane, gpu = described("sd3"), load_preset("gaussian"), torch.device("cuda")
    assert encodes_ahead(sd3, gpu)
    assert encodes_ahead(sd3, CPU, True)
    assert not encodes_ahead(sd3, CPU)
    assert not encodes_ahead(sd3, gpu, False)
    assert not encodes_ahead(plane, gpu)


def test_what_is_kept_says_what_it_is(described: Callable[..., ModelPreset], live: Live, tmp_path: Path) -> None:
    from safetensors import safe_open

    encode_ahead(described("sd3", has_t5=False), CPU, [PROMPTS])
    (file,) = (tmp_path / "cache" / "texts").iterdir()
    with safe_open(str(file), framework="pt") as stored:
        said = json.loads(stored.metadata()["identity"])
    assert said["texts"] == PROMPTS
    assert "torch" in said["device"]
    assert said["packages"]["transformers"]
