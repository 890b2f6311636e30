"""The run's side of a worker: starts the process, asks it, and starts it again once when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowbench.errors import RunError, UsageError
from flowbench.scoring.workers.environment import site_folders
from flowbench.scoring.workers.wire import Failed, Load, Message, Ready, WireError, receive, send

LAST_WORDS = 40  # lines of a worker's output that are kept
# Run and worker take turns. Memory that a call frees stays with the worker for the next one (glibc's settings), since
# faulting its pages in again costs as much as a small model. And the worker's threads sleep between calls, instead of
# spinning on the cores that the run needs.
TURNS = {
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
    "MALLOC_MMAP_THRESHOLD_": str(2**29),
    "OMP_WAIT_POLICY": "PASSIVE",
}

# The overlay's packages come first, then the main environment's, with its .pth files (editable installs).
_BOOT = """
import json, site, sys
descriptor, parent, folders, path = json.loads(sys.argv[1])
for folder in folders:
    site.addsitedir(folder)
sys.path += [entry for entry in path if entry not in sys.path]
from flowbench.scoring.workers.child import main
main(descriptor, parent)
"""


class _DiedError(Exception):
    """The worker is gone."""


@dataclass
class _Connection:
    """A running worker: its process, our end of the socket, and the last lines that it wrote."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    words: deque[str]
    reader: threading.Thread

    def exchange(self, request: Message) -> Message:
        try:
            send(self.socket, request)
            return receive(self.socket)
        except WireError as error:
            raise _DiedError(self.end()) from error
        except BaseException:  # such as Ctrl-C: the reply would be taken for that of the next request
            self.end()
            raise

    def end(self) -> str:
        """Stop the process; how it ended, in words."""
        _stop(self.process, self.socket)
        self.reader.join(timeout=1)
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return f"{how}: {self.words[-1]}" if self.words else how


class Worker:
    """A reward in a process of another Python environment. Safe to call from several threads, one after another.

    Nobody else can speak to the process: the socket is a nameless pair of which it inherits one end. It ends with this
    process, however that ends.
    """

    def __init__(self, python: Path, load: Load, remedy: str) -> None:
        self.python, self.load, self.remedy = python, load, remedy
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._ready: Ready | None = None

    @property
    def pid(self) -> int | None:
        """Process number, None when it does not run."""
        return self._connection.process.pid if self._connection else None

    def start(self) -> Ready:
        """Start the process and load the reward.

        Raises RunError with the remedy when the process cannot start, or what the reward's `load` raises.
        """
        with self._lock:
            return self._start()

    def ask(self, *requests: Message) -> Message:
        """The reply to the last of these requests, between which no other thread's can come.

        A worker that dies is started again once, and asked again.
        Raises RunError when it dies twice or a request fails there.
        """
        with self._lock:
            return [self._ask_twice(request) for request in requests][-1]

    def stop(self) -> None:
        """End the process; the next request starts it again."""
        with self._lock:
            self._drop()

    def _ask_twice(self, request: Message) -> Message:
        deaths: list[str] = []
        for _ in range(2):
            try:
                self._start()
                assert self._connection is not None
                return self._checked(self._connection.exchange(request))
            except _DiedError as error:
                self._drop()
                deaths.append(str(error))
        raise self.gone(deaths[-1])

    def gone(self, how: str) -> RunError:
        """The error of a call in which the worker died twice."""
        return RunError(
            f"the worker of reward '{self.load.reward}' died twice in the same call ({how}); "
            "if memory ran out, lower training.decode_batch or training.microbatch"
        )

    def _start(self) -> Ready:
        if self._connection and self._ready and self._connection.process.poll() is None:
            return self._ready
        self._drop()
        self._connection = connection = _spawn(self.python)
        weakref.finalize(self, _stop, connection.process, connection.socket)
        try:
            reply = self._checked(connection.exchange(self.load))
        except _DiedError as error:
            self._drop()
            raise RunError(
                f"the worker of reward '{self.load.reward}' cannot start ({error}); {self.remedy}"
            ) from error
        except BaseException:
            self._drop()
            raise
        assert isinstance(reply, Ready)
        self._ready = reply
        return reply

    def _drop(self) -> None:
        if self._connection:
            self._connection.end()
        self._connection = self._ready = None

    def _checked(self, reply: Message) -> Message:
        if not isinstance(reply, Failed):
            return reply
        known = {"UsageError": UsageError, "RunError": RunError}.get(reply.error)
        name = self.load.reward
        error = (
            known(reply.message)
            if known and name in reply.message
            else (known or RunError)(f"reward '{name}' failed in its worker: {_described(reply, known is None)}")
        )
        error.add_note(reply.traceback)
        raise error


def _described(reply: Failed, foreign: bool) -> str:
    return f"{reply.error}: {reply.message}" if foreign else reply.message


def _spawn(python: Path) -> _Connection:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours_alone = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
    environment = TURNS | {k: v for k, v in os.environ.items() if k not in ours_alone}
    arguments = json.dumps([theirs.fileno(), os.getpid(), site_folders(), [p for p in sys.path if p]])
    try:
        process = subprocess.Popen(
            # -P: the current folder is no place to import from; own session: Ctrl-C reaches the run alone
            [str(python), "-P", "-c", _BOOT, arguments],
            stdin=subprocess.PIPE,  # never written to; it closes when this process ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env=environment,
        )
    finally:
        theirs.close()
    words: deque[str] = deque(maxlen=LAST_WORDS)
    reader = threading.Thread(target=_listen, args=(process, words.append), daemon=True)
    reader.start()
    return _Connection(process, ours, words, reader)


def _listen(process: subprocess.Popen[bytes], keep: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text := line.decode(errors="replace").strip():
            keep(text)


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        process.wait(timeout=2)  # it ends by itself when stdin closes
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
