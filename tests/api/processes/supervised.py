"""`python -m tests.api.processes.supervised FOLDER` runs a supervisor of two workers that import nothing, to test how
they end.

Files in the folder decide what workers do: with `broken` they cannot start, with `slow` they never become ready, with
`stubborn` they ignore SIGTERM, and otherwise they work.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from prefix_service.api.processes.supervisor import SIGN, Supervisor, Timeouts
from prefix_service.api.processes.worker import die_with
from prefix_service.errors import PrefixServiceError
from prefix_service.logs import configure

# A loaded machine takes seconds to start Python, so what a test waits for must take far longer.
PATIENCE = Timeouts(start=15, silence=4, end=8, first_pause=0.1, longest_pause=0.4)


def work(signs: socket.socket, started_by: int, folder: Path) -> None:
    """Gives signs of life until SIGTERM."""
    die_with(started_by)
    if (folder / "broken").exists():
        signs.sendall(b"the folder is broken")
        sys.exit(3)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if (folder / "stubborn").exists() else _end)
    while True:
        if not (folder / "slow").exists():
            signs.sendall(SIGN)
        time.sleep(0.1)


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    configure("info")
    from tests.api.processes import supervised  # by this name the workers find it

    try:
        Supervisor(2, supervised.work, (Path(sys.argv[1]),), lambda: None, supervised.PATIENCE).run()
    except PrefixServiceError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")  # noqa: PTH119
