"""What commands share: options, and the output of results and errors."""

import asyncio
import json
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer

from openagentmesh.mesh.runner import stop_event
from openagentmesh.protocol.errors import ConnectionFailed, MeshError
from openagentmesh.protocol.json_schema import Schema, resolved
from openagentmesh.protocol.subjects import invalid_name
from openagentmesh.transport.tasks import cancel_and_wait

T = TypeVar("T")
_MAX_DETAILS: Final = 2000
_EXAMPLES: Final = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def run(main: Coroutine[Any, Any, None], *, json_: bool = False) -> None:
    """Run one command; a MeshError is printed, and the exit code is 1."""
    try:
        asyncio.run(main)
    except MeshError as exc:
        fail(exc, json_=json_)
    except BrokenPipeError:
        # The reader of the output has exited.
        sys.stderr.close()
        raise typer.Exit(1) from None


def fail(error: MeshError, *, json_: bool = False) -> NoReturn:
    """Print an error, as its envelope with `json_`, and exit with code 1."""
    if json_:
        typer.echo(to_json_text(error.to_dict()), err=True)
        raise typer.Exit(1)
    typer.echo(f"Error [{error.code}] {error.message}", err=True)
    if error.details:
        typer.echo(f"  {to_json_text(error.details)[:_MAX_DETAILS]}", err=True)
    if hint := _hint(error):
        typer.echo(f"  {hint}", err=True)
    raise typer.Exit(1)


def _hint(error: MeshError) -> str:
    """The hint of the error's class; empty where it does not apply."""
    if "key" in error.details:  # the hint is for agents
        return ""
    if isinstance(error, ConnectionFailed) and "url" not in error.details:  # the hint is for addresses
        return ""
    return error.hint.replace("NAME", error.agent) if error.agent or "NAME" not in error.hint else ""


def to_json_text(value: object, *, indent: int | None = None) -> str:
    """A value as JSON, readable in any language."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_as_text)


def _as_text(value: object) -> str:
    """A value that is not JSON, as text."""
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)


def count(number: int, thing: str) -> str:
    """A number of things, in words: `1 agent`, `2 agents`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def print_line(text: str) -> None:
    """Print a line of data and flush it, also into a pipe."""
    typer.echo(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    print_line(to_json_text(value))


async def _nothing() -> None: ...


async def print_each(
    items: AsyncIterable[T], line: Callable[[T], str], on_begin: Callable[[], Awaitable[None]] = _nothing
) -> None:
    """Print a line for each item as it arrives, until the last one or Ctrl-C.

    `on_begin` is awaited once the first item has been requested, so that its subscription exists.
    """

    async def print_all() -> None:
        async for item in items:
            print_line(line(item))

    printing = asyncio.create_task(print_all())
    stopping = asyncio.create_task(stop_event().wait())
    try:
        await asyncio.sleep(0)  # `printing` runs up to its first wait
        await on_begin()
        await asyncio.wait([printing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if printing.done():
            printing.result()
    finally:
        await cancel_and_wait(stopping, printing)


def note(text: str) -> None:
    """Print a line to stderr."""
    typer.echo(text, err=True)


def agent_name(name: str | None) -> str | None:
    """Check that an argument is a valid name, before anything is sent."""
    if name is not None and (reason := invalid_name(name)):
        raise typer.BadParameter(f"{name!r} is not a valid name: {reason}.")
    return name


def _read_payload(text: str | None) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """The input of a command, JSON from the command line or from stdin."""
    try:
        if text is None and not sys.stdin.isatty():
            text = sys.stdin.read()
        return json.loads(text, parse_constant=_no_constant) if text and text.strip() else None
    except ValueError as exc:  # also for bytes that are not text
        start = (text or "")[:80]
        raise typer.BadParameter(
            f"the input is not JSON ({exc}): {start!r}. Text needs quotes of its own: '\"hello\"'"
        ) from None


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="The NATS server; else OAM_URL, else the nearest .oam-url, else localhost:4222."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The configuration; else mesh.toml here.")]
# Commands receive the decoded value, not the text.
Payload = Annotated[
    str | None,
    typer.Argument(
        metavar="JSON", help="The input as JSON; read from stdin without it.", callback=_read_payload
    ),
]


def example_input(schema: dict[str, Any] | None) -> object:
    """A small example input for a JSON Schema."""
    if schema is None:
        return None
    shape = resolved(schema, schema)
    if "properties" not in shape:
        return _example(shape)
    properties = shape["properties"]
    wanted = shape.get("required") or list(properties)[:1]
    return {name: _example(resolved(properties[name], schema)) for name in wanted}


def _example(schema: Schema) -> object:
    return _EXAMPLES.get(str(schema.get("type")), "hello")
