"""Runs strace on a process of ours, to see which calls change files, and to make one fail or kill."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.missing import not_tested

CALLS: Final = (
    "write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,rmdir,mkdir,mkdirat,truncate,ftruncate,fallocate,utimensat,copy_file_range,sendfile"
)
"""Every call that changes what is on the disk."""

_LINE: Final = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)(?: (\w+))?.*")
_UNFINISHED: Final = " <unfinished ...>"
_RESUMED: Final = re.compile(r"<\.\.\. \w+ resumed>")
_PATH: Final = re.compile(r"(?:^\d+<([^>]*)>|^\"([^\"]*)\"(?:, \"([^\"]*)\")?)")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a thread: its name, the file (and for a rename the new name), and the error that it met, which may have
    been `injected`.
    """

    thread: int
    name: str
    path: str
    to: str
    error: str
    injected: bool


@contextmanager
def traced(pid: int, output: Path, *inject: str, calls: str = CALLS) -> Iterator[None]:
    """Traces all threads of a process into a file until the block ends. `inject` has strace's own expressions, such as
    `fsync:error=EIO:when=2`; calls are counted for each thread, from the beginning of the block.
    """
    faults = [option for fault in inject for option in ("-e", f"inject={fault}")]
    command = ["strace", "-f", "-y", "-o", str(output), "-e", f"trace={calls}", *faults, "-p", str(pid)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if b"attached" not in line:
            raise RuntimeError(f"strace did not attach: {line!r}")
        yield
    finally:
        process.send_signal(signal.SIGINT)  # detach, if the process still lives
        process.stderr.close()
        process.wait(timeout=90)


def calls_in(output: Path) -> list[Call]:
    """Returns the calls of a trace, in the order of their ends."""
    found = []
    begun: dict[str, str] = {}
    for line in output.read_text(errors="replace").splitlines():
        thread = line.split(" ", 1)[0]
        if line.endswith(_UNFINISHED):  # another thread was heard in the middle of this call
            begun[thread] = line.removesuffix(_UNFINISHED)
            continue
        if (resumed := _RESUMED.search(line)) is not None:
            line = begun.pop(thread, "") + line[resumed.end() :]
        match = _LINE.fullmatch(line)
        if match is not None:
            number, name, arguments, _, error = match.groups()
            files = _PATH.match(arguments)
            first, second, third = files.groups() if files else (None, None, None)
            found.append(Call(int(number), name, first or second or "", third or "", error or "", "(INJECTED)" in line))
    return found


def why_not() -> str | None:
    """Returns why nothing can be traced on this machine, or None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    child = subprocess.Popen(["sleep", "60"])
    try:
        with traced(child.pid, Path(os.devnull)):
            return None
    except RuntimeError as error:
        return str(error)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.wait()


def require() -> None:
    """Skips a test loudly if nothing can be traced; in CI that is a failure."""
    reason = why_not()
    if reason is not None:
        not_tested(f"crashes and failing disks, because {reason}")
