"""A forked process makes a change when the parent asks for it, and can be killed at any call of it."""

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from prefix_service.errors import PrefixServiceError
from tests.crash.folder import serving, snapshot
from tests.crash.operations import OPERATIONS, Change

DONE: Final = "done"
_CHANGE, _LOOK = b"c", b"l"


class Child:
    """The parent's end of a child, which is forked after the imports, so that it costs milliseconds."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection
        self._answers = connection.makefile("rb")

    def change(self) -> str | None:
        """Makes the change; returns `done`, an error's code, a defect's traceback, or None if it was killed."""
        answer: str | None = self._ask(_CHANGE)
        return answer

    def look(self) -> Any:
        """Returns the snapshot that a reader in that process sees, or why there is none."""
        return self._ask(_LOOK)

    def _ask(self, question: bytes) -> Any:
        self._connection.send(question)
        try:
            return pickle.load(self._answers)  # noqa: S301 - from our own child
        except (EOFError, ConnectionResetError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # strace is done with it too
            return None

    def end(self) -> int:
        """Ends the child, and returns its status, or minus the signal that killed it."""
        self._answers.close()
        self._connection.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def forked(operation: str, case: str, data_dir: Path) -> Iterator[Child]:
    """Yields a child that has everything open and waits."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        _serve(operation, case, data_dir, there)
    there.close()
    here.recv(1)  # it is ready
    child = Child(pid, here)
    try:
        yield child
    finally:
        status = child.end()
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child of {operation!r} ended with {status}")


def _serve(operation: str, case: str, data_dir: Path, parent: socket.socket) -> NoReturn:
    """Answers the parent's questions with `send`, which is not among the counted calls."""
    try:
        with OPERATIONS[operation].act(data_dir, case) as change:
            parent.send(b"r")
            while question := parent.recv(1):
                answer = _outcome(change) if question == _CHANGE else _visible(data_dir)
                parent.sendall(pickle.dumps(answer))
    except BaseException:  # noqa: BLE001 - the parent must not run on in the child
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _outcome(change: Change) -> str:
    try:
        change()
    except PrefixServiceError as error:
        return error.code
    except Exception:  # noqa: BLE001 - it is told
        return traceback.format_exc()
    return DONE


def _visible(data_dir: Path) -> Any:
    try:
        with serving(data_dir) as service:
            return snapshot(service)
    except Exception:  # noqa: BLE001 - it is told
        return traceback.format_exc()
