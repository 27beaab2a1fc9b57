"""A soak in short: every step succeeds, and closes what it opened."""

from pathlib import Path

from tests.soak.__main__ import soaked
from tests.soak.flat import line


def test_what_is_opened_is_closed(tmp_path: Path) -> None:
    """Descriptors and threads do not grow while callers come and go; only the long form judges memory."""
    samples, churn = soaked(tmp_path, 0.13, lambda _part: None)
    assert not churn.unexpected
    assert churn.has_begun()
    for name in ("descriptors", "threads"):
        values = getattr(samples, name)
        assert values[-1] <= max(values[: len(values) // 2]) + 5, name


def test_a_slope_has_an_error() -> None:
    """Noise around a constant does not count as growth, and a line in the same noise does."""
    times = [float(second) for second in range(200)]
    noise = [(7 * second % 11) - 5.0 for second in range(200)]
    assert not line(times, noise).grows(0)
    climbing = line(times, [value + 0.1 * second for second, value in zip(times, noise, strict=True)])
    assert abs(climbing.slope - 0.1) < 0.01
    assert climbing.grows(0)
