"""A reward server in a process of its own under attack: what it takes of the memory, and how fast it answers."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests
import torch

from flowbench.rewards.remote import Remote

TOKEN = "a-secret"
HEAD = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
STALLED, BODIES = 300, 50


def png(width: int, height: int, rows: int) -> str:
    """A PNG that claims a size and holds so many rows of it, all black: a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (3 * width + 1)), 9)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b64encode(whole).decode()


def score(images: list[str]) -> bytes:
    return json.dumps({"format": "png", "images": images, "prompts": [""] * len(images)}).encode()


HOSTILE = [
    score([png(4000, 4000, 0)] * 50),
    score([png(2**31 - 1, 2**31 - 1, 0)]),
    score([png(1024, 1024, 1024)] * 8 + [png(1, 1, 0)]),
    b'{"format": "float32", "shape": [3, 4096, 4096], "images": ["AAAA"], "prompts": [""]}',
    b"[" * 2_000_000,
    b'{"format": "png", "images": [' + b'"",' * 500_000 + b'""], "prompts": []}',
    b'{"format": "png", "images": ["' + b"A" * 4_000_000 + b'"], "prompts": [""]}',
    b'{"a": ' + b"1" * 3_000_000 + b"}",
    b"\xff" * 100_000,
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`flowbench rewards serve jpeg` with its defaults: its address and process."""
    environment = {**os.environ, "FLOWBENCH_REWARD_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "flowbench", "rewards", "serve", "jpeg", "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": (tmp_path / "stderr").open("wb")}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    try:
        assert process.stdout is not None
        url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
        yield url.rstrip(".,;"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)
    assert (tmp_path / "stderr").read_text(encoding="utf-8").splitlines() in ([], ["flowbench: terminated"])


class Watch:
    """The largest memory of a process while it is looked at."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.peak, self.over = process, 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def ask(url: str, begin: Callable[[], object] = lambda: None) -> tuple[float, torch.Tensor]:
    """The seconds that a right request of two images takes, and its scores."""
    remote = Remote(url, token=TOKEN, retries=4, timeout=20.0)
    remote.load(torch.device("cpu"))
    begin()
    begun = time.monotonic()
    scores = remote.score(torch.full((2, 3, 32, 32), 0.5), ("a", "b"))
    return time.monotonic() - begun, scores


@pytest.mark.slow
def test_hostile_requests_do_not_fill_the_memory_and_a_right_one_is_answered(server: tuple[str, psutil.Process]):
    url, process = server
    _, expected = ask(url)  # the first request loads what the others use
    time.sleep(1)
    idle = process.memory_info().rss
    host, port = url.removeprefix("http://").split(":")
    stalled = [socket.create_connection((host, int(port))) for _ in range(STALLED)]
    for k, connection in enumerate(stalled):
        with suppress(OSError):  # closed already, to make room
            connection.sendall((HEAD + ("" if k % 2 else "Content-Length: 9000\r\n\r\n{")).encode())
    time.sleep(1)  # then those that say nothing may be sent away, and bodies are read
    answered: list[int] = []

    def attack(body: bytes) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        with suppress(requests.ConnectionError):  # closed, to make room
            answered.append(requests.post(f"{url}/score", data=body, headers=headers, timeout=60).status_code)

    attackers = [threading.Thread(target=attack, args=(HOSTILE[k % len(HOSTILE)],)) for k in range(BODIES)]
    with Watch(process) as watch:
        for thread in attackers:
            thread.start()
        seconds, scores = ask(url)
        for thread in attackers:
            thread.join()
    after, _ = ask(url)
    for connection in stalled:
        connection.close()
    text = f"idle {idle >> 20} MiB, peak {watch.peak >> 20} MiB ({watch.peak / idle:.2f} times), "
    print(f"{text}a right request {seconds:.2f} s among them and {after:.2f} s after; answers {sorted(answered)}")
    assert torch.equal(scores, expected)
    assert seconds < 2.0
    assert watch.peak < 1.5 * idle
    assert set(answered) <= {400, 413, 503}
