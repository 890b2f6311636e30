from __future__ import annotations

import json
import pickle
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import torch

from flowbench.scoring.workers.wire import MAGIC, MAX_HEADER, Load, Score, Scored, WireError, receive, send


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.settimeout(10)
    b.settimeout(10)
    with a, b:
        yield a, b


def frame(header: object, payload: bytes = b"", magic: bytes = MAGIC, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack(">4sIQ", magic, len(text), len(payload) if size is None else size) + text + payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4,), (), (0, 3, 2, 2)])
def test_tensors_arrive_bit_for_bit(
    ends: tuple[socket.socket, socket.socket], dtype: torch.dtype, shape: tuple[int, ...]
):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    send(ends[0], Score(sent, ["a", "ß ☕ \ud800"], 3))
    got = receive(ends[1])
    assert isinstance(got, Score)
    assert got.images.dtype == dtype
    assert torch.equal(got.images, sent)
    assert got.prompts == ["a", "ß ☕ \ud800"]
    assert got.call == 3


def test_infinities_nan_and_strided_tensors_arrive(ends: tuple[socket.socket, socket.socket]):
    sent = torch.tensor([[float("nan"), 1.0], [float("-inf"), 2.0]]).T
    send(ends[0], Scored(sent))
    got = receive(ends[1])
    assert isinstance(got, Scored)
    assert torch.equal(got.scores.nan_to_num(7), sent.nan_to_num(7))


def test_messages_larger_than_any_socket_buffer_arrive(ends: tuple[socket.socket, socket.socket]):
    sent = torch.randn(8, 3, 224, 224)
    writer = threading.Thread(target=send, args=(ends[0], Score(sent, ["p"] * 8, None)))
    writer.start()
    got = receive(ends[1])
    writer.join()
    assert isinstance(got, Score)
    assert torch.equal(got.images, sent)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (pickle.dumps({"type": "Ready"}) + bytes(64), "no frame"),
        (frame({}, magic=b"HTTP"), "no frame"),
        (struct.pack(">4sIQ", MAGIC, MAX_HEADER + 1, 0), "no frame"),
        (frame({}, size=2**60), "no frame"),
        (frame({"type": "System", "fields": {}, "tensors": []}), "malformed header: KeyError"),
        (frame({"type": "Forgotten", "fields": {"x": 1}, "tensors": []}), "malformed message"),
        (frame({"type": "Ready", "fields": {}, "tensors": []}), "malformed message"),
        (frame({"type": "Scored", "fields": {}, "tensors": [["scores", "object", [1]]]}), "malformed header"),
        (frame({"type": "Scored", "fields": {}, "tensors": [["scores", "float32", [2]]]}, bytes(4)), "do not fit"),
        (frame({"type": "Scored", "fields": {}, "tensors": [["scores", "float32", [-2]]]}, bytes(4)), "do not fit"),
        (frame([1, 2]), "malformed header"),
        (MAGIC[:2], "closed the connection"),
        (frame({"type": "Scored", "fields": {}, "tensors": [["scores", "float32", [2]]]}, bytes(8))[:-1], "closed"),
    ],
)
def test_what_is_no_message_is_refused(ends: tuple[socket.socket, socket.socket], data: bytes, complaint: str):
    ends[0].sendall(data)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=complaint):
        receive(ends[1])


def test_a_closed_connection_is_an_error_on_both_sides(ends: tuple[socket.socket, socket.socket]):
    ends[1].close()
    with pytest.raises(WireError):
        receive(ends[0])
    with pytest.raises(WireError):
        send(ends[0], Load("clip", None, {}, "cpu", 1))
