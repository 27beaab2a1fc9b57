"""`bash tests/gpu/run` runs every test that needs a GPU, and reports what it could not run."""

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import connector, rows, service, timings


def test_every_test_that_needs_a_gpu_is_in_a_folder_that_is_run() -> None:
    """A test with the mark `cuda` elsewhere would never run."""
    marked = service.marked()
    assert len(marked) >= 4
    assert marked <= service.run_files()


def test_without_a_gpu_the_table_says_what_was_not_run_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that was not asked for has a row too, and one row that did not pass fails the whole."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(service, "rows", lambda: [rows.Row("service", "streams", rows.NOT_RUN, "no CUDA device")])
    assert command.main(["service"]) == 1
    printed = capsys.readouterr()
    assert "| service | streams | NOT RUN | no CUDA device |" in printed.out
    for part in (connector.PART, timings.PART):
        assert f"| {part} | all | NOT RUN | this part was not asked for |" in printed.out
    assert "NO GPU" in printed.err
    assert "0 of 3 rows passed" in printed.err


def test_a_check_that_fails_is_a_row_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The checks behind it are run too. A row has the end of a long error, and stderr all of it."""

    def fail(told: str) -> str:
        raise ValueError(told)

    assert rows.attempt("connector", "graphs", lambda: fail("too far\napart")) == rows.Row(
        "connector", "graphs", "FAILED", "ValueError: too far apart"
    )
    told = rows.attempt("connector", "graphs", lambda: fail("vLLM ended:\n" + "log " * 200 + "no memory")).told
    assert told.startswith("ValueError: …")
    assert told.endswith("log no memory")
    assert "ValueError: vLLM ended:\nlog log" in capsys.readouterr().err
    assert rows.attempt("connector", "graphs", lambda: "0.1").result == "passed"


def test_an_unknown_part_is_an_error() -> None:
    """The error lists the parts."""
    with pytest.raises(SystemExit, match="there is no part servise: choose of service, connector, benchmarks"):
        command.main(["servise"])
