"""`bench --break-even` compares the fetch of a prefix with the prefill of as many tokens, by length."""

import json
from pathlib import Path

import pytest

from prefix_service.cli.commands.break_even import FetchTime, Length, break_even, plot
from tests.cli.conftest import Run
from tests.conftest import CORPUS

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
BASE = CORPUS / "bases" / "llama"


def _lengths(*prefill: float) -> list[Length]:
    """Returns lengths of 16, 32, … tokens, whose fetches take a second, and half of one from the cache."""
    return [Length(16 << place, seconds, 1.0, 0.5) for place, seconds in enumerate(prefill)]


@pytest.mark.parametrize(
    ("prefill", "fetch", "cached"),
    [
        ((0.25, 0.75, 1.25), 48, 24),
        ((0.5, 1.0, 2.0), 32, 16),
        ((0.1, 0.2), None, None),
        ((2.0, 3.0), 16, 16),
        ((2.0, 0.5, 1.5), 48, 32),
    ],
)
def test_the_break_even_lies_between_two_lengths(
    prefill: tuple[float, ...], fetch: int | None, cached: int | None
) -> None:
    """It is on the line between the last length at which prefill wins and the next one."""
    lengths = _lengths(*prefill)
    assert break_even(lengths, lambda length: length.fetch_seconds) == fetch
    assert break_even(lengths, lambda length: length.cached_seconds) == cached
    assert break_even([], lambda length: length.fetch_seconds) is None


def test_a_fetch_takes_some_time_and_some_for_each_byte() -> None:
    """The line goes through both fetches; it never falls, and one fetch alone counts as it is."""
    assert FetchTime.of((10, 2.0), (30, 4.0)).seconds(50) == pytest.approx(6.0)
    assert FetchTime.of((10, 5.0), (30, 4.0)).seconds(50) == 4.0
    assert FetchTime.of((10, 4.0), (10, 4.0)).seconds(50) == 4.0
    assert FetchTime.of((10, 0.0), (30, 4.0)).seconds(0) == 0.0


def test_the_plot_fits_a_terminal() -> None:
    """The longest time has the longest bar, equal times have equal ones, and no line exceeds 80 columns."""
    lines = plot(_lengths(0.0001, 1000.0))
    assert max(map(len, lines)) <= 80
    bars = [sum(line.count(mark) for mark in "█▒░") for line in lines]
    assert (bars[0], bars[3], bars[1]) == (1, 46, bars[4])
    assert lines[0].split() == ["16", "prefill", "█", "0.10", "ms"]
    assert len(plot([Length(16, 1.0, 1.0, 1.0)])) == 3


def test_an_adapter_and_its_model_are_measured(run: Run, tmp_path: Path) -> None:
    """The adapter's own length is among the lengths, and none is beyond the model's positions."""
    run("publish", LLAMA, "clieven/a")
    done = run("bench", "clieven/a", "--break-even", "--model", BASE, "--most", "64", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["version"], found["measured_tokens"]) == (1, 20)
    assert [length["tokens"] for length in found["lengths"]][:3] == [16, 20, 32]
    for length in found["lengths"]:
        assert 0 < length["cached_seconds"] < length["fetch_seconds"]
        assert length["prefill_seconds"] > 0
    shown = run("bench", "clieven/a@1", "--break-even", "--model", BASE, "--most", "32", "--dtype", "bfloat16")
    assert shown.returncode == 0, shown.stderr
    assert f"clieven/a@1 on {BASE}, cpu; a fetch of 20 tokens is measured" in shown.stdout
    assert "Fetching is faster than the model's prefill " in shown.stdout
    assert "     20 prefill " in shown.stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--break-even", 2, "--break-even needs --model MODEL"),
        ("--model {base}", 2, "--model is for --break-even"),
        ("--break-even --model {base}/none", 1, "none cannot be loaded: there is no such folder"),
        ("--break-even --model {t5}", 1, "t5 cannot be loaded"),
        ("--break-even --model {gpt2}", 1, "the prefix has"),
    ],
)
def test_what_cannot_be_compared_is_said(run: Run, words: str, status: int, message: str) -> None:
    """Both options belong together, and the model must be one that the prefix fits."""
    run("publish", LLAMA, "clieven/a")
    bases = {"base": BASE, "t5": BASE.parent / "t5", "gpt2": BASE.parent / "gpt2"}
    failed = run("bench", "clieven/a", *words.format(**bases).split())
    assert failed.returncode == status, failed.stdout
    assert message in " ".join(failed.stderr.split())
