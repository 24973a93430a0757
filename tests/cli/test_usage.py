"""Wrong usage: exit code 2 with an explanation, before anything is sent."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from openagentmesh.cli.main import app

from tests.support.commands import OAM, UNREACHABLE, Process, Up, environment, oam, run_parallel

CTRL_C_DURING_IMPORT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "openagentmesh.cli.agent":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
import openagentmesh.cli.main
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("agent", "call", "bad name", "1"),
        ("agent", "contract", "a..b"),
        ("observe", "logs", "bad name"),
        ("observe", "set", "bad name", "--log-level", "info"),
        ("mesh", "catalog", "--channel", "bad name"),
        ("kv", "get", "bad key"),
        ("kv", "watch", "bad key"),
    ],
)
def test_an_invalid_name_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """An invalid name or key is rejected with the permitted characters, without a connection."""
    result = oam(*arguments, "--url", UNREACHABLE, cwd=tmp_path)
    assert (2, "") == (result.code, result.out)
    assert "letters, digits" in result.err
    assert "log events of" not in result.err
    assert "watching" not in result.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("agent", "contract", "echo", "--text", "--json"), "--text and --json are mutually exclusive"),
        (("observe", "set", "--log-level", "info"), "Give one agent, or --global."),
        (("observe", "set", "echo", "--global", "--log-level", "info"), "Give one agent, or --global."),
        (("mesh", "publish", "by.*", "{}"), "'by.*' cannot be published to"),
        (("mesh", "listen", "a..b"), "'a..b' is not a subject"),
    ],
)
def test_invalid_options_are_a_usage_error(tmp_path: Path, arguments: tuple[str, ...], error: str) -> None:
    """Options that exclude each other and invalid subjects are rejected without a connection."""
    result = oam(*arguments, "--url", UNREACHABLE, cwd=tmp_path)
    assert (2, "") == (result.code, result.out)
    assert error in result.err


def test_an_invalid_subject_does_not_close_the_connection(hosted: Up) -> None:
    """A subject that the server would reject is never sent, so the connection is not lost repeatedly."""
    with Process("mesh", "listen", "a..b", "--url", hosted.url, cwd=hosted.folder) as listen:
        result = listen.finish(5)
    assert 2 == result.code
    assert "connection lost" not in result.err


def test_input_that_is_not_json_is_a_usage_error(tmp_path: Path) -> None:
    """Invalid JSON is rejected with its start, without a connection."""
    call = "agent", "call", "echo", "--url", UNREACHABLE
    for result in run_parallel((*call, "{bad"), (*call, "NaN"), cwd=tmp_path):
        assert (2, "") == (result.code, result.out)
        assert "the input is not JSON" in result.err


def test_input_that_is_not_text_is_a_usage_error(tmp_path: Path) -> None:
    """Bytes on stdin that are not UTF-8 are rejected without a traceback."""
    done = subprocess.run(
        [OAM, "agent", "call", "echo", "--url", UNREACHABLE],
        cwd=tmp_path,
        env=environment({"PYTHONIOENCODING": "utf-8:strict"}),
        input=b'"\xff"',
        capture_output=True,
        check=False,
    )
    assert (2, b"") == (done.returncode, done.stdout)
    assert b"the input is not JSON" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_usage_shows_that_the_input_is_optional(tmp_path: Path) -> None:
    """The usage line has the input in one pair of brackets."""
    shown = oam("agent", "call", "--help", cwd=tmp_path).out
    assert " [JSON]" in shown
    assert "[[JSON]]" not in shown


def parameters(command: Any, name: str = "oam") -> Iterator[tuple[str, str]]:
    """The options and arguments of a command and its subcommands, each with its help."""
    yield from ((f"{name} {parameter.name}", parameter.help) for parameter in command.params)
    for child, subcommand in getattr(command, "commands", {}).items():
        yield from parameters(subcommand, f"{name} {child}")


def test_every_option_has_a_help_text() -> None:
    """No option and no argument of any command is without an explanation in `--help`."""
    found = list(parameters(typer.main.get_command(app)))
    assert "oam plugins config" in dict(found)
    assert [] == [name for name, text in found if not text]


def test_ctrl_c_while_commands_are_imported_exits_quietly(tmp_path: Path) -> None:
    """Ctrl-C before a command has started exits with code 130 and no output."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C_DURING_IMPORT],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (130, "", "") == (done.returncode, done.stdout, done.stderr)
