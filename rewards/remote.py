"""A reward that a server computes: `--reward http://host:port`; the format is that of docs/rewards/remote.md."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from flowbench.errors import RunError, UsageError
from flowbench.registry import check_address
from flowbench.reward import Reward, register_reward

if TYPE_CHECKING:
    from flowbench.scoring.client import Reply

MOST_SAID = 2**16  # bytes in which a server describes itself: they go into the record
MOST_REPLIED = 2**22  # bytes of any other reply


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
    format: "png" (8 bits per value) or "float32" (exact); batch: images per request, fewer where the server says that
    it takes fewer pixels; timeout: seconds to wait for a connection or for more of a reply; retries: of requests that
    were refused, broken off or answered by 429, 502, 503, 504, at once and then after 1, 2, 4, ... seconds, or what the
    server asks for, at most 30; deadline: seconds for a request with all of its retries.
    """

    def __init__(
        self,
        url: str = "",
        token: str | None = None,
        format: Literal["png", "float32"] = "png",
        batch: int = 64,
        timeout: float = 60.0,
        retries: int = 4,
        deadline: float = 600.0,
    ) -> None:
        check_address(url)
        if not url:
            raise UsageError("reward 'remote' needs an address; write --reward http://host:port")
        if format not in ("png", "float32") or batch < 1 or timeout <= 0 or retries < 0 or deadline <= 0:
            raise UsageError(
                "reward 'remote' takes format png or float32, batch >= 1, timeout > 0, retries >= 0 and deadline > 0; "
                f"not {format}, {batch}, {timeout}, {retries}, {deadline}"
            )
        self.url, self.token, self.format = url.rstrip("/"), token, format
        self.batch, self.timeout, self.retries, self.deadline = batch, timeout, retries, deadline
        self.info = replace(type(self).info, name=url)

    def load(self, device: torch.device) -> None:
        from flowbench.scoring.client import make_session
        from flowbench.scoring.remote import TOKEN

        self.session = make_session(self.url, self.retries)
        if token := self.token or os.environ.get(TOKEN):
            self.session.headers["Authorization"] = f"Bearer {token}"
        self.scorer = self._described(self._ask("GET", "/", most=MOST_SAID))

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        from flowbench.scoring.remote import FormatError, pack, read_scores

        scores, tells = [], self.scorer.get("metadata") is True
        batch = self._batch(images)
        for start in range(0, len(images), batch):
            part, texts = images[start : start + batch], prompts[start : start + batch]
            reply = self._ask("POST", "/score", self._fitting(pack(part, texts, self.format, metadata=tells)))
            try:
                scores.append(read_scores(reply.content, len(texts)))
            except FormatError as error:
                raise RunError(f"reward server {self.url} replied what is no score: {error}") from error
        return torch.cat(scores)

    def provenance(self) -> dict[str, Any]:
        return {"url": self.url, "format": self.format, "scorer": self.scorer}

    def _batch(self, images: torch.Tensor) -> int:
        """Images in a request: `batch`, or as many as the server takes the pixels of."""
        limit = self.scorer.get("max_pixels")
        if not isinstance(limit, int) or limit < 1:
            return self.batch
        return max(1, min(self.batch, limit // max(images[0, 0].numel(), 1)))

    def _fitting(self, body: str) -> str:
        """The body, if the server has not said that it refuses one of that size."""
        limit = self.scorer.get("max_bytes")
        if isinstance(limit, int) and len(body) > limit:
            raise RunError(
                f"{self.batch} images make a request of {len(body)} bytes; reward server {self.url} accepts {limit}; "
                f"lower its `batch`{' or take format png' if self.format != 'png' else ''}"
            )
        return body

    def _ask(self, method: str, path: str, body: str | None = None, most: int = MOST_REPLIED) -> Reply:
        """The server's reply with status 200, of at most so many bytes.

        Raises RunError, with what to do, for everything else.
        """
        from flowbench.scoring.client import TooLateError, TooLongError, asked, faults

        try:
            reply = asked(self.session, method, self.url + path, body, self.timeout, self.deadline, most)
        except TooLateError as error:
            raise RunError(
                f"reward server {self.url} has not replied to {path} within {self.deadline:g} s; give it more "
                "`deadline` or a smaller `batch`"
            ) from error
        except TooLongError as error:
            raise RunError(
                f"reward server {self.url} replied to {path} with more than {most} bytes, which is no reply; check the "
                "address"
            ) from error
        except faults() as error:
            raise RunError(f"reward server {self.url} {self._fault(error)}") from error
        if reply.status == 401:
            raise RunError(f"reward server {self.url} refuses the token; set FLOWBENCH_REWARD_TOKEN to its own")
        if reply.status != 200:
            raise RunError(f"reward server {self.url} replied {reply.status} to {path}: {_reason(reply)}")
        return reply

    def _fault(self, error: BaseException) -> str:
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

    def _described(self, reply: Reply) -> dict[str, Any]:
        try:
            content = json.loads(reply.content)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{self.url} is no reward server: it describes itself by {_one_line(reply.text)!r}, not in JSON"
            ) from error
        return content if isinstance(content, dict) else {"description": content}


def _reason(reply: Reply) -> str:
    try:
        content = json.loads(reply.content)
    except (ValueError, RecursionError):
        content = None
    return _one_line(str(content["error"]) if isinstance(content, dict) and "error" in content else reply.text)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:156] + " ..."
