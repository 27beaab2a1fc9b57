"""The memory of a process, as the kernel counts it."""

import re
from collections.abc import Callable
from pathlib import Path


def resident(pid: int) -> int:
    """Bytes that it has now."""
    return _status(pid, "VmRSS")


def peak_growth(pid: int, work: Callable[[], object]) -> int:
    """How much the peak while something is done lies above what the process had before, in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again from what it has now
    before = resident(pid)
    work()
    return max(_status(pid, "VmHWM") - before, 0)


def _status(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"process {pid} tells no {name}")
    return int(found[1]) * 1024
