"""The measures of README.md, on a few hundred adapters."""

from pathlib import Path

from tests.benchmarks.growth.measure import measure


def test_everything_is_measured_and_ends(tmp_path: Path) -> None:
    """`measure` ends, and has figures for every operation, and delays for the long ones."""
    found = measure(tmp_path, 300)
    assert list(found)[:2] == ["start", "nothing"]
    assert {"backup", "deletion: rows", "collection"} < set(found)
    assert all(noticed.seconds > 0 for noticed in found.values())
    long_enough = [found[name] for name in ("nothing", "backup", "deletion: rows", "collection")]
    assert all(noticed.silence > 0 and noticed.wait > 0 for noticed in long_enough)
