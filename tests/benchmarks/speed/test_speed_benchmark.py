"""The benchmarks of README.md still run, and measure what they claim."""

import random
import subprocess
import sys
from itertools import pairwise, repeat
from pathlib import Path

import pytest

from tests.benchmarks.speed import __main__ as speed
from tests.benchmarks.speed import digests, peers
from tests.benchmarks.speed.harness import in_turns, ratio
from tests.benchmarks.speed.load import Reader, closed_loop, get, open_loop, redis
from tests.benchmarks.speed.memory import Growth
from tests.missing import not_tested

_MIB = 1 << 20
_HOLDS = "import sys\nfor line in sys.stdin:\n    held = b'x' * int(line)\n    print(len(held), flush=True)\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Returns a folder with 3 MB that nothing can compress, and a head."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "1.safetensors").write_bytes(random.Random(1).randbytes(3 * _MIB))  # noqa: S311
    (folder / "head.json").write_text("{}")
    return folder


def test_a_part_runs_and_finds_an_answer_for_every_peer_that_is_there() -> None:
    """The command's own function measures a small part; only CI must have the peers to install."""
    found = speed.run(["revalidation"], quick=True)["revalidation"]
    rates = {row[0]: float(row[1].split()[0].replace(",", "")) for row in found.grids[0].rows}
    assert {"ours", "Starlette route", "bare ASGI callable"} <= set(rates)
    assert all(rate > 0 for rate in rates.values())
    assert rates["bare ASGI callable"] > rates["ours"]  # else the client would be measured


def test_every_hasher_of_the_digests_part_hashes_all_bytes() -> None:
    """An algorithm gives one digest, whichever library computes it and however the bytes are cut."""
    body = memoryview(bytearray(random.Random(2).randbytes(3 * _MIB + 5)))  # noqa: S311
    found: dict[str, set[bytes]] = {}
    for name, make in digests.HASHERS.items():
        for cuts in ([0, len(body)], [0, 7, _MIB, len(body)]):
            hasher = make()
            for start, stop in pairwise(cuts):
                hasher.update(body[start:stop][:_MIB] if name == "memcpy" else body[start:stop])
            found.setdefault(name.partition(",")[0], set()).add(hasher.digest())
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 1)
    assert len(found) == 5


@pytest.mark.parametrize("program", ["nginx", "redis-server"])
def test_peers_send_the_bytes_that_they_were_given(program: str, files: Path, tmp_path: Path) -> None:
    """Each peer sends the framing, length and status that the wire part reads."""
    if not peers.version_of(program):
        not_tested(f"{program} is not installed")
    body = (files / "1.safetensors").read_bytes()
    if program == "nginx":
        with peers.nginx(files, tmp_path / "nginx") as address:
            assert address is not None
            with Reader(address) as reader:
                for _ in range(3):
                    assert len(body) < reader.read(get("/1.safetensors", address)) < len(body) + 1000
                with pytest.raises(RuntimeError, match="404"):
                    reader.read(get("/2.safetensors", address))
    else:
        with peers.redis({"1": body}) as address:
            assert address is not None
            with Reader(address, redis) as reader:
                for _ in range(3):
                    assert len(body) < reader.read(peers.command_of("GET", "1")) < len(body) + 20


def test_loads_count_every_answer_and_an_open_one_keeps_its_rate(files: Path) -> None:
    """Latencies, statuses and bytes agree; an open loop's requests fall due whatever the answers do."""
    size = (files / "1.safetensors").stat().st_size
    with peers.python_peer("one_object", files) as peer:
        address = peer.address
        request = get("/1", address)
        closed = closed_loop(address, repeat(request), 4, 0.5)
        opened = open_loop(address, repeat(request), 4, 1.0, rate=50)
    assert closed.statuses == {200: len(closed.latencies)}
    assert size < closed.nbytes / len(closed.latencies) < size + 1000
    assert 0.7 * 4 * 0.5 < sum(closed.latencies) <= 4 * closed.seconds  # four are under way until the time is over
    assert 25 < len(opened.latencies) < 85  # 50 of a Poisson process


def test_the_growth_of_a_process_is_its_peak_above_what_it_had() -> None:
    """Growth counts memory that was taken and given back, and not what the process had before."""
    with subprocess.Popen([sys.executable, "-c", _HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        output, stdout = process.stdin, process.stdout

        def hold(*sizes: int) -> None:
            for nbytes in sizes:
                output.write(f"{nbytes}\n".encode())
                output.flush()
                assert int(stdout.readline()) == nbytes

        hold(100 * _MIB, 1)
        growth = Growth(process.pid)
        hold(60 * _MIB, 1)
        grown = growth.peak()
        output.close()
    assert 59 * _MIB < grown < 62 * _MIB


def test_rounds_are_paired_and_in_turns() -> None:
    """A drift that doubles everything from round to round does not change the ratio."""
    order: list[str] = []
    clock = iter(range(100))

    def case(name: str, factor: float) -> float:
        order.append(name)
        return float(factor * 2 ** (next(clock) // 2))

    found = in_turns({"a": lambda: case("a", 1), "b": lambda: case("b", 3)}, rounds=4, warm_up=1)
    assert len(found["a"]) == 4
    assert "".join(order) == "baabbaabba"
    assert ratio(found["b"], found["a"]).median == 3
