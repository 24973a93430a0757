"""How a host's events are shown: on a terminal, in a pipe, for programs."""

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import typer

_COLOURS: Final = {
    logging.WARNING: typer.colors.YELLOW,
    logging.ERROR: typer.colors.RED,
    logging.CRITICAL: typer.colors.RED,
}


class LogFormat(StrEnum):
    """`auto` is `pretty` on a terminal and `plain` elsewhere."""

    AUTO = "auto"
    PRETTY = "pretty"
    PLAIN = "plain"
    JSON = "json"


class _Pretty(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")  # noqa: DTZ006 - the reader's own clock
        text = super().format(record)
        return f"{typer.style(clock, dim=True)}  {typer.style(text, fg=_COLOURS.get(record.levelno))}"


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


def set_up_logging(how: LogFormat, level: str) -> bool:
    """Send all log records to stderr; returns whether a person is looking."""
    on_terminal = sys.stderr.isatty()
    if how is LogFormat.AUTO:
        how = LogFormat.PRETTY if on_terminal else LogFormat.PLAIN
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter({LogFormat.PRETTY: _Pretty, LogFormat.PLAIN: _Plain, LogFormat.JSON: _Json}[how]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The library reports each failed attempt to reconnect with a traceback; the connection tells it shorter.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    return how is LogFormat.PRETTY
