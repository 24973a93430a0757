"""`oam mesh`: a development server, the catalog, and messages on subjects."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from openagentmesh.cli.connecting import Connecting, mesh_command, with_advice
from openagentmesh.cli.output import (
    Json,
    Payload,
    agent_name,
    fail,
    note,
    print_each,
    print_json,
    print_line,
    run,
    to_json_text,
)
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.runner import stop_event
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.protocol.subjects import CONTENT_TYPE, in_channel, invalid_pattern, invalid_subject
from openagentmesh.transport import address
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.server import (
    HOST,
    LOCK_FILE,
    EmbeddedServer,
    ServerFailed,
    lock_store,
    server_command,
    start_failure,
)

app = typer.Typer(help="The mesh as a whole.", no_args_is_help=True)

_STORE: Final = Path(".oam/nats")
_PID_FILE: Final = _STORE / "server.pid"
_LOG_FILE: Final = _STORE / "server.log"
# For the server's start, and for its stop.
_TIMEOUT_S: Final = 10.0
_POLL_INTERVAL_S: Final = 0.02
_JSON_HEADERS: Final = {CONTENT_TYPE: "application/json"}
_MAX_BACKLOG: Final = 10_000
# The command for an agent, by invocable and streaming.
_KINDS: Final = {(True, False): "call", (True, True): "stream", (False, True): "events", (False, False): "-"}


@app.command()
def up(
    port: Annotated[int, typer.Option("-p", "--port", min=1, max=65535, help="Where it listens.")] = 4222,
    *,
    foreground: Annotated[bool, typer.Option("-f", "--foreground", help="Stay until Ctrl-C.")] = False,
    json_: Json = False,
) -> None:
    """Start a NATS server for development, without agents, and write .oam-url."""
    run(_foreground(port, json_=json_) if foreground else _background(port, json_=json_), json_=json_)


async def _foreground(port: int, *, json_: bool) -> None:
    server = EmbeddedServer(port, str(_STORE), on_event=note)
    await server.start()
    path = address.write(Path.cwd(), server.url)
    try:
        stop = stop_event()
        note(f"nats-server is running on {server.url}; stop it with Ctrl-C")
        if json_:
            print_json({"url": server.url, "pid": server.pid})
        await stop.wait()
    finally:
        path.unlink(missing_ok=True)
        await server.stop()


async def _background(port: int, *, json_: bool) -> None:
    url = f"nats://{HOST}:{port}"
    lock = lock_store(_STORE)
    _LOG_FILE.write_text("")
    process = subprocess.Popen(  # noqa: ASYNC220 - returns at once; the server outlives this process
        [*server_command(port, str(_STORE)), "-P", str(_PID_FILE), "-l", str(_LOG_FILE)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=[lock.fileno()],
    )
    lock.write(f"{process.pid} {url}")  # for the message of other servers
    lock.close()
    await _wait_ready(process, url)
    address.write(Path.cwd(), url)
    note(f"nats-server (pid {process.pid}) is running on {url}; stop it with `oam mesh down`")
    if json_:
        print_json({"url": url, "pid": process.pid})


async def _wait_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Wait until the server's log reports that it is ready; kill it when that takes too long."""
    deadline = time.monotonic() + _TIMEOUT_S
    while process.poll() is None:
        if "Server is ready" in _LOG_FILE.read_text():
            return
        if time.monotonic() > deadline:
            process.kill()
            raise ServerFailed(f"nats-server is not ready after {_TIMEOUT_S:g}s; see {_LOG_FILE}.")
        await asyncio.sleep(_POLL_INTERVAL_S)
    fatal = [line for line in _LOG_FILE.read_text().splitlines() if "[FTL]" in line]
    raise ServerFailed(start_failure(" ".join(fatal), url))


@app.command()
def down(*, json_: Json = False) -> None:
    """Stop the server that `oam mesh up` started here."""
    if not _PID_FILE.is_file():
        message = "No server was started here with `oam mesh up`; run this command in its folder."
        fail(ServerFailed(message), json_=json_)
    lock = _STORE / LOCK_FILE
    pid = lock.read_text().partition(" ")[0] if lock.exists() else ""
    # A running server holds the lock; without one, the pid may belong to another process by now.
    with suppress(ServerFailed):
        lock_store(_STORE).close()
        pid = ""
    if pid:
        os.kill(int(pid), signal.SIGTERM)
        run(_wait_stopped(), json_=json_)
    note("stopped" if pid else "it was not running")
    if json_:
        print_json({"stopped": bool(pid)})
    _PID_FILE.unlink(missing_ok=True)
    written = Path.cwd() / address.FILE_NAME
    if written.is_file() and written.read_text(encoding="utf-8").startswith(f"nats://{HOST}:"):
        written.unlink()  # one that `mesh connect` wrote for another server is kept


@retry(
    retry=retry_if_exception_type(ServerFailed),
    wait=wait_fixed(_POLL_INTERVAL_S),
    stop=stop_after_delay(_TIMEOUT_S),
    reraise=True,
)
async def _wait_stopped() -> None:
    """Wait until the store is not locked any more: the server has ended."""
    lock_store(_STORE).close()


@app.command()
def connect(
    url: Annotated[str, typer.Argument(help="The NATS server, such as nats://mesh.example.com:4222.")],
    creds: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A credentials file for it.")
    ] = None,
    *,
    json_: Json = False,
) -> None:
    """Check a server and write its address to .oam-url, for commands in this folder and below."""
    target = Target(url, str(creds.resolve()) if creds else None)

    async def main() -> None:
        connection = Connection(target, "oam")
        try:
            await connection.connect()
        except ConnectionFailed as exc:
            raise with_advice(exc, "Check the address; .oam-url was not written.") from exc
        await connection.close()
        path = address.write(Path.cwd(), url, target.creds)
        note(f"{target.display_url} answers; {path.name} written")

    run(main(), json_=json_)


@mesh_command(app)
async def catalog(
    mesh: Connecting,
    channel: Annotated[
        str | None, typer.Option(help="Only this name and the names below it.", callback=agent_name)
    ] = None,
    *,
    json_: Json = False,
) -> None:
    """List the agents of the mesh."""
    async with mesh as node:
        entries = [
            entry
            for entry in await node.directory.catalog()
            if channel is None or in_channel(entry.name, channel)
        ]
    if json_:
        print_json([entry.model_dump() for entry in entries])
        return
    if not entries:
        note("no agents" if channel is None else f"no agents in '{channel}'")
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        kind = _KINDS[entry.invocable, entry.streaming]
        about = entry.description.partition("\n")[0]
        print_line(f"{entry.name:<{width}}  {entry.version}  {kind:<6}  {about}")


@mesh_command(app)
async def publish(
    mesh: Connecting,
    subject: Annotated[str, typer.Argument(help="A NATS subject without wildcards.")],
    payload: Payload = None,
) -> None:
    """Publish one JSON value on a subject."""
    if reason := invalid_subject(subject):
        raise typer.BadParameter(f"'{subject}' cannot be published to: {reason}")
    async with mesh as node:
        # Text is published as JSON, too: it is quoted on the command line.
        await node.connection.publish(subject, codec.encode(payload), write_headers(_JSON_HEADERS))
        await node.connection.flush()


@mesh_command(app)
async def listen(
    mesh: Connecting,
    subject: Annotated[str, typer.Argument(help="A NATS subject, or a pattern such as 'mesh.errors.>'.")],
    *,
    json_: Json = False,
) -> None:
    """Print every message on a subject until Ctrl-C, one line each."""
    if reason := invalid_pattern(subject):
        raise typer.BadParameter(f"'{subject}' is not a subject: {reason}")
    async with mesh as node:
        messages = await _listen(node, subject)
        note(f"listening on {subject}; stop with Ctrl-C")
        await print_each(messages, partial(_line, as_record=json_))


async def _listen(node: Node, subject: str) -> AsyncIterator[Message]:
    """The messages of a subject from now on."""
    messages: asyncio.Queue[Message] = asyncio.Queue(_MAX_BACKLOG)

    def receive(message: Message) -> None:
        # Lines above the limit are lost when the terminal is slower than the mesh.
        with suppress(asyncio.QueueFull):
            messages.put_nowait(message)

    async def received() -> AsyncIterator[Message]:
        while True:
            yield await messages.get()

    await node.connection.subscribe(subject, receive)
    await node.connection.flush()
    return received()


def _line(message: Message, *, as_record: bool) -> str:
    body = message.body.decode("utf-8", "replace")
    if not as_record:
        return f"{message.subject}  {body}"
    headers = read_headers(message.head) if message.head else {}
    return to_json_text(
        {"subject": message.subject, "reply": message.reply, "headers": headers, "body": body}
    )
