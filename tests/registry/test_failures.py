"""`registry.failures`: what cannot be loaded is remembered for a moment, and only so much of it."""

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
from prefix_service.registry.failures import REMEMBERED_SECONDS, Failures


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "error", [CorruptBlob("bit rot", 60), StorageFailed("EIO", 7), InvalidCheckpoint("no tensors")]
)
def test_the_same_error_for_a_while(error: PrefixServiceError) -> None:
    """The same class, words and time to come again; after the moment it is forgotten."""
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
    """Memory may be free at the next try."""
    failures: Failures[str] = Failures()
    failures.remember("a", error)
    failures.check("a")


def test_a_remembered_failure_is_not_remembered_longer() -> None:
    """Who failed because of it adds nothing: the storm ends by itself."""
    failures: Failures[str] = Failures(clock := Clock())
    failures.remember("a", CorruptBlob("first"))
    clock.now += REMEMBERED_SECONDS / 2
    failures.remember("a", CorruptBlob("second"))
    clock.now += REMEMBERED_SECONDS / 2
    failures.check("a")


def test_only_so_many_are_remembered() -> None:
    """The oldest is forgotten for the newest."""
    failures: Failures[int] = Failures()
    for key in range(1_001):
        failures.remember(key, CorruptBlob("bit rot"))
    failures.check(0)
    with pytest.raises(CorruptBlob):
        failures.check(1)


def test_what_was_put_right_is_forgotten() -> None:
    """For the keys that match alone."""
    failures: Failures[str] = Failures()
    for key in "ab":
        failures.remember(key, CorruptBlob("bit rot"))
    failures.forget(lambda key: key == "a")
    failures.check("a")
    with pytest.raises(CorruptBlob):
        failures.check("b")


def test_it_keeps_no_memory_alive() -> None:
    """Neither the frames that the failure went through, nor those of the requests that got it again."""

    class Tensor:
        pass

    def fail() -> None:
        tensors.append(weakref.ref(tensor := Tensor()))
        raise CorruptBlob(f"bit rot in {type(tensor)}")

    tensors: list[weakref.ref[Tensor]] = []
    failures: Failures[str] = Failures()
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
