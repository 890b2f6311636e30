"""`flowbench rewards serve`: the reference server of remote rewards (docs/rewards/remote.md)."""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from flowbench import __version__
from flowbench.errors import RunError, UsageError, described, first_fault
from flowbench.evaluation.judges import build_reward
from flowbench.models.devices import pick_device
from flowbench.models.presets import load_preset
from flowbench.prompts import Prompt
from flowbench.prompts.needs import lacking
from flowbench.reward import Reward, checked_score
from flowbench.scoring.remote import TOKEN, FormatError, unpack
from flowbench.services.connections import Connections
from flowbench.terms import combined_info, parse_reward


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    body: bytes of a request; pixels: of all of its images together, which are looked at before one is decoded; idle:
    seconds that a connection may wait between requests, and for a request's head; transfer: seconds in which a body
    must have arrived, and a reply be taken; connections: at a time.
    """

    body: int = 256 * 2**20
    pixels: int = 8 * 2**20
    idle: float = 60.0
    transfer: float = 120.0
    connections: int = 64


HEALTH = "/health"
PLACES = f"there are GET /, GET {HEALTH} and POST /score"
_LENGTH = re.compile("[0-9]{1,15}")
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

logger = logging.getLogger("flowbench")


class RewardServer(ThreadingHTTPServer):
    """Scores images for whoever knows the token; one request at a time."""

    daemon_threads = True
    request_queue_size = 512  # whoever knocks meanwhile is not turned away by the system

    def __init__(self, address: tuple[str, int], reward: Reward, token: str, limits: Limits = Limits()) -> None:
        try:
            super().__init__(address, _Handler)
        except (OSError, UnicodeError) as error:
            raise _unusable(address, error) from error
        self.reward, self.token, self.limits, self.lock = reward, token, limits, threading.Lock()
        self.connections = Connections(limits.connections)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, or refuse it where all are at work."""
        if self.connections.admit(request, self.limits.idle):
            super().process_request(request, client_address)
            return
        try:
            request.settimeout(0)
            request.send(_BUSY)
        except OSError:
            pass  # gone, or it does not listen: it would have been refused anyway
        super().shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.leave(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close, twice a second, the connections whose time is over."""
        self.connections.expire()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke off, and of any other error its kind alone: requests are secret."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError | ValueError):
            logger.warning("a request could not be answered: %s", type(error).__name__)

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
            "max_pixels": self.limits.pixels,
            "metadata": True,
            "needs_metadata": list(info.needs_metadata),
            "flowbench": __version__,
        }

    @torch.no_grad()
    def score(self, body: bytes) -> dict[str, Any]:
        """The reply to a request's body.

        Raises FormatError for a bad request, RunError for a bad score.
        """
        with self.lock:  # one at a time is decoded, too: many at once would take the memory of all
            return self._scored(*unpack(body, self.limits.pixels))

    def _scored(self, images: torch.Tensor, prompts: tuple[Prompt, ...]) -> dict[str, Any]:
        for i, prompt in enumerate(prompts):
            if what := lacking(self.reward.info, prompt):
                raise FormatError(f"reward '{self.reward.info.name}' needs {what} of every prompt; prompt {i} has none")
        return {"scores": checked_score(self.reward, images, prompts).tolist()}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = f"flowbench/{__version__}"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.idle)

    def handle_one_request(self) -> None:
        """One request, for which the connection may wait a while."""
        self.server.connections.enter(self.request, "waiting", self.server.limits.idle)
        super().handle_one_request()

    def do_GET(self) -> None:
        if self.path == HEALTH:
            self._reply(HTTPStatus.OK, {"status": "ok"})  # to anybody, and it says nothing else
        elif self._known():
            if self.path == "/":
                self._reply(HTTPStatus.OK, self.server.describe())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, PLACES)

    def do_POST(self) -> None:
        if not self._known():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._refuse(HTTPStatus.NOT_FOUND, PLACES)
        elif "Transfer-Encoding" in self.headers or not _LENGTH.fullmatch(length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing or no number")
        elif int(length) > self.server.limits.body:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {self.server.limits.body} bytes"
            )
        else:
            self.server.connections.enter(self.request, "receiving", self.server.limits.transfer)
            body = self.rfile.read(int(length))
            if len(body) < int(length):  # it broke off
                self.close_connection = True
                return
            self.server.connections.enter(self.request, "working")
            self._score(body)

    def _score(self, body: bytes) -> None:
        try:
            self._reply(HTTPStatus.OK, self.server.score(body))
        except FormatError as error:
            self._reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except OSError:
            raise
        except RunError as error:
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
        except Exception as error:  # noqa: BLE001 - the server outlives a failed request, and says why it failed
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": described(error)})

    def _known(self) -> bool:
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if hmac.compare_digest(given, f"Bearer {self.server.token}".encode(errors="replace")):
            return True
        self._refuse(HTTPStatus.UNAUTHORIZED, "wrong or missing token")
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        """Refuse a request whose body, if any, stays unread; the connection cannot go on then."""
        self.close_connection = True
        self._reply(status, {"error": why})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The answer to what is no request; nothing of it is repeated."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        self._reply(HTTPStatus(code), {"error": HTTPStatus(code).phrase.lower()})

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self.server.connections.enter(self.request, "replying", self.server.limits.transfer)
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

    Raises UsageError for an unknown reward or device, an empty host, or a reward that needs reference images, which are
    not sent; RunError when weights are missing or the port is taken.
    """
    if not address[0].strip():
        raise UsageError("--host is empty; write 127.0.0.1 for this machine alone, or 0.0.0.0 for every network")
    if combined_info(parse_reward(name)).needs_reference:
        raise UsageError(f"reward '{name}' needs reference images, which are not sent over HTTP; run it in the run")
    _check_free(address)  # before weights are loaded
    reward = build_reward(name, load_preset(model), pick_device(device))
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    with RewardServer(address, reward, token, limits) as server:
        say(f"{name} at {server.url}")
        if not os.environ.get(TOKEN):
            say(f"{TOKEN}={token}")
        server.serve_forever()


def _check_free(address: tuple[str, int]) -> None:
    """Raise RunError for an address that cannot be listened on."""
    try:
        socket.create_server(address).close()
    except (OSError, UnicodeError, TypeError) as error:  # the last for what cannot be encoded as a host
        raise _unusable(address, error) from error


def _unusable(address: tuple[str, int], error: Exception) -> RunError:
    host, port = address
    return RunError(f"cannot listen on {host}:{port}: {first_fault(error)}; choose another --port or --host")
