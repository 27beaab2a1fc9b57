"""`system.line_writer`: who writes never waits, what is read late is whole, and what is dropped is counted."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from prefix_service.system.line_writer import LineWriter
from tests.processes import eventually

LINE = "x" * 999


class Reader:
    """A pipe that is read when a test says so."""

    def __init__(self) -> None:
        self._source, self.target = os.pipe()
        fcntl.fcntl(self.target, fcntl.F_SETPIPE_SZ, 4096)
        self.read = b""

    def lines(self) -> list[str]:
        """What has come so far, in whole lines."""
        os.set_blocking(self._source, False)
        try:
            while piece := os.read(self._source, 65536):
                self.read += piece
        except BlockingIOError:
            pass
        return self.read.decode().split("\n")[:-1]

    def close(self) -> None:
        """End both sides."""
        for end in (self._source, self.target):
            if end >= 0:
                os.close(end)
        self._source = self.target = -1


@pytest.fixture
def reader() -> Iterator[Reader]:
    opened = Reader()
    yield opened
    opened.close()


def test_a_reader_that_stopped_stops_nobody(reader: Reader) -> None:
    """More than the pipe holds is taken, and is there in order once the reader goes on."""
    dropped: list[int] = []
    writer = LineWriter(reader.target, dropped.append)
    for number in range(500):
        writer.write(f"{number} {LINE}")
    assert not writer.flush(0.01)
    eventually(lambda: len(reader.lines()) == 500)
    assert [line.split()[0] for line in reader.lines()] == [str(number) for number in range(500)]
    assert writer.flush()
    assert dropped == []


def test_what_is_dropped_is_counted(reader: Reader) -> None:
    """Beyond the bound, and told once the reader goes on; what comes then is written again."""
    dropped: list[int] = []
    writer = LineWriter(reader.target, dropped.append, most=20 * len(LINE))
    for _ in range(100):
        writer.write(LINE)
    assert dropped == []
    eventually(lambda: reader.lines() and sum(dropped) + len(reader.lines()) == 100)
    assert sum(dropped) >= 50
    writer.write("again")
    eventually(lambda: reader.lines()[-1] == "again")


def test_a_pipe_that_another_program_made_nonblocking(reader: Reader) -> None:
    """Lines are whole all the same."""
    os.set_blocking(reader.target, False)
    writer = LineWriter(reader.target, lambda _: None)
    for _ in range(50):
        writer.write(LINE)
    eventually(lambda: len(reader.lines()) == 50)
    assert set(reader.lines()) == {LINE}


def test_a_reader_that_is_gone_fails_nobody() -> None:
    """Lines are lost, and the thread goes on."""
    reader = Reader()
    os.close(reader._source)
    writer = LineWriter(reader.target, lambda _: None)
    reader._source = -1
    writer.write("lost")
    assert writer.flush(30)
    writer.write("lost, too")
    assert writer.flush(30)
    reader.close()


_LOGGING = """
import logging
from prefix_service.logs import configure
configure("info")
for number in range(3000):
    logging.getLogger("prefix_service").info("line %s", number)
"""


def test_at_the_end_of_a_process_every_line_is_written() -> None:
    """However slowly they are read: a process that ends waits for its reader."""
    with subprocess.Popen([sys.executable, "-c", _LOGGING], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert process.returncode == 0
    assert len(lines) == 3000
    assert '"line 2999"' in lines[-1]


def test_a_process_ends_though_nobody_reads() -> None:
    """After seconds, not never."""
    with subprocess.Popen([sys.executable, "-c", _LOGGING], stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0
