"""A reward server among hostile clients, and a client of hostile servers."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import requests
import torch

from flowbench.errors import RunError, UsageError
from flowbench.registry import RewardInfo
from flowbench.reward import Reward
from flowbench.rewards.remote import Remote
from flowbench.scoring import client
from flowbench.scoring.remote import FormatError, pack, unpack
from flowbench.services.connections import Connections
from flowbench.services.serving import Limits, RewardServer
from flowbench.terms import parse_reward

CPU = torch.device("cpu")
TOKEN = "a-secret"
HEAD = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
IMAGES, PROMPTS = torch.full((2, 3, 8, 8), 0.5), ("a", "b")


class Bright(Reward):
    """Mean of the pixels."""

    info = RewardInfo("bright", "tests", "none", (0.0, 1.0), False, False, "Mean.")

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture
def serve() -> Iterator[Callable[..., RewardServer]]:
    """Starts a server with these limits."""
    servers: list[RewardServer] = []

    def start(**limits: float) -> RewardServer:
        server = RewardServer(("127.0.0.1", 0), Bright(), TOKEN, Limits(**{"body": 2**20, "pixels": 2**16, **limits}))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def talk(server: RewardServer, *parts: bytes, wait: float = 5.0) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(server.server_address[:2], timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while chunk := connection.recv(2**16):
            answer += chunk
            if b"\r\n\r\n" in answer:
                break
        return answer


def post(server: RewardServer, body: bytes) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    return requests.post(server.url + "/score", data=body, headers=headers, timeout=5)


def claimed_png(width: int, height: int) -> str:
    """A PNG of a few bytes that claims to be large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    ).decode()


HOSTILE = [
    json.dumps({"format": "png", "images": [claimed_png(4000, 4000)] * 50, "prompts": [""] * 50}).encode(),
    json.dumps({"format": "png", "images": [claimed_png(2**31 - 1, 2**31 - 1)], "prompts": [""]}).encode(),
    b'{"format": "float32", "shape": [3, 4096, 4096], "images": ["AAAA"], "prompts": [""]}',
    b"[" * 100_000,
    b'{"format": "png", "images": [' + b'"",' * 50_000 + b'""], "prompts": []}',
    b"\xff" * 1000,
]


def test_a_right_request_is_answered_among_stalled_connections_and_hostile_bodies(
    serve: Callable[..., RewardServer], capsys: pytest.CaptureFixture
):
    server = serve()
    stalled = [socket.create_connection(server.server_address[:2]) for _ in range(300)]
    for k, connection in enumerate(stalled):
        try:
            connection.sendall((HEAD + ("" if k % 2 else "Content-Length: 9000\r\n\r\n{")).encode())
        except OSError:  # closed already, to make room
            continue
    answered: list[int] = []
    attack = [
        threading.Thread(target=lambda k=k: answered.append(post(server, HOSTILE[k % len(HOSTILE)]).status_code))
        for k in range(50)
    ]
    for thread in attack:
        thread.start()
    begun = time.monotonic()
    remote = Remote(server.url, token=TOKEN, retries=2, timeout=5.0)
    remote.load(CPU)
    scores = remote.score(IMAGES, PROMPTS)
    seconds = time.monotonic() - begun
    for thread in attack:
        thread.join()
    assert torch.allclose(scores, torch.full((2,), 0.5), atol=0.01)
    assert seconds < 2.0
    assert len(server.connections) <= 64
    assert set(answered) <= {400, 503}
    for connection in stalled:
        connection.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("body", HOSTILE)
def test_a_hostile_body_is_refused_at_once(body: bytes, serve: Callable[..., RewardServer]):
    begun = time.monotonic()
    assert post(serve(), body).status_code == 400
    assert time.monotonic() - begun < 1.0


def test_pixels_are_counted_over_all_images_before_one_is_decoded():
    body = pack(torch.rand(4, 3, 16, 16), ("",) * 4, "png").encode()
    assert len(unpack(body, 4 * 256)[0]) == 4
    with pytest.raises(FormatError, match="1024 pixels together; at most 1023"):
        unpack(body, 4 * 256 - 1)


def test_a_client_sends_as_many_images_as_the_server_takes(serve: Callable[..., RewardServer]):
    remote = Remote(serve(pixels=64).url, token=TOKEN)
    remote.load(CPU)
    assert remote._batch(IMAGES) == 1
    assert len(remote.score(IMAGES, PROMPTS)) == 2


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + f"Content-Length: {'9' * 5000}\r\n\r\n",
        HEAD + "Content-Length: -1\r\n\r\n",
        HEAD + "Content-Length: 1e3\r\n\r\n",
        HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "no request\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "BREW /secret-prompt HTTP/1.1\r\nHost: x\r\n\r\n",
        HEAD + "x: y\r\n" * 200 + "\r\n",
    ],
)
def test_what_is_no_request_is_refused_in_json_and_not_repeated(
    request_: str, serve: Callable[..., RewardServer], capsys: pytest.CaptureFixture
):
    answer = talk(serve(), request_.encode())
    assert re.match(rb"HTTP/1\.1 (4|5)\d\d ", answer)
    assert b"secret-prompt" not in answer
    assert capsys.readouterr() == ("", "")


def test_a_connection_that_drips_is_closed_at_its_deadline(serve: Callable[..., RewardServer]):
    server = serve(idle=0.3, transfer=0.3)
    for beginning in ("GET / HT", HEAD + "Content-Length: 100\r\n\r\n"):
        with socket.create_connection(server.server_address[:2], timeout=5) as connection:
            connection.sendall(beginning.encode())
            begun = time.monotonic()
            with suppress(OSError):  # broken pipe or reset, as it comes
                while time.monotonic() - begun < 4:
                    connection.sendall(b"x")
                    time.sleep(0.05)
        assert time.monotonic() - begun < 2


def test_where_all_are_at_work_another_is_told_to_come_again():
    connections = Connections(1)
    (one, _), (two, other) = socket.socketpair(), socket.socketpair()
    assert connections.admit(one, 60)
    connections.enter(one, "working")
    assert not connections.admit(two, 60)
    connections.enter(one, "waiting", -1)
    connections.expire()
    assert connections.admit(two, 60)
    assert len(connections) == 1
    other.close()


def test_health_is_told_to_anybody_and_nothing_else_is(serve: Callable[..., RewardServer]):
    server = serve()
    assert requests.get(server.url + "/health", timeout=5).json() == {"status": "ok"}
    assert requests.get(server.url + "/", timeout=5).status_code == 401


def test_a_client_that_breaks_off_leaves_no_word_of_its_request(
    serve: Callable[..., RewardServer], capsys: pytest.CaptureFixture
):
    server = serve()
    for part in (HEAD + 'Content-Length: 900\r\n\r\n{"prompts": ["secret', HEAD, "GET"):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(part.encode())
    assert requests.get(server.url + "/health", timeout=5).ok
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def answering() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Starts a server that does as it likes with each connection; returns its URL."""
    listening: list[socket.socket] = []

    def start(act: Callable[[socket.socket], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def loop() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(2**16)
                    act(connection)
                except OSError:
                    pass

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, else its port would go on answering
        server.close()


def drip(connection: socket.socket) -> None:
    for _ in range(200):
        connection.sendall(b"H")
        time.sleep(0.05)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(500):
        connection.sendall(b" " * 2**16)


def packed(connection: socket.socket) -> None:
    body = zlib.compress(b" " * 2**22)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def deep(connection: socket.socket) -> None:
    body = b"[" * 60_000
    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (drip, "has not replied to / within 0.4 s; give it more `deadline`"),
        (endless, "with more than 65536 bytes, which is no reply"),
        (packed, "is no reward server"),
        (deep, "is no reward server"),
        (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "cannot be reached"),
    ],
)
def test_a_reply_without_end_or_sense_is_one_line(
    act: Callable[[socket.socket], None], complaint: str, answering: Callable[..., str]
):
    remote = Remote(answering(act), token=TOKEN, retries=0, timeout=5.0, deadline=0.4 if act is drip else 5.0)
    begun = time.monotonic()
    with pytest.raises(RunError, match=re.escape(complaint)) as raised:
        remote.load(CPU)
    assert time.monotonic() - begun < 3
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("asked", ["36000", "-1", "nonsense", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_cannot_make_a_client_wait_for_hours(
    asked: str, answering: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client, "MOST_PATIENCE", 0.01)

    def busy(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 503 x\r\nRetry-After: {asked}\r\nContent-Length: 0\r\n\r\n".encode())

    begun = time.monotonic()
    with pytest.raises(RunError, match="replied 503"):
        Remote(answering(busy), token=TOKEN, retries=1).load(CPU)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "url",
    [
        "http://me:s3cret@host:80",
        "https://s3cret@host",
        "http://host/?key=s3cret",
        "HTTP://me:s3cret@host",
        "http://h#s3cret",
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(url: str):
    for refused in (lambda: parse_reward(f"clip:0.5+{url}"), lambda: Remote(url)):
        with pytest.raises(UsageError, match="address must have no user") as raised:
            refused()
        assert "s3cret" not in str(raised.value)
