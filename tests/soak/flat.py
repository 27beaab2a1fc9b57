"""Decides whether a quantity stays flat, by the slope of a line through its samples and the slope's error."""

from dataclasses import dataclass
from math import inf, sqrt


@dataclass(frozen=True, slots=True)
class Line:
    """The `slope` per second with its standard `error`, of samples of mean `mean`."""

    slope: float
    error: float
    mean: float

    def grows(self, tolerated: float) -> bool:
        """Returns whether the slope exceeds `tolerated` by two standard errors."""
        return self.slope - 2 * self.error > tolerated


def line(times: list[float], values: list[float]) -> Line:
    """Returns the line of least squares. Neighbouring samples of a process depend on each other, so the error is that
    of the means of 20 equal spans of time, not of single samples."""
    first, last = times[0], times[-1]
    spans: list[list[tuple[float, float]]] = [[] for _ in range(20)]
    for time, value in zip(times, values, strict=True):
        spans[min(int(20 * (time - first) / (last - first or 1)), 19)].append((time, value))
    points = [(_mean([t for t, _ in span]), _mean([v for _, v in span])) for span in spans if span]
    mean_t, mean_v = _mean([t for t, _ in points]), _mean([v for _, v in points])
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    slope = sum((t - mean_t) * (v - mean_v) for t, v in points) / spread if spread else 0.0
    if len(points) < 3:
        return Line(slope, inf, mean_v)
    rest = sum((v - mean_v - slope * (t - mean_t)) ** 2 for t, v in points)
    return Line(slope, sqrt(rest / (len(points) - 2) / spread), mean_v)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
