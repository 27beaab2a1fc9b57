"""Structured logs: everything that a service says goes through one renderer and one thread, onto standard error."""

import atexit
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

from prefix_service.system.line_writer import LineWriter
from prefix_service.system.printable import printable, printable_lines

LogLevel = Literal["debug", "info", "warning", "error"]

_NUMBERS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_KEY: Final = re.compile(r"pfx_\w+")
_PASSWORD: Final = re.compile(r"(?<=://)([^\s/:@?#]*):[^\s/@?#]*@")
_STANDARD_ERROR: Final = 2


def _tell_dropped(count: int) -> None:
    logging.getLogger("prefix_service").warning(
        "lines of the log were dropped: standard error was not read", extra={"lines": count}
    )


_writer: Final = LineWriter(_STANDARD_ERROR, _tell_dropped)
write_line: Final = _writer.write
"""Write a line to standard error behind those of the log; it never waits for who reads them."""

_for_people = False

request_context: ContextVar[dict[str, str]] = ContextVar("request_context")
"""The fields of every line of a request: its id, its key's id. One dictionary for each request, which grows."""


def redacted(text: str) -> str:
    """Returns the text with everything that looks like a key, even a truncated one, and passwords in URLs replaced."""
    if "pfx_" in text:
        text = _KEY.sub("pfx_***", text)
    return _PASSWORD.sub(r"\1:***@", text) if "://" in text else text


def for_people() -> bool:
    """Whether lines are for a person at a terminal; they are JSON everywhere else."""
    return _for_people


def configure(level: LogLevel, *, as_json: bool = False) -> None:
    """Log lines of JSON, or in colours on a terminal: structlog's own, and those of the standard library. `as_json`
    wants JSON on a terminal too.

    Each line has the fields of `request_context`. Other libraries' loggers are set to warnings.
    """
    global _for_people
    _for_people = sys.stderr.isatty() and not as_json
    lowest = _NUMBERS[level]
    before: list[Processor] = [
        _with_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after = _rendering(colours=_for_people)
    # Not through the standard library: half the time for a line.
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=lambda *_: _Lines,
        cache_logger_on_first_use=True,
    )
    logging.raiseExceptions = False
    handler = _Handler()
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
    atexit.register(_writer.flush)


def finish() -> None:
    """Wait until the log is written, for seconds at most, as the end of the process does otherwise."""
    atexit.unregister(_writer.flush)
    _writer.flush()


class RequestLog:
    """Writes the log lines of requests, in the format of all other lines.

    Not through structlog, which takes 10 µs a line. On a terminal each line shows the time, status, method,
    route, duration and size of a request; of prefixes, which they are and where the time went; and the code and id of
    an error.
    """

    def __init__(self) -> None:
        self._lowest = logging.getLogger("prefix_service").getEffectiveLevel()

    def is_enabled_for(self, level: LogLevel) -> bool:
        """Returns whether lines of this level are logged."""
        return _NUMBERS[level] >= self._lowest

    def write(self, level: LogLevel, fields: dict[str, Any]) -> None:
        """Tell of a request."""
        if _for_people:
            text = _readable(fields)
        else:
            fields |= {"event": "request", "level": level, "timestamp": datetime.now(UTC)}
            text = _json(fields)
        write_line(printable(redacted(text)))


def _readable(fields: dict[str, Any]) -> str:
    took, size = f"{fields['seconds'] * 1000:.1f} ms", f"{fields['bytes']} B"
    words = [_clock(), fields["status"], fields["method"], fields["route"], took, size]
    if "cold" in fields:
        words += _served_for_people(fields)
    if fields["code"] is not None:
        words += [fields["code"], fields.get("request_id")]
    return " ".join(map(str, words))


def _clock() -> str:
    return datetime.now().astimezone().strftime("%H:%M:%S")


def _served_for_people(fields: dict[str, Any]) -> list[str]:
    if "adapter" in fields:
        named = f"{fields['tenant']}/{fields['adapter']}@{fields['version']}"
    else:
        named = f"{fields['versions'][0]} and {fields['num_versions'] - 1} more"
    times = ", ".join(f"{part} {fields[f'{part}_seconds'] * 1000:.1f} ms" for part in ("prepare", "load", "send"))
    return [named, f"({'cold' if fields['cold'] else 'warm'}: {times})"]


class _Lines:
    """The logger that structlog writes to."""

    msg = debug = info = warning = error = staticmethod(write_line)


class _Handler(logging.Handler):
    """The handler of the standard library's loggers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        write_line(self.format(record))


def _rendering(*, colours: bool) -> list[Processor]:
    if colours:
        return [_escape, _for_a_person, _redact]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json), _redact, _harmless]


def _escape(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Escapes the texts of a line before it is coloured. Nested values are shown by `repr`, which escapes too.

    The event itself may have several lines, such as uvicorn's tracebacks.
    """
    shown = {printable(name): printable(value) if isinstance(value, str) else value for name, value in event.items()}
    return {**shown, "event": printable_lines(str(event.get("event", "")))}


def _for_a_person(logger: Any, method: str, event: EventDict) -> Any:
    """Renders a change as one line like those of requests, and everything else in colours."""
    if event["event"] != "audit":
        return _COLOURED(logger, method, event)
    # The digest has room on no terminal, and `versions` shows it.
    details = [
        f"{name}={value}" for name, value in event["details"].items() if value not in (None, "") and name != "digest"
    ]
    words = [_clock(), event["action"], event["target"], *details, "by key", event["key_id"]]
    return printable(" ".join(map(str, words)))


def _traceback(file: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    plain_traceback(text, exc_info)
    file.write(printable_lines(text.getvalue()))


# Rich's tracebacks, the default, show the values of local variables: keys among them.
_COLOURED: Final = structlog.dev.ConsoleRenderer(exception_formatter=_traceback)


def _harmless(_logger: Any, _method: str, line: Any) -> Any:
    return printable(line)


def _with_context(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {**request_context.get({}), **event}


def _json(event: Any, **_options: Any) -> str:
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z).decode()
    except TypeError:  # a number of more than 64 bits, a lone surrogate
        return json.dumps(event, default=repr)


def _redact(_logger: Any, _method: str, line: Any) -> Any:
    return redacted(line)
