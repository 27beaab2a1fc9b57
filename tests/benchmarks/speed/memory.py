"""Measures the memory of a process, as the kernel counts it."""

import os
import re
from pathlib import Path


class Growth:
    """The growth of a process from the moment that this is made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again from what it has now
        self._before = resident(pid)

    def peak(self) -> int:
        """Returns the bytes of the highest peak since then, above what the process had."""
        return max(_status(self._pid, "VmHWM") - self._before, 0)


def resident(pid: int) -> int:
    """Returns the bytes that a process has now."""
    return _status(pid, "VmRSS")


def anonymous() -> int:
    """Returns the bytes that only this process has: neither files nor memory that it shares."""
    return _status(os.getpid(), "RssAnon")


def _status(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"process {pid} tells no {name}")
    return int(found[1]) * 1024
