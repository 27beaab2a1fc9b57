"""`cli.moments` parses durations and ends as a person writes them."""

from datetime import UTC, datetime, timedelta

import pytest

from prefix_service.cli.moments import parse_duration, parse_end, parse_past
from prefix_service.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
        ("1h30m", timedelta(minutes=90)),
        ("1w1d1h1m1s", timedelta(weeks=1, days=1, hours=1, minutes=1, seconds=1)),
    ],
)
def test_durations(text: str, duration: timedelta) -> None:
    """A duration has one or several units, from weeks to seconds."""
    assert parse_duration(text) == duration
    assert abs(parse_end(text) - datetime.now(UTC) - duration) < timedelta(minutes=1)
    assert abs(datetime.now(UTC) - parse_past(text) - duration) < timedelta(minutes=1)


@pytest.mark.parametrize("text", ["", "7", "d", "7 d", "7D", "-7d", "7.5d", "7y", "0d", "0h0m", "٣d", "soon"])
def test_what_is_no_duration(text: str) -> None:
    """The error says how to write a duration."""
    with pytest.raises(InvalidInput, match=r"is not a duration: write it as in 7d, 12h or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2999-01-31", datetime(2999, 1, 31, tzinfo=UTC)),
        ("2999-01-31T12:30", datetime(2999, 1, 31, 12, 30, tzinfo=UTC)),
        ("2999-01-31 12:30:01", datetime(2999, 1, 31, 12, 30, 1, tzinfo=UTC)),
        ("2999-01-31T12:30:01Z", datetime(2999, 1, 31, 12, 30, 1, tzinfo=UTC)),
        ("2999-01-31T12:30:01-07:00", datetime(2999, 1, 31, 19, 30, 1, tzinfo=UTC)),
    ],
)
def test_ends(text: str, moment: datetime) -> None:
    """An end without a zone is in UTC, and every parsed end is."""
    found = parse_end(text)
    assert (found, found.tzinfo) == (moment, UTC)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is no moment: write it as in 2027-01-31") for text in ("", "soon", "2027", "2027-02-30", "0d")),
        *((text, "is in the past: it is") for text in ("2001-01-31", "2001-01-31T12:00:00+09:00")),
        *((text, "beyond the years") for text in ("999999w", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00")),
    ],
)
def test_what_is_no_end(text: str, words: str) -> None:
    """Text that is no moment, a past moment, or an impossible date is refused."""
    with pytest.raises(InvalidInput, match=words):
        parse_end(text)


@pytest.mark.parametrize("text", ["36501d", "999999w", "999999w" * 300])
def test_a_duration_without_end(text: str) -> None:
    """A duration longer than a century, than the calendar, or than Python's own is refused."""
    with pytest.raises(InvalidInput, match="is too long a duration: 36500d is the longest"):
        parse_duration(text)


def test_moments_that_may_have_passed() -> None:
    """In UTC without a zone; the error says what may be written."""
    assert (
        parse_past("2020-01-31T12:00+02:00") == parse_past("2020-01-31T10:00") == datetime(2020, 1, 31, 10, tzinfo=UTC)
    )
    with pytest.raises(InvalidInput, match=r"'yesterday' is no moment: .* or as a duration ago, as in 90d"):
        parse_past("yesterday")
