"""The worker's side: holds one reward and answers its parent until that is gone."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flowbench.errors import RunError
from flowbench.registry import load_plugin_file, rewards
from flowbench.reward import Reward
from flowbench.scoring.workers.wire import (
    Backward,
    Failed,
    Forgotten,
    Gradient,
    Load,
    Message,
    Ready,
    Score,
    Scored,
    WireError,
    receive,
    send,
)

KEPT_GRAPHS = 2  # of calls whose gradient was not asked for yet; older ones are scored again if need be


@dataclass
class Server:
    """Answers requests for one reward."""

    reward: Reward | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    graphs: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=OrderedDict)

    def answer(self, request: Message) -> Message:
        """The reply; whatever goes wrong is a reply too."""
        try:
            match request:
                case Load():
                    return self._load(request)
                case Score():
                    return self._score(request)
                case Backward():
                    return self._backward(request)
            raise RunError(f"a worker does not answer {type(request).__name__}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the parent raises it again
            lines = str(error).strip().splitlines() or [""]
            return Failed(type(error).__name__, lines[0], traceback.format_exc())

    def _load(self, request: Load) -> Ready:
        torch.set_num_threads(request.threads)
        if request.plugin:
            load_plugin_file(Path(request.plugin))
        self.device = torch.device(request.device)
        self.reward = rewards.get(request.reward).cls(**request.arguments)
        self.reward.load(self.device)
        return Ready(self.reward.provenance())

    def _score(self, request: Score) -> Scored:
        assert self.reward is not None
        images, prompts = request.images.to(self.device), request.full_prompts()
        if request.call is None:
            with torch.no_grad():
                return Scored(torch.as_tensor(self.reward.score(images, prompts)).float())
        images.requires_grad_()
        scores = self.reward.score(images, prompts)
        if not scores.requires_grad:
            raise RunError("it is declared differentiable, but its scores have no gradient")
        self.graphs[request.call] = images, scores
        while len(self.graphs) > KEPT_GRAPHS:
            self.graphs.popitem(last=False)
        return Scored(scores)

    def _backward(self, request: Backward) -> Gradient | Forgotten:
        if request.call not in self.graphs:
            return Forgotten()
        images, scores = self.graphs.pop(request.call)
        (gradient,) = torch.autograd.grad(scores, images, request.cotangent.to(self.device))
        return Gradient(gradient)


def main(descriptor: int, parent: int) -> None:
    """Serve the inherited socket until the parent closes it or ends."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # packages print; nobody reads a worker's output
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection, server = socket.socket(fileno=descriptor), Server()
    while True:
        try:
            send(connection, server.answer(receive(connection)))
        except WireError:
            os._exit(0)  # at once: nothing here is worth the interpreter's orderly end


def _end_with(parent: int) -> None:
    """End this process, even in the middle of a call, when the parent ends: its end of our stdin closes then.

    A process forked off the parent would keep that end open, so the parent's number is looked at too.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 2.0)
        if readable and not os.read(0, 1):
            break
    os._exit(0)
