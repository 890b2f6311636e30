"""One request to a server that may be slow, endless or hostile: within a time, and within so many bytes."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

MOST_PATIENCE = 30.0  # seconds that a server may ask to be left alone


@dataclass(frozen=True)
class Reply:
    """A reply's status and body."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.content.decode("utf-8", errors="replace")


class TooLateError(Exception):
    """A request took longer, with all of its retries, than it may."""


class TooLongError(Exception):
    """A reply has more bytes than it may."""


class _Patient(Retry):
    """Retries that wait as long as the server asks, within reason."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        try:
            asked_for = super().get_retry_after(response)
        except (HTTPError, ValueError, OverflowError):  # what it asks for is no time
            return None
        return None if asked_for is None else min(asked_for, MOST_PATIENCE)


def make_session(url: str, retries: int) -> requests.Session:
    """A session that retries refused, broken and busy requests, and sends no credentials but its own headers."""
    retry = _Patient(
        retries,
        backoff_factor=0.5,
        status_forcelist=(429, 502, 503, 504),
        allowed_methods=None,  # POST too: to score twice does no harm
        raise_on_status=False,
    )
    session = requests.Session()
    session.trust_env = "127.0.0.1" not in url and "localhost" not in url  # no proxy to oneself
    session.auth = _as_it_is  # else a password of ~/.netrc would take the place of the token
    session.headers["Accept-Encoding"] = "identity"  # a few kilobytes may unpack to gigabytes
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def faults() -> tuple[type[Exception], ...]:
    """What `asked` raises for a server that cannot be reached or breaks off."""
    return requests.exceptions.RequestException, HTTPError, UnicodeError, OSError


def asked(
    session: requests.Session, method: str, url: str, body: str | None, timeout: float, deadline: float, most: int
) -> Reply:
    """The reply to a request; timeout: seconds for a connection and for more of the reply, deadline: for everything.

    Raises TooLateError, TooLongError, and what `faults` names.
    """
    done: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            done.put(_asked(session, method, url, body, timeout, time.monotonic() + deadline, most))
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            done.put(error)

    # A server that sends a byte now and then never times out: only another thread can stop waiting for it.
    threading.Thread(target=ask, daemon=True).start()
    try:
        found = done.get(timeout=deadline)
    except queue.Empty as error:
        raise TooLateError from error
    if isinstance(found, Exception):
        raise found
    return found


def _asked(
    session: requests.Session, method: str, url: str, body: str | None, timeout: float, until: float, most: int
) -> Reply:
    headers = {"Content-Type": "application/json"} if body else None
    with session.request(
        method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False, stream=True
    ) as reply:
        content = bytearray()
        for part in reply.raw.stream(2**14, decode_content=False):
            content += part
            if len(content) > most:
                raise TooLongError
            if time.monotonic() > until:
                raise TooLateError
        return Reply(reply.status_code, bytes(content))


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
