"""An environment with a wheel made here, so that nothing is fetched, and a reward that needs it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flowbench.registry import Plugin, load_plugin_file, rewards
from flowbench.scoring.workers.environment import Environment
from flowbench.scoring.workers.reward import WorkerReward, make_reward

PLUGIN = '''
"""A small differentiable reward that behaves badly when the prompt asks for it."""

import copy
import os
import signal
import time
from pathlib import Path

import torch

from flowbench.errors import RunError
from flowbench.reward import Reward, register_reward


@register_reward("ruled", source="tests", licence="none", range=(-1.0, 1.0), differentiable=True,
                 requirements=[{requirement!r}])
class Ruled(Reward):
    """tanh of a random convolution's mean times the length of the prompt."""

    def __init__(self, gain: float = 1.0, mark: str = "") -> None:
        self.gain, self.mark = gain, mark

    def load(self, device):
        import tinyrule

        if self.gain < 0:
            raise RunError("gain must not be negative; give another")
        generator = torch.Generator().manual_seed(tinyrule.SEED)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7, 4), torch.nn.GELU(), torch.nn.Conv2d(4, 1, 3))
        for p in self.net.parameters():
            p.requires_grad_(False).copy_(0.3 * torch.randn(p.shape, generator=generator))

    def score(self, images, prompts):
        for prompt in prompts:
            if prompt == "print":
                os.write(1, b"a line\\n" * 200_000)
            elif prompt == "raise":
                raise ValueError("it went wrong\\nand this line is for --debug")
            elif prompt == "wait" and not Path(self.mark).exists():
                Path(self.mark).write_text(str(os.getpid()), encoding="utf-8")
                time.sleep(60)
            elif prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif prompt == "die backwards":
                images = images * 1
                images.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        lengths = torch.tensor([len(p) / 10 for p in prompts]).to(images)
        return (self.gain * copy.deepcopy(self.net).to(images.dtype)(images).mean((1, 2, 3)) * lengths).tanh()

    def provenance(self):
        import tinyrule

        return {{"rule": tinyrule.__file__, "torch": torch.__file__}}
'''


def make_wheel(folder: Path, name: str, version: str, code: str) -> Path:
    """A wheel of one module, as pip installs it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinyrule 1.0, and a packaging 0.1 that conflicts with the main environment's."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "tinyrule", "1.0", "SEED = 7\n")
    make_wheel(folder, "packaging", "0.1", "OLD = True\n")
    return folder


@pytest.fixture(scope="session")
def requirement(wheels: Path) -> str:
    return f"tinyrule @ {(wheels / 'tinyrule-1.0-py3-none-any.whl').as_uri()}"


@pytest.fixture(scope="session")
def plugin_file(requirement: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "ruled.py"
    path.write_text(PLUGIN.format(requirement=requirement), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def flowbench_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where environments are made in these tests."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBENCH_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def ruled(plugin_file: Path, requirement: str, flowbench_home: Path) -> Iterator[Plugin]:
    """The plug-in, with its environment installed."""
    before = dict(rewards.loaded)
    load_plugin_file(plugin_file)
    Environment((requirement,)).install("ruled")
    yield rewards.get("ruled")
    rewards.loaded.clear()
    rewards.loaded.update(before)


@pytest.fixture(scope="session")
def start(ruled: Plugin) -> Iterator[Callable[..., WorkerReward]]:
    """Starts a worker with the reward; arguments as for its class."""
    started: list[WorkerReward] = []

    def make(**arguments: object) -> WorkerReward:
        reward = make_reward("ruled", arguments)
        assert isinstance(reward, WorkerReward)
        reward.load(torch.device("cpu"))
        started.append(reward)
        return reward

    yield make
    for reward in started:
        reward.worker.stop()


@pytest.fixture(scope="session")
def remote(start: Callable[..., WorkerReward]) -> WorkerReward:
    """One worker for all tests that leave it alive."""
    return start()
