"""`inspect --precision` shows what each pair of dtypes costs a model's predictions of a text."""

import json
import math
from pathlib import Path

import pytest
import torch

from prefix_service.cli.commands.precision import plot
from prefix_service.client.prefixes.precision import PairCost, _difference
from tests.cli.conftest import Run
from tests.conftest import CORPUS

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"


def test_a_version_is_measured(run: Run, model: Path, tmp_path: Path) -> None:
    """Every pair is in the table and in the plot, the largest first, within 80 columns; `--json` has the numbers."""
    (tmp_path / "text").write_text("You answer shortly. " * 30)
    run("publish", LLAMA, "clip/a")
    options = ("--precision", "--model", model, "--text", tmp_path / "text", "--most", "30")
    found = json.loads(run("inspect", "clip/a", *options, "--json").stdout)
    assert (found["version"], found["tokens"], len(found["pairs"])) == ("clip/a@1", 30, 16)
    assert (found["pairs"][0]["key_dtype"], found["pairs"][0]["divergence"]) == ("float32", 0)
    assert found["pairs"][-1]["value_dtype"] == "float8_e4m3fn"
    sizes = [pair["nbytes"] for pair in found["pairs"]]
    assert sizes == sorted(sizes, reverse=True)
    done = run("inspect", "clip/a", *options)
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    assert title == f"clip/a@1 on {model}: 30 tokens of {tmp_path / 'text'}"
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("float8") for line in lines) == 4
    assert sum("█" in line for line in lines) == 16


def test_the_plot_marks_the_pairs_that_no_other_beats() -> None:
    """A pair is marked unless another one has neither more bytes nor a larger divergence; the bars are logarithms."""
    numbers = [(800, 0.0), (600, 1e-6), (600, 1e-5), (400, 1e-3), (400, 1e-3), (200, 1e-2)]
    lines = plot([PairCost("float32", "float16", nbytes, cost, 0, 9) for nbytes, cost in numbers])
    assert ["*" in line for line in lines] == [True, True, False, True, True, True]
    bars = [line.count("█") for line in lines]
    assert (bars[0], bars[-1]) == (1, 32)
    assert bars == sorted(bars)
    assert len(plot([PairCost("float32", "float32", 8, 0.0, 0, 9)])) == 1


def test_a_dtype_that_does_not_hold_the_numbers_has_no_bound() -> None:
    """Keys beyond float16's range are infinite there, and the model predicts nothing: its bar is the longest."""
    unlike = torch.tensor([[0.0, 1.0]]), torch.full((1, 2), float("nan"))
    cost, changed = _difference([unlike[0]], [unlike[1]])
    assert (cost, changed) == (math.inf, 1)
    costs = [PairCost("float32", "float32", 8, 0.0, 0, 9), PairCost("float16", "float16", 4, cost, changed, 9)]
    assert [line.count("█") for line in plot(costs)] == [1, 32]
    assert plot(costs)[1].endswith(" inf")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--precision --model {model}", 2, "--precision needs --model MODEL and --text FILE"),
        ("--text {text}", 2, "these are for --precision"),
        ("--precision --model {model} --text {empty}", 1, "empty is empty"),
        ("--precision --model {model} --text {binary}", 1, "binary cannot be read"),
        ("--precision --model {model} --text {text}", 1, "has positions for 96"),
        ("--precision --model {model}/none --text {text}", 1, "none cannot be loaded: there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_said(
    run: Run, model: Path, tmp_path: Path, words: str, status: int, message: str
) -> None:
    """The options belong together, and the model must have room for the text."""
    run("publish", LLAMA, "clip/a")
    files = {"text": b"one two " * 200, "empty": b"", "binary": b"\xff\xfe\xfd"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    failed = run("inspect", "clip/a", *words.format(model=model, **{name: tmp_path / name for name in files}).split())
    assert failed.returncode == status, failed.stdout
    assert message in " ".join(failed.stderr.split())
