"""Log lines on standard error: text for people (`--log-format text`) or one JSON object per line (`json`).

Lines of `kvist.` loggers are for operators; libraries log from WARNING up. Secrets are never passed to a logger.
A message may contain text from a client: control characters are escaped, so that one record is one line and cannot
imitate another. Logging never waits for the reader of standard error (output.py). Processes that share standard error
write whole lines: a line is cut to the size that a pipe writes atomically.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from kvist.config import option
from kvist.output import LineOutput, output_to

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
MAX_LINE_BYTES = 4096  # PIPE_BUF: size of an atomic write to a pipe
_CUT = "..."
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))}
_ESCAPED |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    log_level: str = option("info", "lowest severity of log lines to show", choices=LEVELS)
    log_format: str = option("text", "format of log lines: text, or one JSON object per line", choices=FORMATS)


def setup_logging(config: LogConfig) -> None:
    """Set up logging. Call first in a process; a later call changes level and format."""
    handler = _handler()
    handler.setFormatter(_JsonFormatter() if config.log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kvist").setLevel(config.log_level.upper())


class _LineHandler(logging.Handler):
    """Handler that writes to standard error and never waits for its reader."""

    def __init__(self, output: LineOutput) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # arguments that do not match the message: a bug, but not to be raised in the caller
            self.handleError(record)
            return
        for line in text.split("\n"):
            self._output.write(line)

    def flush(self) -> None:
        self._output.flush()


def _handler() -> logging.Handler:
    try:
        return _LineHandler(output_to(sys.stderr.fileno()))
    except (AttributeError, OSError, ValueError):  # no standard error, or captured by a test
        return logging.StreamHandler(sys.stderr)


def one_line(text: str) -> str:
    """Return `text` with its control characters escaped."""
    return text.translate(_ESCAPED)


def _cut(line: str, limit_bytes: int = MAX_LINE_BYTES - 1) -> str:
    """Return `line` cut to `limit_bytes` of UTF-8, without the newline."""
    if len(line) * 4 <= limit_bytes:
        return line
    encoded = line.encode("utf-8", "replace")
    if len(encoded) <= limit_bytes:
        return line
    return encoded[: limit_bytes - len(_CUT)].decode("utf-8", "ignore") + _CUT


class _TextFormatter(logging.Formatter):
    """`2026-11-29 17:03:21.042 INFO    kvist.router.fleet: message`; lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S")
        head = f"{time}.{int(record.msecs):03d} {record.levelname:<7} {record.name}: "
        lines = [head + one_line(record.getMessage())]
        if record.exc_info:
            lines += [f"    {one_line(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(map(_cut, lines))


class _JsonFormatter(logging.Formatter):
    """One JSON object with time (UTC), level, logger, message, pid, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = json.dumps(fields)
        if len(line) < MAX_LINE_BYTES:
            return line
        room = (MAX_LINE_BYTES - 600) // 2 // 12  # per field; a character may need 12 bytes
        for key in ("message", "exception"):
            text = str(fields.get(key, ""))
            if len(text) > room:
                # a traceback ends with its error
                fields[key] = text[:room] + _CUT if key == "message" else _CUT + text[-room:]
        return json.dumps(fields)
