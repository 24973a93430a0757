"""What commands advise when something is not there, cannot be, or is in the way."""

import asyncio
import io
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import typer
from nats.js.api import KeyValueConfig
from openagentmesh import ConnectionFailed, MeshError
from openagentmesh.cli.output import fail, print_each
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.jetstream_errors import translated_errors

from tests.support.commands import UNREACHABLE, Up, environment, free_port, oam, side_by_side
from tests.support.servers import running_server

ONE_STREAM = """
jetstream {{ store_dir: "{store}" }}
accounts {{ A {{ jetstream {{ max_streams: 1 }}, users: [{{ user: u, password: p }}] }} }}
"""
CTRL_C_WHILE_IMPORTING = """
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
def test_a_name_that_can_be_none(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """What cannot be a name or a key is bad usage with what one is made of; nobody has to be there."""
    result = oam(*arguments, "--url", UNREACHABLE, cwd=tmp_path)
    assert (2, "") == (result.code, result.out)
    assert "letters, digits" in result.err
    assert "listening" not in result.err
    assert "watching" not in result.err


def test_text_and_json_together(hosted: Up) -> None:
    """Output for people and for programs at once is bad usage."""
    result = hosted.run("agent", "contract", "echo", "--text", "--json")
    assert (2, "") == (result.code, result.out)
    assert "--text and --json are mutually exclusive" in result.err


def test_the_input_in_the_help(tmp_path: Path) -> None:
    """The help shows that the input may be left out in one pair of brackets."""
    shown = oam("agent", "call", "--help", cwd=tmp_path).out
    assert " [JSON]" in shown
    assert "[[JSON]]" not in shown


def test_an_address_of_a_server_that_is_gone(tmp_path: Path) -> None:
    """An address that nobody answers at is told with the file or variable that gives it, and the way out."""
    file = tmp_path / ".oam-url"
    file.write_text(f"{UNREACHABLE}\n")
    below = tmp_path / "below"
    below.mkdir()
    by_file = oam("status", cwd=below)
    by_variable = oam("status", cwd=below, env={"OAM_URL": UNREACHABLE})
    assert [1, 1] == [by_file.code, by_variable.code]
    assert f"The address comes from {file}: start that server, or remove the file" in by_file.err
    assert "The address comes from OAM_URL: start that server, or unset it" in by_variable.err
    assert "oam up" not in by_file.err + by_variable.err  # it would start another, at another address


def test_a_credentials_file_that_is_gone(tmp_path: Path) -> None:
    """A missing credentials file is told with who names it, without advice about addresses."""
    by_variable = oam("status", cwd=tmp_path, env={"OAM_CREDS": "/none.creds"})
    (tmp_path / ".oam-url").write_text(f'url = "{UNREACHABLE}"\ncreds = "none.creds"\n')
    by_file = oam("status", cwd=tmp_path)
    by_option = oam("mesh", "connect", UNREACHABLE, "--creds", "none.creds", cwd=tmp_path)
    assert "The credentials file '/none.creds' from OAM_CREDS does not exist" in by_variable.err
    assert (
        f"The credentials file '{tmp_path}/none.creds' from {tmp_path}/.oam-url does not exist" in by_file.err
    )
    assert "--url" not in by_variable.err + by_file.err
    assert (1, 1, 2) == (by_variable.code, by_file.code, by_option.code)


def test_connecting_to_nobody_writes_nothing(tmp_path: Path) -> None:
    """`mesh connect` to an address that nobody answers at says so, and leaves no `.oam-url`."""
    result = oam("mesh", "connect", UNREACHABLE, cwd=tmp_path)
    assert "Check the address; .oam-url was not written." in result.err
    assert not (tmp_path / ".oam-url").exists()


def test_mesh_up_where_one_is_up(tmp_path: Path) -> None:
    """A second `mesh up`, and an `oam up`, name the server that is there, and how to use or to stop it."""
    port = str(free_port())
    try:
        assert 0 == oam("mesh", "up", "-p", port, cwd=tmp_path).code
        again, host = side_by_side(("mesh", "up"), ("up", "--port", "0"), cwd=tmp_path)
    finally:
        down = oam("mesh", "down", cwd=tmp_path)
    for result in (again, host):
        assert (1, "") == (result.code, result.out)
        assert f"oam up --url nats://127.0.0.1:{port}`, or stop it with `oam mesh down`" in result.err
    assert "stopped" in down.err


def test_mesh_down_where_none_was_started(tmp_path: Path) -> None:
    """`mesh down` in the wrong folder says to run it in the right one."""
    result = oam("mesh", "down", cwd=tmp_path)
    assert 1 == result.code
    assert "run this command in its folder" in result.err


async def told_of_making_buckets(url: str, number: int) -> str:
    """How the error of making so many buckets is shown."""
    connection = Connection(Target(url), "test")
    await connection.connect()
    try:
        with pytest.raises(ConnectionFailed) as caught, translated_errors(connection, "Making a bucket"):
            for name in range(number):
                await connection.jetstream().create_key_value(KeyValueConfig(bucket=str(name)))
    finally:
        await connection.close()
    return shown(caught.value)


def shown(error: MeshError) -> str:
    """What a person sees of an error."""
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(typer.Exit):
        fail(error)
    return said.getvalue()


async def test_jetstream_is_off() -> None:
    """A server without JetStream is told with how to start one that has it, and nothing else."""
    with running_server() as url:
        told = await told_of_making_buckets(url, 1)
    why = "JetStream is off; start the server with `nats-server -js`, or enable it for this account."
    assert f"Error [connection_failed] Making a bucket failed: {why}\n" == told


async def test_what_jetstream_refuses(tmp_path: Path) -> None:
    """A refusal of a server with JetStream is told in its own words, not as if that were off."""
    config = tmp_path / "server.conf"
    config.write_text(ONE_STREAM.format(store=tmp_path / "store"))
    with running_server("-c", str(config)) as url:
        told = await told_of_making_buckets(url.replace("//", "//u:p@"), 2)
    why = "the server reported 'maximum number of streams reached' (code 10027)."
    assert f"Error [connection_failed] Making a bucket failed: {why}\n" == told


async def test_listening_is_told_when_it_is_true() -> None:
    """What is to be said once a command listens is said after it began to."""
    told: list[str] = []
    both = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        told.append("listening")
        await both.wait()
        yield "one"

    async def begun() -> None:
        told.append("said")
        both.set()

    await print_each(items(), str, begun)
    assert ["listening", "said"] == told


def test_ctrl_c_while_commands_are_imported(tmp_path: Path) -> None:
    """Ctrl-C before a command has begun ends quietly, as later."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C_WHILE_IMPORTING],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (130, "", "") == (done.returncode, done.stdout, done.stderr)
