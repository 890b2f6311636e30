from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from PIL import Image

from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.record import load_record
from flowbench.registry import RewardInfo
from flowbench.reward import Reward, checked_score
from flowbench.rewards.jpeg import Jpeg
from flowbench.rewards.remote import Remote
from flowbench.scoring.remote import MAX_SIDE, FormatError, pack, read_scores, unpack
from flowbench.services.serving import Limits, RewardServer

CPU = torch.device("cpu")
TOKEN = "a secret"
TWO = base64.b64encode(bytes(11) + b"@").decode()  # 0, 0 and 2 as float32
PROMPTS = ("a red circle", "ß ☕", "", "x" * 3000)


def pictures(n: int = 4, height: int = 24, width: int = 16) -> torch.Tensor:
    """Images whose values are those of 8-bit files."""
    bytes_ = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0))
    return bytes_.float() / 255


class Judge(Reward):
    """Mean of the pixels plus the prompt's length; refuses one prompt, and is NaN for another."""

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        if "refuse" in prompts:
            raise RunError("the judge refuses this prompt")
        means = images.double().mean((1, 2, 3))
        lengths = torch.tensor([float("nan") if p == "nan" else len(p) for p in prompts])
        return means + lengths


@pytest.fixture(scope="module")
def judge() -> Reward:
    Judge.info = RewardInfo("judge", "tests", "none", (0.0, float("inf")), False, False, "A judge.")
    return Judge()


@pytest.fixture(scope="module")
def server(judge: Reward) -> Iterator[RewardServer]:
    with RewardServer(("127.0.0.1", 0), judge, TOKEN, Limits(body=200_000)) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield it
        it.shutdown()


@pytest.fixture
def client(server: RewardServer) -> Callable[..., Remote]:
    """A loaded client of the server; arguments as for `Remote`."""

    def make(**arguments: Any) -> Remote:
        reward = Remote(server.url, **{"token": TOKEN, "retries": 0, "timeout": 20.0, **arguments})
        reward.load(CPU)
        return reward

    return make


@pytest.fixture
def strange_server() -> Iterator[Callable[..., str]]:
    """Starts a server that answers each request with the next of (status, body) and waits before; returns its URL."""
    servers: list[HTTPServer] = []
    gone = threading.Event()

    def start(*replies: tuple[int, str], wait: float = 0.0) -> str:
        rest = list(replies)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer()

            def answer(self) -> None:
                status, body = rest.pop(0) if len(rest) > 1 else rest[0]
                gone.wait(wait)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        it = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(it)
        threading.Thread(target=it.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{it.server_port}"

    yield start
    gone.set()
    for it in servers:
        it.shutdown()
        it.server_close()


def body_of(**changed: Any) -> dict[str, Any]:
    return {**json.loads(pack(pictures(2), ("a", "b"), "png")), **changed}


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("form", ["png", "float32"])
def test_8_bit_images_and_any_prompts_arrive_unchanged_in_both_formats(form: Any):
    images, prompts = unpack(pack(pictures(), PROMPTS, form).encode())
    assert torch.equal(images, pictures())
    assert prompts == PROMPTS


def test_floats_are_exact_and_png_rounds_to_the_nearest_of_256():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack(pack(images, ("a", "b"), "float32").encode())[0], images)
    error = (unpack(pack(images, ("a", "b"), "png").encode())[0] - images).abs().max()
    assert 0.25 / 255 < error <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("form", ["png", "float32"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_remote_scores_are_those_of_the_served_reward(
    client: Callable[..., Remote], judge: Reward, form: str, batch: int
):
    got = checked_score(client(format=form, batch=batch), pictures(), PROMPTS)
    assert torch.equal(got, checked_score(judge, pictures(), PROMPTS))


def test_what_scores_there_is_part_of_the_provenance(client: Callable[..., Remote], server: RewardServer):
    seen = client().provenance()
    assert seen["url"] == server.url
    assert seen["scorer"]["reward"] == "judge"
    assert seen["scorer"]["range"] == [0.0, None]


def test_a_run_trains_on_a_remote_reward(
    flowbench_main: Callable[..., int],
    settings: Callable[..., list[str]],
    preset_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("FLOWBENCH_REWARD_TOKEN", TOKEN)
    jpeg = Jpeg()
    jpeg.load(CPU)
    with RewardServer(("127.0.0.1", 0), jpeg, TOKEN) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        where = ["--model", preset_file, "--device", "cpu", "--output", tmp_path]
        assert flowbench_main("run", "orw-cfm-w2", "--reward", it.url, *where, *settings()) == 0
        it.shutdown()
    (path,) = tmp_path.rglob("record.json")
    record = load_record(path)
    assert record.reward == it.url
    assert record.reward_provenance["scorer"]["reward"] == "jpeg"


def test_an_algorithm_that_needs_a_gradient_refuses_it(
    flowbench_main: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert flowbench_main("run", "refl", "--reward", "http://127.0.0.1:9") == 2
    assert "needs the reward's gradient" in capsys.readouterr().err


def test_a_refused_connection_is_one_line(server: RewardServer):
    with RewardServer(("127.0.0.1", 0), server.reward, TOKEN) as closed:
        url = closed.url
    with pytest.raises(RunError, match=rf"^reward server {url} refused the connection in 1 tries; start it with"):
        Remote(url, retries=0).load(CPU)


def test_a_slow_server_is_one_line(strange_server: Callable[..., str]):
    url = strange_server((200, "{}"), wait=5.0)
    with pytest.raises(RunError, match=r"did not reply within 0.1 s in 1 tries; give it more `timeout` or a smaller"):
        Remote(url, retries=0, timeout=0.1).load(CPU)


@pytest.mark.parametrize("token", ["wrong", None, "a secre", "a  secret"])
def test_a_wrong_token_is_one_line(server: RewardServer, token: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLOWBENCH_REWARD_TOKEN", raising=False)
    with pytest.raises(RunError, match="refuses the token; set FLOWBENCH_REWARD_TOKEN to its own"):
        Remote(server.url, token=token, retries=0).load(CPU)


def test_the_token_comes_from_the_environment(server: RewardServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLOWBENCH_REWARD_TOKEN", TOKEN)
    Remote(server.url, retries=0).load(CPU)


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (200, "<html>", "replied what is no score: invalid json"),
        (200, "[1, 2]", "replied what is no score"),
        (200, "{}", "replied what is no score: scores: field required"),
        (200, '{"scores": [1, 2]}', "replied what is no score: 2 scores for 4 images"),
        (200, '{"scores": ["a", 1, 2, 3]}', r"replied what is no score: scores\.0: "),
        (200, '{"scores": 3}', "replied what is no score: scores: "),
        (200, '{"scores": [1, 2, 3, NaN]}', "is nan for the prompt"),
        (500, '{"error": "no\\nmemory"}', "replied 500 to /score: no memory"),
        (404, "x" * 500, r"replied 404 to /score: x+ \.\.\.$"),
        (302, "", "replied 302 to /score"),
    ],
)
def test_a_malformed_reply_is_one_line(strange_server: Callable[..., str], status: int, body: str, complaint: str):
    reward = Remote(strange_server((200, "{}"), (status, body)), retries=0)
    reward.load(CPU)
    with pytest.raises(RunError, match=complaint) as raised:
        checked_score(reward, pictures(), PROMPTS)
    assert "\n" not in str(raised.value)


def test_what_is_no_reward_server_is_said(strange_server: Callable[..., str]):
    with pytest.raises(RunError, match=r"is no reward server: it describes itself by '<html>hello', not in JSON"):
        Remote(strange_server((200, "<html>hello")), retries=0).load(CPU)


def test_a_busy_server_is_asked_again(strange_server: Callable[..., str]):
    reward = Remote(strange_server((200, "{}"), (503, ""), (200, '{"scores": [1, 2, 3, 4]}')), retries=1)
    reward.load(CPU)
    assert reward.score(pictures(), PROMPTS).tolist() == [1, 2, 3, 4]


def test_a_server_that_stays_busy_is_one_line(strange_server: Callable[..., str]):
    with pytest.raises(RunError, match="replied 503 to /"):
        Remote(strange_server((503, "")), retries=1).load(CPU)


@pytest.mark.parametrize("url", ["http://", "http://:80", "http://127.0.0.1:99999"])
def test_what_is_no_address_is_one_line(url: str):
    with pytest.raises(RunError, match=r"reward server .* (is no valid address|cannot be reached|cannot be found)"):
        Remote(url, retries=0).load(CPU)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "needs an address; write --reward http://host:port"),
        ({"url": "http://x", "format": "jpeg"}, "takes format png or float32"),
        ({"url": "http://x", "batch": 0}, "batch >= 1"),
        ({"url": "http://x", "timeout": 0}, "timeout > 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], complaint: str):
    with pytest.raises(UsageError, match=complaint):
        Remote(**arguments)


def test_a_request_that_the_server_would_refuse_is_not_sent(client: Callable[..., Remote]):
    reward = client(format="float32")
    with pytest.raises(RunError, match=r"accepts 200000; lower its `batch` or take format png$"):
        reward.score(pictures(64), ("p",) * 64)
    assert client(format="float32", batch=2).score(pictures(64), ("p",) * 64).shape == (64,)


def post(server: RewardServer, data: Any, path: str = "/score", token: str = TOKEN) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(server.url + path, data=data, headers=headers, timeout=20, proxies={"http": ""})


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        ("", 400, "invalid json"),
        ("[]", 400, "an object"),
        (body_of(images=[]), 400, "images: "),
        (body_of(prompts=["a"]), 400, "2 images for 1 prompts"),
        (body_of(prompts=[1, 2]), 400, "prompts.0: "),
        (body_of(format="jpeg"), 400, "format: "),
        (body_of(extra=1), 400, "extra: "),
        (body_of(images=["!!", "!!"]), 400, "image 0 is not base64"),
        (body_of(images=["aaaa", "aaaa"]), 400, "image 0 is not a PNG file"),
        (body_of(images=[png(4, 4), png(4, 5)]), 400, "image 1 has 4 x 5 pixels, image 0 has 4 x 4"),
        (body_of(images=[png(MAX_SIDE + 1, 1)] * 2), 400, f"image 0 has {MAX_SIDE + 1} x 1 pixels; at most {MAX_SIDE}"),
        (body_of(format="float32"), 400, "format float32 needs shape"),
        (body_of(format="float32", shape=[3, 2, 2]), 400, "image 0 has "),
        (body_of(format="float32", shape=[1, 2, 2]), 400, "is not [3, height, width]"),
        (body_of(format="float32", shape=[3, 1, 1], images=[TWO] * 2), 400, "image 0 has values outside [0, 1]"),
        (body_of(prompts=["refuse", "b"]), 500, "the judge refuses this prompt"),
        (body_of(prompts=["nan", "b"]), 500, "is nan for the prompt"),
    ],
)
def test_a_bad_request_is_answered_in_a_line_and_the_server_goes_on(
    server: RewardServer, body: Any, status: int, complaint: str
):
    reply = post(server, body if isinstance(body, str) else json.dumps(body))
    assert reply.status_code == status
    assert complaint in reply.json()["error"]
    assert post(server, json.dumps(body_of())).status_code == 200


def test_the_server_refuses_too_large_bodies_unknown_places_and_strangers(server: RewardServer):
    assert post(server, "x", token="wrong").status_code == 401
    assert post(server, "x", path="/other").status_code == 404
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Length": "200001"}
    reply = requests.Request("POST", server.url + "/score", headers=headers).prepare()
    reply.headers["Content-Length"] = "200001"
    with requests.Session() as session:
        session.trust_env = False
        refused = session.send(reply, timeout=20)
    assert refused.status_code == 413
    assert "larger than 200000 bytes" in refused.json()["error"]


def test_a_port_that_is_taken_is_one_line(server: RewardServer):
    port = server.server_address[1]
    with pytest.raises(RunError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*; choose another --port"):
        RewardServer(("127.0.0.1", port), server.reward, TOKEN)


def test_the_command_serves_on_loopback_with_a_token_of_its_own(flowbench_process: Callable[..., Any]):
    process = flowbench_process("rewards", "serve", "jpeg", "--port", "0", FLOWBENCH_REWARD_TOKEN="")
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        url = re.fullmatch(r"jpeg at (http://127\.0\.0\.1:\d+)\n", first)[1]
        token = re.fullmatch(r"FLOWBENCH_REWARD_TOKEN=(\S{20,})\n", second)[1]
        reward = Remote(url, token=token, retries=0)
        reward.load(CPU)
        assert torch.equal(reward.score(pictures(), PROMPTS), Jpeg().score(pictures(), PROMPTS))
        with pytest.raises(RunError, match="refuses the token"):
            Remote(url, token="guess", retries=0).load(CPU)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("body", [b"", b"{", b"null", b'{"scores": null}', b'{"scores": [[1]]}', b"\xff"])
def test_what_is_no_reply_is_refused(body: bytes):
    with pytest.raises(FormatError):
        read_scores(body, 1)


def test_a_url_is_a_reward_whose_options_the_preset_gives(preset: Any, server: RewardServer):
    configured = preset.model_copy(
        update={"rewards": {server.url: {"token": TOKEN, "format": "float32", "retries": 0}}}
    )
    reward = build_reward(server.url, configured, CPU)
    assert isinstance(reward, Remote)
    assert reward.format == "float32"
