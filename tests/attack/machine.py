"""The machine beside a trial: `python -m tests.attack.machine`, which `tests.attack.trial` starts.

A virtual machine can lose its memory to its host for a moment. Then every process is slow, in the time of the processor
too, without a page fault or stolen time that the guest could count. A process that walks through memory of its own,
always in the same way, notices.
"""

import json
import statistics
import sys
import time
from typing import Final

_MEMORY: Final = 32 << 20  # bytes
_STRIDE: Final = 16 << 10
_PAUSE: Final = 0.003


def _walk(memory: bytearray) -> float:
    """Returns the processor's seconds that a walk takes: about 0.0001."""
    began = time.thread_time()
    sum(memory[::_STRIDE])
    return time.thread_time() - began


def stalled(seconds: float, memory: bytearray) -> float:
    """Walks for so long; returns how many seconds longer than usual the longest walk took."""
    until = time.monotonic() + seconds
    walks: list[float] = []
    while time.monotonic() < until or len(walks) < 2:
        walks.append(_walk(memory))
        time.sleep(_PAUSE)
    return max(walks) - statistics.median(walks)


def main() -> None:
    """Read for how long from the first line of standard input, wait for the second, and write what was seen."""
    given = json.loads(sys.stdin.readline())
    memory = bytearray(b"\1") * _MEMORY
    print("ready", flush=True)  # noqa: T201 - the trial waits for it
    sys.stdin.readline()
    json.dump(stalled(given["seconds"], memory), sys.stdout)


if __name__ == "__main__":
    main()
