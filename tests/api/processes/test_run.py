"""`api.processes.run` keeps a service of real processes alive when a part of it dies, hangs or cannot start."""

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.commands import run_process
from tests.conftest import Server, free_port, running_server
from tests.forked import run_forked
from tests.processes import eventually, is_alive, lines_of, skip_under_nohup, within, workers_of

_HANG = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))\n"
_LOST = "import os\nif 'PROMETHEUS_MULTIPROC_DIR' in os.environ: os.environ['PROMETHEUS_MULTIPROC_DIR'] = '/nowhere'\n"

_NO_PRCTL = """
import ctypes

class CDLL(ctypes.CDLL):
    def __getattr__(self, name):
        return (lambda *_: -1) if name == "prctl" else super().__getattr__(name)

ctypes.CDLL = CDLL
"""


def customized(folder: Path, code: str) -> dict[str, str]:
    """Returns an environment in which each Python process begins with this code."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@contextmanager
def two_workers(tmp_path: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Yields a service with two workers, both ready."""
    with running_server(tmp_path / "data", "--workers", "2", *options, environment=environment) as server:
        ready_of(server)
        yield server


def ready_of(server: Server, *without: int) -> list[int]:
    """Waits until two workers are ready, none of which is `without`, and returns them."""

    def found() -> list[int]:
        told = {line["pid"] for line in lines_of(server.log, "a worker is ready")}
        ready = [pid for pid in workers_of(server.process.pid) if pid in told]
        return ready if len(ready) == 2 and not set(without) & set(ready) else []

    return eventually(found, 120)


def answers(server: Server) -> bool:
    """Returns whether a request on a new connection is answered."""
    try:
        return httpx.get(f"{server.url}/livez", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def test_a_dead_worker_is_replaced_while_the_event_loop_of_another_stands_still(tmp_path: Path) -> None:
    """A dead worker is replaced immediately, and later one that hangs, although its other threads live."""
    with two_workers(tmp_path, environment=customized(tmp_path, _HANG)) as server:
        hanging, killed = ready_of(server)
        os.kill(hanging, signal.SIGUSR1)
        with within(12):
            os.kill(killed, signal.SIGKILL)
            eventually(lambda: set(workers_of(server.process.pid)) - {hanging, killed})
        ready_of(server, hanging, killed)
        assert all(answers(server) for _ in range(10))
        reasons = [line["reason"] for line in lines_of(server.log, "a worker died, and is replaced")]
        assert reasons == ["killed by SIGKILL", "no sign of life for 15 seconds (killed by SIGKILL)"]


def test_a_replacement_that_cannot_start_leaves_the_healthy_ones_alone(tmp_path: Path) -> None:
    """Healthy workers serve while a replacement is tried again, and the log says why it cannot start."""
    shared = tmp_path / "shared"
    environment = {"PREFIX_SHARED_DIR": str(shared), "PREFIX_UDS": str(tmp_path / "socket")}
    with running_server(
        tmp_path / "data", "--workers", "2", environment=environment, uds=tmp_path / "socket"
    ) as server:
        healthy, killed = ready_of(server)
        shared.rename(tmp_path / "aside")
        shared.write_text("no folder")
        os.kill(killed, signal.SIGKILL)
        failures = eventually(lambda: lines_of(server.log, "a worker could not start"))
        assert str(shared) in failures[0]["reason"]
        eventually(lambda: server.client().get("/readyz").status_code == 200)
        assert workers_of(server.process.pid)[0] == healthy
        shared.unlink()
        (tmp_path / "aside").rename(shared)
        assert healthy in ready_of(server)


def test_a_service_of_which_no_worker_can_start_fails(tmp_path: Path) -> None:
    """The service exits with 1 and the reason; here the folder of the workers' numbers is gone."""
    environment = customized(tmp_path, _LOST)
    arguments = ("serve", "--data-dir", tmp_path / "data", "--port", free_port(), "--workers", "2")
    failed = run_process(*map(str, arguments), environment=environment)
    assert failed.returncode == 1
    assert "no worker could start" in failed.stderr
    assert "/nowhere" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    """Workers of a killed supervisor end soon, stopped ones too, and the next service starts."""
    with two_workers(tmp_path) as server:
        workers = ready_of(server)
        os.kill(workers[0], signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_alive, workers)))
    with two_workers(tmp_path):
        pass


def test_the_folder_is_locked_until_the_last_worker_has_ended(tmp_path: Path) -> None:
    """Where the kernel does not kill workers (not Linux), they end when their supervisor's socket does. One that is
    stopped cannot, so the next service is refused until it has ended.
    """
    with two_workers(tmp_path, environment=customized(tmp_path, _NO_PRCTL)) as server:
        stopped, other = ready_of(server)
        os.kill(stopped, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not is_alive(other))
        with socket.create_server(("127.0.0.1", 0)) as taken:  # it ends in any case
            second = run_forked("serve", "--data-dir", server.data_dir, "--port", str(taken.getsockname()[1]))
        assert second.returncode == 1
        assert "another prefix-service runs on the data folder" in second.stderr
        os.kill(stopped, signal.SIGCONT)
        eventually(lambda: not is_alive(stopped))
    with running_server(tmp_path / "data"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_several_workers_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM, or the SIGHUP that a terminal sends to all processes as it closes, ends the service with status 0 once
    its workers have ended in order."""
    skip_under_nohup(number)
    with two_workers(tmp_path) as server:
        workers = ready_of(server)
        for pid in workers if number == signal.SIGHUP else ():
            os.kill(pid, number)
        server.process.send_signal(number)
        assert server.process.wait(timeout=90) == 0
        assert not any(map(is_alive, workers))
        ended = [line["reason"] for line in lines_of(server.log, "a worker has ended")]
        assert ended == ["exit status 0"] * 2
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stale_unix_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path, workers: str) -> None:
    """A start replaces a killed service's socket, and only owner and group may connect to the new one."""
    path = tmp_path / "socket"
    options = ("--workers", workers, "--uds", str(path))
    with running_server(tmp_path / "data", *options, uds=path) as first:
        first.process.kill()
        first.process.wait()
    assert path.is_socket()
    with running_server(tmp_path / "data", *options, uds=path) as server:
        assert path.stat().st_mode & 0o777 == 0o660
        other = run_forked("serve", "--data-dir", tmp_path / "other", *options)
        assert other.returncode == 1
        assert f"another program listens on {path}" in other.stderr
        assert server.client().get("/livez").status_code == 200
    assert not path.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_address_that_cannot_be_listened_on_is_told(tmp_path: Path, workers: str) -> None:
    """The error names a taken port, another machine's address, or a file in the socket's place."""
    file = tmp_path / "file"
    file.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (("--port", port), f"another program listens on 127.0.0.1:{port}"),
            (("--host", "192.0.2.1", "--port", port), f"cannot listen on 192.0.2.1:{port}: Cannot assign"),
            (("--host", "not a host"), "cannot listen on not a host: "),
            (("--uds", str(file)), "exists and is not a socket"),
            (("--uds", str(tmp_path / ("long" * 50))), "cannot listen on"),
        ):
            refused = run_forked("serve", "--data-dir", tmp_path / "data", "--workers", workers, *options)
            assert refused.returncode == 1
            assert words in refused.stderr


def test_localhost_is_every_address_of_this_machine(tmp_path: Path) -> None:
    """`localhost` listens on both addresses if this machine has two."""
    with running_server(tmp_path / "data", "--host", "localhost") as server:
        port = int(server.url.rpartition(":")[2])
        for family, *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
            with socket.socket(family) as connection:
                assert connection.connect_ex(address) in (0, errno.EADDRNOTAVAIL)
