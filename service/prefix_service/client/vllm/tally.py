"""The counts of adapters for vLLM's `/metrics`: which are loaded, and what loading costs. Pure state."""

from collections import OrderedDict
from typing import Any, Final

from prefix_service.client.vllm.requests import References

MOST_NAMED: Final = 1000
"""The most adapters that are reported as loaded, those that were loaded last."""

HOST: Final = "cpu"
"""Level of an adapter whose bytes are in the host memory of every worker."""
CACHE: Final = "gpu"
"""Level of an adapter that is in vLLM's KV cache for a running request."""

LOADED: Final = "loaded"
LEFT: Final = "left"
"""What was reported as loaded, and is no more: several servers share metrics, and each gets only some of the
reports."""
LOAD_SECONDS: Final = "load_seconds"
LOAD_BYTES: Final = "load_bytes"
WAIT_SECONDS: Final = "wait_seconds"
FAILURES: Final = "failures"


class Tally:
    """Counts from one call of `take` to the next; used by one thread."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, str], int] = OrderedDict()  # name and level: how often
        self._has_changed = False
        self._reported: list[tuple[str, str]] = []
        self._clear()

    def _clear(self) -> None:
        self._load_seconds: list[float] = []
        self._wait_seconds: list[float] = []
        self._load_bytes = self._failures = 0

    def load(self, references: References, level: str) -> None:
        """Counts one more load of adapters at a level."""
        key = adapter_name(references), level
        self._has_changed |= key not in self._loaded
        self._loaded[key] = self._loaded.get(key, 0) + 1
        self._loaded.move_to_end(key)

    def unload(self, references: References, level: str) -> None:
        """Counts one load of adapters less at a level."""
        key = adapter_name(references), level
        self._loaded[key] -= 1
        if not self._loaded[key]:
            del self._loaded[key]
            self._has_changed = True

    def add_load(self, seconds: float, nbytes: int) -> None:
        """Counts a load from the service into host memory: its seconds, and its bytes on all workers."""
        self._load_seconds.append(seconds)
        self._load_bytes += nbytes

    def add_wait(self, seconds: float) -> None:
        """Counts a request that waited for the versions and bytes of its adapters."""
        self._wait_seconds.append(seconds)

    def add_failure(self) -> None:
        """Counts a request that failed because of its adapters."""
        self._failures += 1

    def take(self) -> dict[str, Any] | None:
        """Returns the counts since the last call, and the loaded adapters if they have changed; None if nothing has."""
        if not (self._has_changed or self._load_seconds or self._wait_seconds or self._failures):
            return None
        counted: dict[str, Any] = {
            LOAD_SECONDS: self._load_seconds,
            LOAD_BYTES: self._load_bytes,
            WAIT_SECONDS: self._wait_seconds,
            FAILURES: self._failures,
        }
        if self._has_changed:
            loaded = list(self._loaded)[-MOST_NAMED:]
            counted[LOADED] = [list(key) for key in loaded]
            counted[LEFT] = [list(key) for key in set(self._reported).difference(loaded)]
            self._reported = loaded
        self._has_changed = False
        self._clear()
        return counted


def adapter_name(references: References) -> str:
    """Returns the adapters of references as one name, without versions, so that metrics have few names."""
    return ",".join(reference.partition("@")[0] for reference in references)


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the sum of two readings, of which `other` is the later one."""
    both = {name: one[name] + other[name] for name in (LOAD_SECONDS, LOAD_BYTES, WAIT_SECONDS, FAILURES)}
    latest = other.get(LOADED, one.get(LOADED))
    if latest is None:
        return both
    left = [key for key in [*one.get(LEFT, ()), *other.get(LEFT, ())] if key not in latest]
    return {**both, LOADED: latest, LEFT: left}
