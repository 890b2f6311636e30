"""`flowbench rewards serve`: the reference server of remote rewards (docs/rewards/remote.md)."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from flowbench import __version__
from flowbench.errors import RunError, UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.models.devices import pick_device
from flowbench.models.presets import load_preset
from flowbench.prompts.needs import lacking
from flowbench.reward import Reward, checked_score
from flowbench.scoring.remote import TOKEN, FormatError, unpack
from flowbench.terms import combined_info, parse_reward


@dataclass(frozen=True)
class Limits:
    """body: bytes of one request; idle: seconds that a connection may stay silent."""

    body: int = 256 * 2**20
    idle: float = 60.0


class RewardServer(ThreadingHTTPServer):
    """Scores images for whoever knows the token; one request at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reward: Reward, token: str, limits: Limits = Limits()) -> None:
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            host, port = address
            raise RunError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
        self.reward, self.token, self.limits, self.lock = reward, token, limits, threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def describe(self) -> dict[str, Any]:
        """What `GET /` tells: which reward scores here, with which weights."""
        info = self.reward.info
        return {
            "reward": info.name,
            "source": info.source,
            "licence": info.licence,
            "range": [None if bound in (float("inf"), float("-inf")) else bound for bound in info.range],
            "provenance": self.reward.provenance(),
            "max_bytes": self.limits.body,
            "metadata": True,
            "needs_metadata": list(info.needs_metadata),
            "flowbench": __version__,
        }

    @torch.no_grad()
    def score(self, body: bytes) -> dict[str, Any]:
        """The reply to a request's body.

        Raises FormatError for a bad request, RunError for a bad score.
        """
        images, prompts = unpack(body)
        for i, prompt in enumerate(prompts):
            if what := lacking(self.reward.info, prompt):
                raise FormatError(f"reward '{self.reward.info.name}' needs {what} of every prompt; prompt {i} has none")
        with self.lock:
            return {"scores": checked_score(self.reward, images, prompts).tolist()}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = f"flowbench/{__version__}"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.idle)

    def do_GET(self) -> None:
        if self._known():
            if self.path == "/":
                self._reply(HTTPStatus.OK, self.server.describe())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there are GET / and POST /score")

    def do_POST(self) -> None:
        if not self._known():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._refuse(HTTPStatus.NOT_FOUND, "there are GET / and POST /score")
        elif not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        elif int(length) > self.server.limits.body:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {self.server.limits.body} bytes"
            )
        else:
            self._score(self.rfile.read(int(length)))

    def _score(self, body: bytes) -> None:
        try:
            self._reply(HTTPStatus.OK, self.server.score(body))
        except FormatError as error:
            self._reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception as error:  # noqa: BLE001 - the server outlives a failed request, and says why it failed
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})

    def _known(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return True
        self._refuse(HTTPStatus.UNAUTHORIZED, "wrong or missing token")
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        """Refuse a request whose body, if any, stays unread; the connection cannot go on then."""
        self.close_connection = True
        self._reply(status, {"error": why})

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; prompts may be confidential."""


def serve_reward(
    name: str, model: str, device: str, address: tuple[str, int], limits: Limits, say: Callable[[str], None]
) -> None:
    """Serve a reward, as a model's preset configures it, until interrupted.

    Raises UsageError for an unknown reward or device, or a reward that needs reference images, which are not sent;
    RunError when weights are missing or the port is taken.
    """
    if combined_info(parse_reward(name)).needs_reference:
        raise UsageError(f"reward '{name}' needs reference images, which are not sent over HTTP; run it in the run")
    reward = build_reward(name, load_preset(model), pick_device(device))
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    with RewardServer(address, reward, token, limits) as server:
        say(f"{name} at {server.url}")
        if not os.environ.get(TOKEN):
            say(f"{TOKEN}={token}")
        server.serve_forever()
