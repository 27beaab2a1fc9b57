"""`bench` prints a small table of what this machine gets from this service."""

import json

from tests.cli.conftest import Run
from tests.conftest import CORPUS

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
BYTES = 3 * 2 * 2 * 20 * 8 * 4


def test_latency_and_bytes_a_second(run: Run) -> None:
    """`bench` has a row for the first fetch, for fetches one and many at a time, and for an unchanged version."""
    run("publish", LLAMA, "clibench/a")
    for seconds in ("0.2", "10"):  # a slow machine may need a second for two fetches
        done = run("bench", "clibench/a", "--seconds", seconds, "--concurrency", "2", "--json")
        told = json.loads(done.stdout)
        if all(row["requests"] > 1 for row in told["rows"][1:3]):
            break
    assert (told["version"], told["bytes"]) == (1, BYTES)
    first, one, two, same = told["rows"]
    assert [row["what"] for row in told["rows"]] == ["first fetch", "fetch", "fetch, 2 at a time", "unchanged (304)"]
    assert first["requests"] == 1
    for row in (one, two):
        assert row["requests"] > 1
        assert 0 < row["p50_seconds"] <= row["p99_seconds"]
        assert row["bytes_per_second"] == row["requests_per_second"] * BYTES
    assert same["bytes_per_second"] == 0
    shown = run("bench", "clibench/a@1", "--seconds", "0.2", "--dtype", "bfloat16")
    assert shown.stderr == ""
    assert f"clibench/a@1 = version 1, {BYTES / 2048:.1f} KiB, from http://" in shown.stdout
    assert "fetch, 8 at a time" in shown.stdout
    assert "unchanged" not in shown.stdout


def test_an_adapter_that_is_not_there(run: Run) -> None:
    """`bench` ends with one line of error if the adapter does not exist."""
    failed = run("bench", "clibench/none")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error (not-found): there is no clibench/none" in failed.stderr
