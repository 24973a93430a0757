"""The format of log records: for a terminal, for a pipe, for programs."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, Literal

import typer

# `auto` is `pretty` on a terminal and `plain` elsewhere.
LogFormat = Literal["auto", "pretty", "plain", "json"]
_COLORS: Final = {
    logging.WARNING: typer.colors.YELLOW,
    logging.ERROR: typer.colors.RED,
    logging.CRITICAL: typer.colors.RED,
}


class _Pretty(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")  # noqa: DTZ006 - local time on purpose
        text = super().format(record)
        return f"{typer.style(clock, dim=True)}  {typer.style(text, fg=_COLORS.get(record.levelno))}"


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_time(record)} {record.levelname} {record.name} {super().format(record)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def configure_logging(log_format: LogFormat, level: str) -> bool:
    """Send all log records to stderr; returns whether the format is `pretty`."""
    if log_format == "auto":
        log_format = "pretty" if sys.stderr.isatty() else "plain"
    formatters = {"pretty": _Pretty, "plain": _Plain, "json": _Json}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatters[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The library logs each failed reconnect with a traceback; the connection logs one line.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    return log_format == "pretty"
