"""What commands share: options, and how results and errors are shown."""

import asyncio
import json
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer

from openagentmesh.mesh.runner import stop_event
from openagentmesh.protocol.errors import ConnectionFailed, MeshError
from openagentmesh.protocol.subjects import invalid_name
from openagentmesh.transport.tasks import cancel_and_wait

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="The NATS server; else OAM_URL, else the nearest .oam-url, else localhost:4222."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too, for programs.")]

Payload = Annotated[
    str | None, typer.Argument(metavar="JSON", help="The input as JSON; read from stdin when left out.")
]

T = TypeVar("T")
_MOST_DETAILS: Final = 2000


def run(main: Coroutine[Any, Any, None], *, json_: bool = False) -> None:
    """Run one command; an error of the mesh is told in a line, and the exit code is 1."""
    try:
        asyncio.run(main)
    except MeshError as exc:
        fail(exc, json_=json_)
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody to tell.
        sys.stderr.close()
        raise typer.Exit(1) from None


def fail(error: MeshError, *, json_: bool = False) -> NoReturn:
    """Show an error, as its envelope with `json_`, and end with exit code 1."""
    if json_:
        typer.echo(as_json(error.to_dict()), err=True)
        raise typer.Exit(1)
    typer.echo(f"Error [{error.code}] {error.message}", err=True)
    if error.details:
        typer.echo(f"  {as_json(error.details)[:_MOST_DETAILS]}", err=True)
    if hint := _hint(error):
        typer.echo(f"  {hint}", err=True)
    raise typer.Exit(1)


def _hint(error: MeshError) -> str:
    """What helps with errors of this kind; nothing where it would lead nowhere."""
    if "key" in error.details:  # the hint is about agents
        return ""
    if isinstance(error, ConnectionFailed) and "url" not in error.details:  # it is about addresses
        return ""
    if "NAME" in error.hint and not error.agent:
        return ""
    return error.hint.replace("NAME", error.agent)


def as_json(value: object, *, indent: int | None = None) -> str:
    """A value as JSON, readable in any language."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_as_text)


def _as_text(value: object) -> str:
    """What was published as no JSON, as text."""
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)


def count(number: int, thing: str) -> str:
    """A number of things, in words: `1 agent`, `2 agents`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def say(text: str) -> None:
    """Print a line of data at once, also into a pipe."""
    typer.echo(text)
    sys.stdout.flush()


async def _nothing() -> None: ...


async def say_each(
    items: AsyncIterable[T], line: Callable[[T], str], begun: Callable[[], Awaitable[None]] = _nothing
) -> None:
    """Print a line for each item as it comes, until there are no more or Ctrl-C.

    `begun` runs when the first item has been asked for, and so whatever listens for it does.
    """

    async def say_all() -> None:
        async for item in items:
            say(line(item))

    saying = asyncio.create_task(say_all())
    stopping = asyncio.create_task(stop_event().wait())
    try:
        await asyncio.sleep(0)  # `saying` runs up to where it waits
        await begun()
        await asyncio.wait([saying, stopping], return_when=asyncio.FIRST_COMPLETED)
        if saying.done():
            saying.result()
    finally:
        await cancel_and_wait(stopping, saying)


def note(text: str) -> None:
    """Print a line that is no data."""
    typer.echo(text, err=True)


def usage_error(text: str) -> NoReturn:
    """End with exit code 2."""
    raise typer.BadParameter(text)


def agent_name(name: str | None) -> str | None:
    """See that an argument can name an agent, before anything is sent."""
    if name is not None and (why := invalid_name(name)):
        usage_error(f"{name!r} names nothing: {why}.")
    return name


def read_payload(text: str | None) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """The input of a command, JSON from the command line or from stdin."""
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.read()
    if text is None or not text.strip():
        return None
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as exc:
        usage_error(
            f"the input is no JSON ({exc}): {text[:80]!r}. A text needs quotes of its own: '\"hello\"'"
        )


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def example_input(schema: dict[str, Any] | None) -> object:
    """A small input that fits a JSON Schema well enough to be shown as an example."""
    if schema is None:
        return None
    shape = _resolved(schema, schema)
    if "properties" not in shape:
        return _EXAMPLES.get(str(shape.get("type")), lambda: "hello")()
    wanted = shape.get("required") or list(shape["properties"])[:1]
    return {
        name: _EXAMPLES.get(str(_resolved(shape["properties"][name], schema).get("type")), lambda: "hello")()
        for name in wanted
    }


def _resolved(shape: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = str(shape.get("$ref", ""))
    found: dict[str, Any] = root.get("$defs", {}).get(reference.rpartition("/")[2], shape)
    return found


_EXAMPLES: Final[dict[str, Callable[[], object]]] = {
    "integer": lambda: 1,
    "number": lambda: 1.5,
    "boolean": lambda: True,
    "array": list,
    "object": dict,
}
