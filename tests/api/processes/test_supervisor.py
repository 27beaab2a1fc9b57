"""`api.processes.supervisor` restarts and ends real processes, which import nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.processes.supervised import PATIENCE
from tests.processes import eventually, is_alive, lines_of, skip_under_nohup, within, workers_of


class Supervised:
    """A supervisor in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "tests.api.processes.supervised", str(folder)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def ready(self) -> list[int]:
        """Returns the present workers that have said that they are ready."""
        told = {line["pid"] for line in lines_of(self.log, "a worker is ready")}
        return [pid for pid in workers_of(self.process.pid) if pid in told]

    def two_ready(self, *without: int) -> list[int]:
        """Waits until two workers are ready, none of which is `without`, and returns them."""

        def found() -> list[int]:
            ready = self.ready()
            return ready if len(ready) == 2 and not set(without) & set(ready) else []

        return eventually(found)

    def failures(self) -> list[dict[str, Any]]:
        """Returns the log's lines on starts that failed."""
        return lines_of(self.log, "a worker could not start")


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """Yields two workers, which may not be ready yet."""
    running = Supervised(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()
    sys.stdout.write(running.log.read_text())  # which pytest shows if the test failed


def test_a_worker_is_replaced_whatever_another_does(supervised: Supervised) -> None:
    """A killed worker is replaced before the silence of a stopped one is even noticed."""
    stopped, killed = supervised.two_ready()
    os.kill(stopped, signal.SIGSTOP)
    with within(PATIENCE.silence):
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: set(workers_of(supervised.process.pid)) - {stopped, killed})
    supervised.two_ready(stopped, killed)
    reasons = {line["pid"]: line["reason"] for line in lines_of(supervised.log, "a worker died, and is replaced")}
    assert reasons == {
        killed: "killed by SIGKILL",
        stopped: f"no sign of life for {PATIENCE.silence:g} seconds (killed by SIGKILL)",
    }


def test_a_replacement_that_cannot_start_is_tried_again_while_the_others_serve(supervised: Supervised) -> None:
    """Pauses between starts grow to a limit, each failure is logged with its reason, and a success ends them."""
    healthy, killed = supervised.two_ready()
    (supervised.folder / "broken").touch()
    os.kill(killed, signal.SIGKILL)
    failures = eventually(lambda: found if len(found := supervised.failures()) >= 4 else [])
    assert [line["again_in"] for line in failures[:4]] == [0.1, 0.2, 0.4, 0.4]
    assert {line["reason"] for line in failures} == {"the folder is broken (exit status 3)"}
    assert supervised.ready() == [healthy]
    (supervised.folder / "broken").unlink()
    assert healthy in supervised.two_ready()


def test_a_replacement_that_never_becomes_ready_is_killed_and_tried_again(supervised: Supervised) -> None:
    """A replacement has longer to become ready than a worker may be silent, and no more."""
    _, killed = supervised.two_ready()
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in workers_of(supervised.process.pid))
    (supervised.folder / "slow").touch()  # the healthy one falls silent too
    (failure, *_) = eventually(supervised.failures)
    assert failure["reason"] == f"no sign of life for {PATIENCE.start:g} seconds (killed by SIGKILL)"
    (supervised.folder / "slow").unlink()
    supervised.two_ready()


def test_it_fails_if_no_worker_can_ever_start(tmp_path: Path) -> None:
    """The supervisor exits with 1, and logs the reason."""
    (tmp_path / "broken").touch()
    supervised = Supervised(tmp_path)
    assert supervised.process.wait(timeout=90) == 1
    assert "no worker could start: the folder is broken" in supervised.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_its_workers(supervised: Supervised, number: signal.Signals) -> None:
    """A signal ends supervisor and workers in order, with status 0."""
    skip_under_nohup(number)
    supervised.two_ready()
    if number != signal.SIGTERM:
        os.killpg(supervised.process.pid, number)  # as a terminal does
    else:
        supervised.process.send_signal(number)
    assert supervised.process.wait(timeout=90) == 0
    assert [line["reason"] for line in lines_of(supervised.log, "a worker has ended")] == ["exit status 0"] * 2


@pytest.mark.parametrize(("signals", "seconds"), [(1, 30), (2, PATIENCE.end * 0.75)])
def test_a_worker_that_does_not_end_is_killed(supervised: Supervised, signals: int, seconds: float) -> None:
    """A worker that ignores SIGTERM is killed after the grace period, or at a second signal."""
    (supervised.folder / "stubborn").touch()
    supervised.two_ready()
    for sent in range(signals):
        supervised.process.terminate()
        eventually(lambda sent=sent: len(lines_of(supervised.log, "asked to end")) > sent)  # type: ignore[misc]
    with within(seconds):
        assert supervised.process.wait() == 0
    ended = lines_of(supervised.log, "a worker has ended")
    assert [line["reason"] for line in ended] == ["killed before it had finished (killed by SIGKILL)"] * 2


def test_nobody_is_to_blame_for_a_machine_that_stood_still(supervised: Supervised) -> None:
    """Workers are not replaced if they were silent while the supervisor was stopped too."""
    before = supervised.two_ready()
    os.killpg(supervised.process.pid, signal.SIGSTOP)
    time.sleep(PATIENCE.silence * 1.5)
    os.kill(supervised.process.pid, signal.SIGCONT)  # it finds them silent
    time.sleep(0.2)
    os.killpg(supervised.process.pid, signal.SIGCONT)
    time.sleep(PATIENCE.silence * 1.5)
    assert supervised.ready() == before


def test_workers_end_when_their_supervisor_is_killed(supervised: Supervised) -> None:
    """Workers end when their supervisor is killed, a stopped one too."""
    running = supervised.two_ready()
    os.kill(running[0], signal.SIGSTOP)
    supervised.process.kill()
    eventually(lambda: not any(map(is_alive, running)))
