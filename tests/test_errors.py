"""`errors`: one documented class for each failure, with a stable code, in the drawn tree, with a status."""

import inspect
import re
from collections.abc import Iterator

import pytest

from prefix_service import errors
from prefix_service.api.http.problems import STATUSES, status_of
from prefix_service.errors import PrefixServiceError

CLIENT_ONLY = {errors.InvalidResponse, errors.ConnectionFailed}


def below(root: type[PrefixServiceError], depth: int = 0) -> Iterator[tuple[type[PrefixServiceError], int]]:
    yield root, depth
    for child in root.__subclasses__():
        yield from below(child, depth + 1)


TREE = [(cls, depth) for cls, depth in below(PrefixServiceError) if cls.__module__ == errors.__name__]
EVERY = [cls for cls, _ in TREE]


def test_the_docstring_draws_the_tree() -> None:
    """Every class, in its place, in the order of the file, and no other; each with a word on what it means."""
    drawn = re.findall(r"^([│ ├└─]*)(\w+)(?: {2,}(\S.*))?$", inspect.getdoc(errors) or "", re.MULTILINE)
    lines = [(name, len(branch) // 4, words) for branch, name, words in drawn if branch or name == "PrefixServiceError"]
    assert [line[:2] for line in lines] == [(cls.__name__, depth) for cls, depth in TREE]
    assert all(words for name, _, words in lines if name != "PrefixServiceError")


def test_no_error_is_defined_elsewhere() -> None:
    """The tree is in one file."""
    assert {cls for cls, _ in below(PrefixServiceError)} == set(EVERY)
    assert {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)} == set(EVERY)


@pytest.mark.parametrize("cls", EVERY)
def test_each_has_a_code_of_its_own(cls: type[PrefixServiceError]) -> None:
    """Lower-case words with hyphens, that no other class has."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.__dict__["code"])
    assert [other for other in EVERY if other.code == cls.code] == [cls]


def test_codes_are_stable() -> None:
    """A client may branch on them: none is ever renamed or removed."""
    assert {cls.code for cls in EVERY} >= {
        "invalid-input",
        "invalid-reference",
        "invalid-config",
        "invalid-checkpoint",
        "unsafe-checkpoint",
        "invalid-request",
        "dimension-mismatch",
        "not-found",
        "unauthenticated",
        "forbidden",
        "conflict",
        "precondition-failed",
        "too-large",
        "not-acceptable",
        "unsupported-media-type",
        "range-not-satisfiable",
        "out-of-space",
        "unavailable",
        "corrupt-blob",
        "storage-failed",
        "internal",
        "invalid-response",
        "connection-failed",
    }


@pytest.mark.parametrize("cls", EVERY)
def test_each_is_documented_and_says_its_message(cls: type[PrefixServiceError]) -> None:
    """One sentence at least, and `str` is the message."""
    assert cls.__doc__
    assert cls.__doc__.rstrip().endswith(".")
    assert str(cls("what was wrong")) == cls("what was wrong").message == "what was wrong"


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls not in CLIENT_ONLY | {PrefixServiceError}])
def test_each_has_a_status(cls: type[PrefixServiceError]) -> None:
    """From the one table of the API, of an HTTP error."""
    assert 400 <= status_of(cls("")) <= 599


@pytest.mark.parametrize("cls", sorted(CLIENT_ONLY, key=str))
def test_the_clients_own_have_none(cls: type[PrefixServiceError]) -> None:
    """They say that there was no proper answer, so they are none."""
    assert not any(known in cls.__mro__ for known in STATUSES)


def test_the_table_holds_nothing_else() -> None:
    """No class that is unknown, and no status twice."""
    assert set(STATUSES) <= set(EVERY)
    assert len(set(STATUSES.values())) == len(STATUSES)


def test_every_error_is_public() -> None:
    """`__all__` names the classes that the module defines, and nothing else."""
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", None) == errors.__name__}
    assert set(errors.__all__) == defined
