"""Structured logs: one renderer writes every line of the service to standard error."""

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


request_context: ContextVar[dict[str, str]] = ContextVar("request_context")
"""Fields of every line that a request logs: the ids of the request and of its key.

Each request has one dictionary, to which fields are added.
"""


def redacted(text: str) -> str:
    """Returns the text with everything that looks like a key, even a truncated one, replaced."""
    return _KEY.sub("pfx_***", text) if "pfx_" in text else text


def configure(level: LogLevel) -> None:
    """Configures logging as JSON lines, or coloured ones on a terminal, for structlog and the standard library.

    Each line has the fields of `request_context`. Other libraries' loggers are set to warnings.
    """
    lowest = _NUMBERS[level]
    before: list[Processor] = [
        _with_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after = _rendering(colours=sys.stderr.isatty())
    # Not through the standard library, which doubles the time for a line.
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
    """Writes the log lines of requests, in the format of all other lines.

    Not through structlog, which takes 10 µs a line. JSON is written once for each turn of the event loop; on a terminal
    each line tells a person the time, status, method, route, duration and size of a request; of prefixes, which they
    are and where the time went; and the code and id of an error.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._lines = _Lines(sys.stderr)
        self._pending: list[str] = []
        self._lowest = logging.getLogger("prefix_service").getEffectiveLevel()

    def is_enabled_for(self, level: LogLevel) -> bool:
        """Returns whether lines of this level are logged."""
        return _NUMBERS[level] >= self._lowest

    def write(self, level: LogLevel, fields: dict[str, Any]) -> None:
        """Logs a request."""
        if self._is_terminal:
            self._lines.msg(printable(redacted(_for_people(fields))))
        else:
            fields |= {"event": "request", "level": level, "timestamp": datetime.now(UTC)}
            if not self._pending:
                asyncio.get_running_loop().call_soon(self._flush)
            self._pending.append(printable(redacted(_json(fields))))

    def _flush(self) -> None:
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
    """The file that structlog writes to. A full disk or a closed pipe must not fail the code that logs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        """Writes a line; ignores errors. Standard error flushes after each line."""
        try:  # noqa: SIM105 - a third of the time of contextlib.suppress
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
    """Escapes the texts of a line before it is coloured. Nested values are shown by `repr`, which escapes too.

    The event itself may have several lines, such as uvicorn's tracebacks.
    """
    shown = {printable(name): printable(value) if isinstance(value, str) else value for name, value in event.items()}
    return {**shown, "event": printable_lines(str(event.get("event", "")))}


def _traceback(file: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    plain_traceback(text, exc_info)
    file.write(printable_lines(text.getvalue()))


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
