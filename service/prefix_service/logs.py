"""Structured logs: everything that a service says goes through one renderer, onto standard error."""

import asyncio
import io
import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

import orjson
import structlog
from structlog.dev import plain_traceback
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_logger_name
from structlog.typing import EventDict, ExcInfo, Processor

from prefix_service.system.printable import printable, printable_lines

LogLevel = Literal["debug", "info", "warning", "error"]

_NUMBERS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_KEY: Final = re.compile(r"pfx_\w+")


about: ContextVar[dict[str, str]] = ContextVar("about")
"""What every line of a request tells: its id, its key's id. One dictionary for each request, which grows."""


def redacted(text: str) -> str:
    """The text without what looks like a key, whole or cut off."""
    return _KEY.sub("pfx_***", text) if "pfx_" in text else text


def configure(level: LogLevel) -> None:
    """Log lines of JSON, or in colours on a terminal: structlog's own, and those of the standard library.

    What `about` says comes with each. Other libraries are heard from warnings on.
    """
    lowest = _NUMBERS[level]
    before: list[Processor] = [
        _with_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after = _rendering(colours=sys.stderr.isatty())
    # Not through the standard library: half the time for a line.
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*before, add_logger_name, ExtraAdder()],
            processors=[ProcessorFormatter.remove_processors_meta, *after],
        )
    )
    logging.getLogger().handlers = [handler]
    logging.getLogger().setLevel(max(lowest, logging.WARNING))
    logging.getLogger("prefix_service").setLevel(lowest)
    logging.captureWarnings(capture=True)


class RequestLog:
    """The lines of requests, in the form of all others.

    Not through structlog, which takes 10 µs a line. JSON is written once for each turn of the event loop; on a terminal
    each line tells a person the time, status, method, route, duration and size of a request; of prefixes, which they
    are and where the time went; and the code and id of an error.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._lines = _Lines(sys.stderr)
        self._pending: list[str] = []
        self._lowest = logging.getLogger("prefix_service").getEffectiveLevel()

    def tells(self, level: LogLevel) -> bool:
        """Whether lines of this level are wanted."""
        return _NUMBERS[level] >= self._lowest

    def line(self, level: LogLevel, fields: dict[str, Any]) -> None:
        """Tell of a request."""
        if self._is_terminal:
            self._lines.msg(printable(redacted(_for_people(fields))))
        else:
            fields |= {"event": "request", "level": level, "timestamp": datetime.now(UTC)}
            if not self._pending:
                asyncio.get_running_loop().call_soon(self._write)
            self._pending.append(printable(redacted(_json(fields))))

    def _write(self) -> None:
        self._lines.msg("\n".join(self._pending))
        self._pending.clear()


def _for_people(fields: dict[str, Any]) -> str:
    now = datetime.now().astimezone().strftime("%H:%M:%S")
    took, size = f"{fields['seconds'] * 1000:.1f} ms", f"{fields['bytes']} B"
    words = [now, fields["status"], fields["method"], fields["route"], took, size]
    if "cold" in fields:
        words += _served_for_people(fields)
    if fields["code"] is not None:
        words += [fields["code"], fields.get("request_id")]
    return " ".join(map(str, words))


def _served_for_people(fields: dict[str, Any]) -> list[str]:
    if "adapter" in fields:
        named = f"{fields['adapter']}@{fields['version']}"
    else:
        named = f"{fields['versions'][0]} and {fields['num_versions'] - 1} more"
    times = ", ".join(f"{part} {fields[f'{part}_seconds'] * 1000:.1f} ms" for part in ("wait", "load", "send"))
    return [named, f"({'cold' if fields['cold'] else 'warm'}: {times})"]


class _Lines:
    """What structlog writes to. A log whose disk is full, or whose reader is gone, must not fail what is logged."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        """Write a line, or not; standard error flushes by lines."""
        try:  # noqa: SIM105 - a third of the time
            self._file.write(line + "\n")
        except OSError:
            pass

    debug = info = warning = error = msg


def _rendering(*, colours: bool) -> list[Processor]:
    if colours:
        # Rich's tracebacks, the default, show the values of local variables: keys among them.
        return [_escape, structlog.dev.ConsoleRenderer(exception_formatter=_traceback), _redact]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json), _redact, _harmless]


def _escape(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Escape the texts of a line before it gets its colours; what is nested is shown by `repr`, which escapes too. The
    event itself may have several lines, as uvicorn's tracebacks."""
    shown = {printable(name): printable(value) if isinstance(value, str) else value for name, value in event.items()}
    return {**shown, "event": printable_lines(str(event.get("event", "")))}


def _traceback(file: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    plain_traceback(text, exc_info)
    file.write(printable_lines(text.getvalue()))


def _harmless(_logger: Any, _method: str, line: Any) -> Any:
    return printable(line)


def _with_context(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {**about.get({}), **event}


def _json(event: Any, **_options: Any) -> str:
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z).decode()
    except TypeError:  # a number of more than 64 bits, a lone surrogate
        return json.dumps(event, default=repr)


def _redact(_logger: Any, _method: str, line: Any) -> Any:
    return redacted(line)
