"""Moments and durations as a person writes them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from prefix_service.errors import InvalidInput

_DURATION: Final = re.compile(r"([0-9]{1,6}[wdhms])+")
_PART: Final = re.compile(r"([0-9]+)([wdhms])")
_LONGEST: Final = timedelta(days=36_500)
_UNITS: Final = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}


def parse_duration(text: str) -> timedelta:
    """A duration in weeks, days, hours, minutes and seconds: `7d`, `12h`, `1h30m`.

    Raises:
        InvalidInput: it is none, no time at all, or longer than a century.
    """
    try:
        duration = _duration(text)
    except OverflowError:
        duration = timedelta.max
    if not duration:
        raise InvalidInput(f"{text!r:.40} is not a duration: write it as in 7d, 12h or 1h30m (w, d, h, m, s)")
    if duration > _LONGEST:
        raise InvalidInput(f"{text!r:.40} is too long a duration: {_LONGEST.days}d is the longest")
    return duration


def parse_end(text: str) -> datetime:
    """A moment in the future, in UTC: `2027-01-31` or `2027-01-31T12:00:00+01:00`, which is in UTC without a zone, or
    a duration from now, as `90d`.

    Raises:
        InvalidInput: it is none, or it is in the past.
    """
    now = datetime.now(UTC)
    moment = _moment(text, now, "from now")
    if moment <= now:
        raise InvalidInput(f"{text} is in the past: it is {now:%Y-%m-%d %H:%M:%S} UTC now")
    return moment


def parse_past(text: str) -> datetime:
    """A moment, in UTC: `2027-01-31` or `2027-01-31T12:00:00+01:00`, which is in UTC without a zone, or a duration ago,
    as `7d`.

    Raises:
        InvalidInput: it is none.
    """
    return _moment(text, datetime.now(UTC), "ago")


def _moment(text: str, now: datetime, way: Literal["from now", "ago"]) -> datetime:
    try:
        if duration := _duration(text):
            return (now + duration if way == "from now" else now - duration).replace(microsecond=0)
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(f"{text!r:.40} is beyond the years that a date can have") from error
    except ValueError as error:
        raise InvalidInput(
            f"{text!r:.40} is no moment: write it as in 2027-01-31 or 2027-01-31T12:00:00Z (in UTC without a zone), or "
            f"as a duration {way}, as in 90d, 12h or 1h30m"
        ) from error


def _duration(text: str) -> timedelta:
    """Returns the duration that a text is, or none at all."""
    if not _DURATION.fullmatch(text):
        return timedelta()
    parts = (timedelta(**{_UNITS[unit]: int(count)}) for count, unit in _PART.findall(text))
    return sum(parts, timedelta())
