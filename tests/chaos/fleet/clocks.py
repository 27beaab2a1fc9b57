"""Wall clocks of processes, each of which can be moved while its process runs."""

import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("clock.c")


def library(folder: Path) -> Path | None:
    """Builds what processes preload; returns None without a C compiler."""
    made = folder / "clock.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", made, _SOURCE, "-ldl"], check=True)
    except FileNotFoundError:
        return None
    return made


class Clock:
    """The wall clock of the processes that are started with its `environment`."""

    def __init__(self, file: Path, preloaded: Path | None) -> None:
        self._file = file
        self.environment = {} if preloaded is None else {"LD_PRELOAD": str(preloaded), "CLOCK_OFFSET": str(file)}
        self.move(0)

    def move(self, seconds: int) -> None:
        """Sets how far the clock is ahead of the machine's."""
        packed = struct.pack("=q", seconds)
        if self._file.exists():  # processes have mapped it
            with self._file.open("r+b", buffering=0) as file:
                file.write(packed)
        else:
            self._file.write_bytes(packed)
