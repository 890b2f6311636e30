"""A damaged file is refused in one line, whatever kind of file it is and whatever is wrong with it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, TENSORS, TEXTS, Shelf
from fake_records import fake_record
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import DataObject, data, sampled_from

from flowbench.config import resolve_config
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.folder import check_finished
from flowbench.experiments.run import execute, run_config, save_tuned
from flowbench.experiments.suite import load_suite
from flowbench.experiments.true_gradient import Identity, SamplingPath, TrueGradient, _keep, read_gradient
from flowbench.experiments.tuning.journal import Journal
from flowbench.experiments.tuning.space import search_space
from flowbench.models.adapters import load_lora
from flowbench.models.loading import load_network
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.reading.checksums import SUMS, check_listed, write_sums
from flowbench.record import load_record, read_metrics
from flowbench.registry import algorithms
from flowbench.reporting.results import files
from flowbench.testbeds.shapes.weights import check_shipped, weights_folder
from flowbench.training.state import load_state
from flowbench.workloads import load_workload

CPU = torch.device("cpu")
BARE = re.compile(r"\b[A-Z]\w*(Error|Exception)\b")
SETTINGS: dict[str, Any] = {"training.images": 64, "training.images_per_prompt": 4, "training.num_steps": 4}
SETTINGS |= {"evaluation.prompts": 2, "evaluation.images_per_prompt": 2, "evaluation.num_steps": 4}
YAML = ("entry renamed", "entry wrongly typed")
WHOLE = (*TENSORS, "one bit", "cut")  # of files that carry a checksum


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory, pipeline: Any, preset: ModelPreset) -> list[Shelf]:
    """A file of every kind, and what reads it."""
    home = tmp_path_factory.mktemp("shelves")
    return [*_weights(home, pipeline, preset), *_of_runs(home), *_kept(home), *_texts(home)]


def _weights(home: Path, pipeline: Any, preset: ModelPreset) -> list[Shelf]:
    """Of models: the pipeline's, a LoRA of other origin, a run's own, rewards', and those that are shipped."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    found = []
    kinds = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection}
    for part, kind in kinds.items():
        folder = shutil.copytree(weights_folder() / "mini-sd3" / part, home / part)
        (file,) = folder.glob("*.safetensors")

        def read(kind: Any = kind, folder: Path = folder) -> object:
            return load_network(kind, folder, torch.float32)

        found.append(Shelf(part, file, read, (*TENSORS, "cut")))
    for name, model, argument, reward in (
        ("head of a reward", "mini-aesthetic", "head", "aesthetic"),
        ("towers of a reward", "mini-clip", "model", "clip"),
        ("towers of a BLIP reward", "mini-imagereward", "model", "imagereward"),
    ):
        folder = shutil.copytree(weights_folder() / model, home / model)
        (file, *_) = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size, reverse=True)
        arguments = {**load_preset("mini-sd3").rewards[reward], argument: str(folder)}
        changed = load_preset("mini-sd3").model_copy(update={"rewards": {reward: arguments}})

        def load(reward: str = reward, changed: ModelPreset = changed) -> object:
            return build_reward(reward, changed, CPU)

        found.append(Shelf(name, file, load, (*TENSORS, "cut")))
    torch.manual_seed(0)
    policy = Policy(copy.deepcopy(pipeline), preset, Tuning("lora", lora_rank=4, lora_alpha=12.0))
    policy.save(home / "lora")
    file = home / "lora" / "pytorch_lora_weights.safetensors"
    found.append(Shelf("LoRA", file, lambda: load_lora(copy.deepcopy(pipeline), file, "tiny"), (*TENSORS, "cut")))
    config = resolve_config("nft", "jpeg", "mini-sd3", overrides={}, device="cpu")
    save_tuned(policy, home / "tuned", config)
    own = home / "tuned" / "pytorch_lora_weights.safetensors"
    found.append(Shelf("tuned weights", own, lambda: check_listed(own, own.with_name(SUMS)), WHOLE))
    shipped = home / "shipped"
    folder = shutil.copytree(weights_folder() / "mini-sd3" / "vae", shipped / "mini-sd3" / "vae")
    (vae,) = folder.glob("*.safetensors")
    write_sums(shipped / SUMS, folder.glob("*"))
    found.append(Shelf("shipped weights", vae, lambda: check_shipped(folder, shipped), WHOLE))
    found.append(Shelf("shipped settings", folder / "config.json", lambda: check_shipped(folder, shipped), TEXTS))
    return found


def _of_runs(home: Path) -> list[Shelf]:
    """What a run of an algorithm with a critic leaves."""
    brief = {"algorithm.warmup": 0}
    config = resolve_config("acflow", "linear", "gaussian", overrides={**SETTINGS, **brief}, device="cpu")
    run = home / "run"
    execute(config, run, "", resume=False)
    state = run / "checkpoints" / "last.safetensors"
    assert load_state(state)["networks"]  # a critic's weights are among them
    texts = {name: run / name for name in ("config.yaml", "preset.yaml", "points.jsonl", "prompts/train.tsv")}
    return [
        Shelf("checkpoint", state, lambda: load_state(state), WHOLE),
        Shelf("record", run / "record.json", lambda: load_record(run / "record.json"), TEXTS),
        Shelf("log", run / "metrics.jsonl", lambda: read_metrics(run / "metrics.jsonl"), TEXTS),
        Shelf("configuration", texts["config.yaml"], lambda: run_config(run), TEXTS),
        *(Shelf(name, file, lambda: check_finished(run), TEXTS) for name, file in texts.items() if file.is_file()),
    ]


def _kept(home: Path) -> list[Shelf]:
    """What is computed again where it is damaged, or deleted by hand."""
    from flowbench.caches import Cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBENCH_CACHE", str(home / "cache"))
        cache = Cache("base-scores")
    cache.write("these", {"grid": torch.rand(3, 2), "clip": torch.rand(5)})
    (scores,) = (home / "cache" / "base-scores").glob("*.safetensors")
    path = SamplingPath("ode", (1.0, 0.0), 0.0, 1.0)
    identity = Identity("gaussian", "0" * 64, "linear", {}, path, "0" * 64, 8, 2, 0)
    gradient = home / "gradients" / f"{identity.key()}.safetensors"
    _keep(gradient, TrueGradient((torch.rand(7), torch.rand(7)), 8, reused=False), identity)
    return [
        Shelf("kept base scores", scores, lambda: cache.read("these") is not None, WHOLE),
        Shelf("kept gradient", gradient, lambda: read_gradient(gradient, identity), WHOLE),
    ]


def _texts(home: Path) -> list[Shelf]:
    """What is published, the log of a search, and files that people write."""
    root = home / "results"
    files.write(root, files.published([fake_record("nft", 100)]).files)
    (record,) = (root / "v1" / "shapes-clip" / "nft").glob("*.json")
    (base,) = (root / "v1" / "shapes-clip").glob("base-*.json")
    plane = load_workload("plane-linear")
    space = search_space(algorithms.get("raft").cls.search_space, lambda given: None)

    def journal() -> Journal:
        return Journal(home / "search", "raft", space, "qmc", 0, {"workload": plane.name})

    journal().propose(4)
    written = []
    for kind, of, load in (
        ("workload", "flowbench/workloads/plane-linear.yaml", load_workload),
        ("suite", "flowbench/experiments/suites/rehearsal.yaml", load_suite),
        ("preset", "flowbench/models/presets/gaussian.yaml", load_preset),
    ):
        file = Path(shutil.copy(Path(__file__).parents[2] / of, home / f"{kind}.yaml"))
        reads: Callable[[], object] = lambda load=load, file=file: load(str(file))  # noqa: E731
        written.append(Shelf(kind, file, reads, YAML))
    return [
        Shelf("published record", record, lambda: load_record(record), TEXTS),
        Shelf("published base scores", base, lambda: load_record(record), TEXTS),
        Shelf(
            "log of a search", home / "search" / "journal.log", journal, ("one bit", "inner line gone", "line twice")
        ),
        *written,
    ]


def _answer(shelf: Shelf) -> str | None:
    """What is wrong with the way in which a damaged file is met, or None."""
    try:
        if shelf.read() is False:
            return None  # it is computed again, and said
    except (UsageError, RunError) as error:
        said = str(error)
        return f"no line: {said[:200]!r}" if "\n" in said or BARE.search(said) or "'" not in said else None
    except Exception as error:  # noqa: BLE001 - that is the fault
        return f"raises {type(error).__name__}: {str(error)[:200]!r}"
    return "is accepted"


def campaign(shelves: list[Shelf], trials: int, start: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Damage files so many times: how often each was damaged in each way, and what was met wrongly."""
    met: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    places = [(shelf, how) for shelf in shelves for how in shelf.damages]

    @seed(start)
    @settings(max_examples=trials, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(sampled_from(places), data())
    def damaged(place: tuple[Shelf, str], drawn: DataObject) -> None:
        shelf, how = place
        whole = shelf.file.read_bytes()
        DAMAGES[how](shelf.file, drawn)
        if shelf.file.read_bytes() == whole:
            return
        met[shelf.kind, how] += 1
        try:
            fault = _answer(shelf)
        finally:
            shelf.file.write_bytes(whole)
        if fault:
            faults.append(f"{shelf.kind}, {how}: {fault}")

    damaged()
    return met, faults


@pytest.fixture
def unharmed(shelves: list[Shelf]) -> list[Shelf]:
    for shelf in shelves:
        assert shelf.read() is not False, shelf.kind
    return shelves


def test_a_damaged_file_is_refused_in_one_line(unharmed: list[Shelf], caplog: pytest.LogCaptureFixture):
    met, faults = campaign([s for s in unharmed if s.kind not in ("transformer", "towers of a reward")], 40, 0)
    assert sum(met.values()) >= 30
    assert not faults, "\n".join(sorted(faults))


@pytest.mark.slow
def test_five_hundred_damaged_files_are_all_refused(unharmed: list[Shelf]):
    met, faults = campaign(unharmed, 540, 1)
    kinds, ways = ({pair[k] for pair in met} for k in (0, 1))
    print(f"{sum(met.values())} damaged files of {len(kinds)} kinds in {len(ways)} ways; {len(faults)} faults")
    print(json.dumps({kind: sum(n for (k, _), n in met.items() if k == kind) for kind in sorted(kinds)}))
    assert sum(met.values()) >= 500
    assert not faults, "\n".join(sorted(faults))
