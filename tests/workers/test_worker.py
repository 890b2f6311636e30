from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowbench.algorithms.refl import Refl
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.models.policy import Policy
from flowbench.models.presets import ModelPreset
from flowbench.record import load_record
from flowbench.registry import Plugin
from flowbench.reward import Reward, checked_score
from flowbench.rollout import Batch
from flowbench.scoring.workers.reward import WorkerReward, make_reward

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "two crosses", "a small square", "")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def local(ruled: Plugin) -> Reward:
    """The same reward in this process, which lacks the package that it requires."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tinyrule", SimpleNamespace(SEED=7))
        reward = ruled.cls()
        reward.load(CPU)
    return reward


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worker of `mortal` writes its number when it begins to wait."""
    return tmp_path_factory.mktemp("mark") / "waiting"


@pytest.fixture(scope="module")
def mortal(start: Callable[..., WorkerReward], waiting: Path) -> WorkerReward:
    """One worker for the tests that kill it."""
    return start(mark=str(waiting))


def pictures(n: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def gradient(reward: Reward, images: torch.Tensor, prompts: tuple[str, ...] = PROMPTS) -> torch.Tensor:
    x = images.clone().requires_grad_()
    checked_score(reward, x, prompts).square().sum().backward()
    assert x.grad is not None
    return x.grad


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[1].split()[0] != "Z"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return not Path("/proc/self/stat").exists()
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_reward_that_declares_requirements_gets_a_worker_and_others_do_not(ruled: Plugin, preset: ModelPreset):
    assert isinstance(make_reward("ruled", {}), WorkerReward)
    assert not isinstance(build_reward("jpeg", preset, CPU), WorkerReward)


def test_scores_and_gradients_equal_those_in_this_process_to_the_last_bit(remote: WorkerReward, local: Reward):
    images = pictures()
    assert remote.worker.pid != os.getpid()
    assert torch.equal(checked_score(remote, images, PROMPTS), checked_score(local, images, PROMPTS))
    expected = gradient(local, images)
    assert expected.abs().max() > 0
    assert torch.equal(gradient(remote, images), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_keep_the_images_precision(remote: WorkerReward, local: Reward, dtype: torch.dtype):
    images = pictures().to(dtype)
    got = gradient(remote, images)
    assert got.dtype == dtype
    assert torch.equal(got, gradient(local, images))


def test_gradients_belong_to_their_own_call_in_whatever_order_they_are_asked_for(remote: WorkerReward, local: Reward):
    """Five calls are more than a worker holds graphs of."""
    batches = [pictures(seed=seed).requires_grad_() for seed in range(5)]
    scores = [remote.score(x, PROMPTS) for x in batches]
    for k in (0, 4, 2, 3, 1):
        (got,) = torch.autograd.grad(scores[k].square().sum(), batches[k])
        assert torch.equal(got, gradient(local, batches[k].detach()))


def test_a_retained_graph_can_be_used_twice(remote: WorkerReward):
    x = pictures().requires_grad_()
    total = remote.score(x, PROMPTS).sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_refl_through_a_worker_has_the_gradient_of_the_same_reward_in_this_process(
    make_policy: Callable[..., Policy], remote: WorkerReward, local: Reward
):
    policy = make_policy()
    policy.generator = torch.Generator().manual_seed(0)
    cond = policy.encode(PROMPTS)
    samples = policy.rollout(cond, policy.draw_noise(4), keep_states=True)
    x, sigma = samples.states[:, 3], samples.sigmas[3].expand(4)
    batch = Batch(PROMPTS, cond, x, torch.zeros(4), x=x, sigma=sigma)

    def parameters_gradient(reward: Reward) -> torch.Tensor:
        algorithm = Refl(Refl.Config(scale=1.0, margin=2.0), lambda i, p: checked_score(reward, i, p))
        algorithm.setup(policy)
        tuned = policy.trainable_parameters()
        grads = torch.autograd.grad(algorithm.loss(policy, batch).policy.mean(), tuned, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    expected = parameters_gradient(local)
    assert expected.norm() > 0
    assert (parameters_gradient(remote) - expected).norm() <= 1e-6 * expected.norm()


def test_the_reward_lives_in_its_environment_with_the_main_torch(remote: WorkerReward):
    seen = remote.provenance()
    assert str(os.environ["FLOWBENCH_HOME"]) in seen["rule"]
    assert seen["torch"] == torch.__file__
    assert seen["environment"] == {"tinyrule": "1.0"}


def test_a_workers_own_output_disturbs_nothing(remote: WorkerReward, local: Reward, capfd: pytest.CaptureFixture[str]):
    prompts = ("print", *PROMPTS[1:])
    images = pictures()
    assert torch.equal(remote.score(images, prompts)[1:], local.score(images, PROMPTS)[1:])
    assert "a line" not in capfd.readouterr().out


def test_an_error_in_the_worker_is_one_line_and_the_worker_goes_on(remote: WorkerReward):
    pid = remote.worker.pid
    with pytest.raises(RunError) as raised:
        remote.score(pictures(), ("raise", *PROMPTS[1:]))
    assert str(raised.value) == "reward 'ruled' failed in its worker: ValueError: it went wrong"
    assert "line is for --debug" in "".join(raised.value.__notes__)
    assert remote.score(pictures(), PROMPTS).shape == (4,)
    assert remote.worker.pid == pid


def test_several_threads_may_score_at_once(remote: WorkerReward, local: Reward):
    results: dict[int, torch.Tensor] = {}

    def score(seed: int) -> None:
        results[seed] = gradient(remote, pictures(seed=seed))

    threads = [threading.Thread(target=score, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], gradient(local, pictures(seed=seed))) for seed in range(16))


@needs_proc
def test_a_thousand_calls_leave_memory_as_it_was(remote: WorkerReward):
    """One leaked batch of images per call would be 80 MB here; graphs more."""
    assert remote.worker.pid is not None
    places = [Path("/proc/self/statm"), Path(f"/proc/{remote.worker.pid}/statm")]

    def resident() -> list[float]:
        return [int(p.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6 for p in places]

    images = pictures(8)
    for k in range(1000):
        if k == 200:
            before = resident()
        gradient(remote, images, PROMPTS * 2)
    assert all(after - b < 20 for b, after in zip(before, resident(), strict=True))


def test_a_worker_killed_in_the_middle_of_a_call_is_replaced_and_the_call_repeated(
    mortal: WorkerReward, waiting: Path, local: Reward
):
    first = mortal.worker.pid

    def kill() -> None:
        wait_until(lambda: waiting.exists() and bool(waiting.read_text(encoding="utf-8")))
        os.kill(int(waiting.read_text(encoding="utf-8")), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    images, prompts = pictures(), ("wait", *PROMPTS[1:])
    got = gradient(mortal, images, prompts)
    killer.join()
    assert mortal.worker.pid != first
    assert torch.equal(got, gradient(local, images, ("xxxx", *PROMPTS[1:])))


def test_a_worker_killed_between_score_and_gradient_is_asked_for_both_again(mortal: WorkerReward, local: Reward):
    x = pictures().requires_grad_()
    scores = mortal.score(x, PROMPTS)
    assert mortal.worker.pid is not None
    os.kill(mortal.worker.pid, signal.SIGKILL)
    (got,) = torch.autograd.grad(scores.square().sum(), x)
    assert torch.equal(got, gradient(local, x.detach()))


def test_a_call_that_kills_two_workers_is_an_error_that_names_the_reward(mortal: WorkerReward):
    with pytest.raises(RunError, match=r"the worker of reward 'ruled' died twice in the same call \(killed by SIGKILL"):
        mortal.score(pictures(), ("die", *PROMPTS[1:]))
    assert mortal.score(pictures(), PROMPTS).shape == (4,)


def test_a_gradient_that_kills_two_workers_is_such_an_error_too(mortal: WorkerReward):
    with pytest.raises(RunError, match=r"the worker of reward 'ruled' died twice in the same call \(while it computed"):
        gradient(mortal, pictures(), ("die backwards", *PROMPTS[1:]))
    assert mortal.score(pictures(), PROMPTS).shape == (4,)


def test_a_run_goes_on_when_its_worker_dies(mortal: WorkerReward, make_trainer: Any, tiny_config: Any, tmp_path: Path):
    trainer = make_trainer(tiny_config("refl", "clip"), tmp_path / "run", mortal)
    killed: list[int] = []

    def kill_once(log: object) -> None:
        if not killed and mortal.worker.pid is not None:
            killed.append(mortal.worker.pid)
            os.kill(mortal.worker.pid, signal.SIGKILL)

    trainer.on_iteration = kill_once
    assert trainer.run().images == 32
    assert killed
    assert mortal.worker.pid not in (None, *killed)


def test_the_command_trains_through_a_worker_and_records_its_packages(
    ruled: Plugin,
    plugin_file: Path,
    flowbench_main: Callable[..., int],
    settings: Callable[..., list[str]],
    preset_file: str,
    tmp_path: Path,
):
    where = ["--model", preset_file, "--device", "cpu", "--output", tmp_path, "--plugin", plugin_file]
    assert flowbench_main("run", "refl", "--reward", "ruled", *where, *settings()) == 0
    (path,) = tmp_path.rglob("record.json")
    record = load_record(path)
    assert record.reward_provenance["environment"] == {"tinyrule": "1.0"}
    assert "ruled/test" in record.scores


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"gain": -1.0}, RunError, r"reward 'ruled' failed in its worker: gain must not be negative; give another"),
        ({"gian": 1.0}, UsageError, r"reward 'ruled' for model 'tiny': .*unexpected keyword argument 'gian'"),
    ],
)
def test_what_hinders_loading_is_one_line(
    ruled: Plugin, preset: ModelPreset, arguments: dict[str, float], error: type[Exception], complaint: str
):
    configured = preset.model_copy(update={"rewards": {"ruled": arguments}})
    with pytest.raises(error, match=complaint):
        build_reward("ruled", configured, CPU)


def test_a_missing_environment_is_named_with_the_command_that_makes_it(
    ruled: Plugin, preset: ModelPreset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("FLOWBENCH_HOME", str(tmp_path))
    with pytest.raises(RunError, match=r"'ruled' is not installed; create it with 'flowbench rewards install"):
        build_reward("ruled", preset, CPU)


def test_a_worker_that_cannot_start_is_one_line_with_its_last_words(
    ruled: Plugin, preset: ModelPreset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr("flowbench.scoring.workers.environment.Environment.python", broken)
    complaint = r"'ruled' cannot start \(exit status 3: no such library\); try 'flowbench rewards install ruled'"
    with pytest.raises(RunError, match=complaint):
        build_reward("ruled", preset, CPU)


PARENT = """
import sys, torch
from pathlib import Path
from flowbench.registry import load_plugin_file
from flowbench.scoring.workers.reward import make_reward
load_plugin_file(Path(sys.argv[1]))
reward = make_reward("ruled", {"mark": sys.argv[2]})
reward.load(torch.device("cpu"))
reward.score(torch.rand(1, 3, 32, 32), ("wait",))
"""


def test_a_worker_ends_with_its_parent_even_if_both_are_busy_and_the_parent_is_killed(
    ruled: Plugin, plugin_file: Path, tmp_path: Path
):
    mark = tmp_path / "waiting"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(plugin_file), str(mark)])
    try:
        assert wait_until(lambda: mark.exists() and bool(mark.read_text(encoding="utf-8")), 120)
        worker = int(mark.read_text(encoding="utf-8"))
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not alive(worker), 10)


@needs_proc
@pytest.mark.slow
def test_a_worker_costs_at_most_15_ms_more_than_the_reward_itself(ruled: Plugin, local: Reward):
    """8 x 3 x 224 x 224 with gradients.

    Counted in time of the processor, which other processes do not disturb, and with one thread in both processes:
    further threads of the one that waits spin for a while, and would be counted too.
    """
    images, prompts, calls, threads = pictures(8, 224), PROMPTS * 2, 40, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        remote = WorkerReward(ruled, {}, ruled.cls())
        remote.load(CPU)

        def used() -> float:
            stat = Path(f"/proc/{remote.worker.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            return time.process_time() + (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

        spent = {}
        for name, reward in (("local", local), ("remote", remote)):
            gradient(reward, images, prompts)
            begun = used()
            for _ in range(calls):
                gradient(reward, images, prompts)
            spent[name] = (used() - begun) / calls
    finally:
        torch.set_num_threads(threads)
    assert spent["remote"] - spent["local"] < 0.015
