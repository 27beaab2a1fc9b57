"""`system.failures` remembers for a moment which versions failed to load, and only so many of them."""

import gc
import weakref

import pytest

from prefix_service.errors import (
    CorruptBlob,
    InvalidCheckpoint,
    NotFound,
    OutOfSpace,
    PrefixServiceError,
    StorageFailed,
    Unavailable,
)
from prefix_service.system.failures import REMEMBERED_SECONDS, Failures


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "error", [CorruptBlob("bit rot", 60), StorageFailed("EIO", 7), InvalidCheckpoint("no tensors")]
)
def test_the_same_error_for_a_while(error: PrefixServiceError) -> None:
    """A check raises the same class, message and time to retry until the moment is over."""
    failures: Failures[str] = Failures(clock := Clock())
    failures.remember("a", error)
    clock.now += REMEMBERED_SECONDS - 0.001
    with pytest.raises(type(error)) as caught:
        failures.check("a")
    assert vars(caught.value) == vars(error)
    failures.check("b")
    clock.now += 0.001
    failures.check("a")


@pytest.mark.parametrize(
    "error", [OutOfSpace("full"), Unavailable("busy"), NotFound("gone"), ValueError(), MemoryError()]
)
def test_what_may_pass_is_not_remembered(error: Exception) -> None:
    """Errors that another try may not meet are not remembered."""
    failures: Failures[str] = Failures()
    failures.remember("a", error)
    failures.check("a")


def test_a_remembered_failure_is_not_remembered_longer() -> None:
    """Remembering a failure again does not prolong it, so that a storm of requests ends by itself."""
    failures: Failures[str] = Failures(clock := Clock())
    failures.remember("a", CorruptBlob("first"))
    clock.now += REMEMBERED_SECONDS / 2
    failures.remember("a", CorruptBlob("second"))
    clock.now += REMEMBERED_SECONDS / 2
    failures.check("a")


def test_only_so_many_are_remembered() -> None:
    """The newest failure displaces the oldest."""
    failures: Failures[int] = Failures()
    for key in range(1_001):
        failures.remember(key, CorruptBlob("bit rot"))
    failures.check(0)
    with pytest.raises(CorruptBlob):
        failures.check(1)


def test_what_was_put_right_is_forgotten() -> None:
    """`forget` drops the failures whose keys match, and no others."""
    failures: Failures[str] = Failures()
    for key in "ab":
        failures.remember(key, CorruptBlob("bit rot"))
    failures.forget(lambda key: key == "a")
    failures.check("a")
    with pytest.raises(CorruptBlob):
        failures.check("b")


def test_it_keeps_no_memory_alive() -> None:
    """A remembered failure keeps neither the frames that raised it nor those of later requests."""

    class Tensor:
        pass

    def fail() -> None:
        tensors.append(weakref.ref(tensor := Tensor()))
        raise CorruptBlob(f"bit rot in {type(tensor)}")

    tensors: list[weakref.ref[Tensor]] = []
    failures: Failures[str] = Failures(lambda: 0.0)
    try:
        fail()
    except CorruptBlob as error:
        failures.remember("a", error)
    gc.collect()
    assert tensors[0]() is None
    known = failures._errors["a"][1]
    with pytest.raises(CorruptBlob):
        failures.check("a")
    assert known.__traceback__ is None
