"""Structured logs: everything that a service says goes through one renderer, onto standard error."""

import contextlib
import logging
import re
import sys
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.contextvars import merge_contextvars
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_logger_name
from structlog.typing import Processor

LogLevel = Literal["debug", "info", "warning", "error"]

_KEY: Final = re.compile(r"pfx_\w+")


def redacted(text: str) -> str:
    """The text without what looks like a key, whole or cut off."""
    return _KEY.sub("pfx_***", text) if "pfx_" in text else text


def configure(level: LogLevel) -> None:
    """Log lines of JSON, or in colours on a terminal: structlog's own, and those of the standard library.

    The context that is bound (`structlog.contextvars`) comes with each. Other libraries are heard from warnings on.
    """
    lowest = logging.getLevelNamesMapping()[level.upper()]
    before: list[Processor] = [
        merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after = _rendering(colours=sys.stderr.isatty())
    # Not through the standard library: half the time for a line.
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Unfailing(sys.stderr))),
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


class _Unfailing:
    """A log whose disk is full, or whose reader is gone, must not fail what is logged."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write, or not."""
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        """Flush, or not."""
        with contextlib.suppress(OSError):
            self._file.flush()


def _rendering(*, colours: bool) -> list[Processor]:
    if colours:
        # Rich's tracebacks, the default, show the values of local variables: keys among them.
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback), _redact]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(), _redact]


def _redact(_logger: Any, _method: str, line: Any) -> Any:
    return redacted(line)
