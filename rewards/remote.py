"""A reward that a server computes: `--reward http://host:port`; the format is that of docs/rewards/remote.md."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from flowbench.errors import RunError, UsageError
from flowbench.reward import Reward, register_reward

if TYPE_CHECKING:
    import requests


@register_reward(
    "remote",
    source="docs/rewards/remote.md",
    licence="the server's",
    range=(float("-inf"), float("inf")),
    differentiable=False,
)
class Remote(Reward):
    """Scores from a server over HTTP.

    url: of the server, as given by `--reward`; token: sent in the header, by default that of FLOWBENCH_REWARD_TOKEN;
    format: "png" (8 bits per value) or "float32" (exact); batch: images per request; timeout: seconds to wait for a
    connection or for more of a reply; retries: of requests that were refused, broken off or answered by 429, 502, 503,
    504, at once and then after 1, 2, 4, ... seconds.
    """

    def __init__(
        self,
        url: str = "",
        token: str | None = None,
        format: Literal["png", "float32"] = "png",
        batch: int = 64,
        timeout: float = 60.0,
        retries: int = 4,
    ) -> None:
        if not url:
            raise UsageError("reward 'remote' needs an address; write --reward http://host:port")
        if format not in ("png", "float32") or batch < 1 or timeout <= 0 or retries < 0:
            raise UsageError(
                "reward 'remote' takes format png or float32, batch >= 1, timeout > 0 and retries >= 0; "
                f"not {format}, {batch}, {timeout}, {retries}"
            )
        self.url, self.token, self.format = url.rstrip("/"), token, format
        self.batch, self.timeout, self.retries = batch, timeout, retries
        self.info = replace(type(self).info, name=url)

    def load(self, device: torch.device) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        from flowbench.scoring.remote import TOKEN

        retry = Retry(
            self.retries,
            backoff_factor=0.5,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,  # POST too: to score twice does no harm
            raise_on_status=False,
        )
        self.session = requests.Session()
        self.session.trust_env = "127.0.0.1" not in self.url and "localhost" not in self.url  # no proxy to oneself
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))
        if token := self.token or os.environ.get(TOKEN):
            self.session.headers["Authorization"] = f"Bearer {token}"
        self.scorer = self._described(self._ask("GET", "/"))

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        from flowbench.scoring.remote import FormatError, pack, read_scores

        scores, tells = [], self.scorer.get("metadata") is True
        for start in range(0, len(images), self.batch):
            part, texts = images[start : start + self.batch], prompts[start : start + self.batch]
            reply = self._ask("POST", "/score", self._fitting(pack(part, texts, self.format, metadata=tells)))
            try:
                scores.append(read_scores(reply.content, len(texts)))
            except FormatError as error:
                raise RunError(f"reward server {self.url} replied what is no score: {error}") from error
        return torch.cat(scores)

    def provenance(self) -> dict[str, Any]:
        return {"url": self.url, "format": self.format, "scorer": self.scorer}

    def _fitting(self, body: str) -> str:
        """The body, if the server has not said that it refuses one of that size."""
        limit = self.scorer.get("max_bytes")
        if isinstance(limit, int) and len(body) > limit:
            raise RunError(
                f"{self.batch} images make a request of {len(body)} bytes; reward server {self.url} accepts {limit}; "
                f"lower its `batch`{' or take format png' if self.format != 'png' else ''}"
            )
        return body

    def _ask(self, method: str, path: str, body: str | None = None) -> requests.Response:
        """The server's reply with status 200.

        Raises RunError, with what to do, for everything else.
        """
        import requests

        try:
            reply = self.session.request(
                method,
                self.url + path,
                data=body,
                headers={"Content-Type": "application/json"} if body else None,
                timeout=self.timeout,
                allow_redirects=False,
            )
        except requests.exceptions.RequestException as error:
            raise RunError(f"reward server {self.url} {self._fault(error)}") from error
        if reply.status_code == 401:
            raise RunError(f"reward server {self.url} refuses the token; set FLOWBENCH_REWARD_TOKEN to its own")
        if reply.status_code != 200:
            raise RunError(f"reward server {self.url} replied {reply.status_code} to {path}: {_reason(reply)}")
        return reply

    def _fault(self, error: requests.exceptions.RequestException) -> str:
        text = f"{type(error).__name__} {error}"
        tries = f"{self.retries + 1} tries"
        if "Timeout" in text or "timed out" in text:
            return f"did not reply within {self.timeout:g} s in {tries}; give it more `timeout` or a smaller `batch`"
        if "refused" in text:
            return f"refused the connection in {tries}; start it with 'flowbench rewards serve NAME'"
        if any(word in text for word in ("resolve", "resolution", "Name or service")):
            return "cannot be found; check the host's name"
        if any(word in text for word in ("InvalidURL", "LocationParseError", "Invalid URL", "LocationValueError")):
            return "is no valid address; write http://host:port"
        return f"cannot be reached in {tries}: {_one_line(str(error))}"

    def _described(self, reply: requests.Response) -> dict[str, Any]:
        try:
            content = reply.json()
        except ValueError as error:
            raise RunError(
                f"{self.url} is no reward server: it describes itself by {_one_line(reply.text)!r}, not in JSON"
            ) from error
        return content if isinstance(content, dict) else {"description": content}


def _reason(reply: requests.Response) -> str:
    try:
        content = reply.json()
    except ValueError:
        content = None
    return _one_line(str(content["error"]) if isinstance(content, dict) and "error" in content else reply.text)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:156] + " ..."
