"""`oam kv`: the shared state of the mesh."""

from contextlib import aclosing
from typing import Annotated, Final

import typer

from openagentmesh.cli.connecting import Connecting, mesh_command
from openagentmesh.cli.output import Json, note, print_each, print_json, print_line, to_json_text
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.subjects import invalid_key
from openagentmesh.state.kv import KV
from openagentmesh.transport.kv import KVBuckets

app = typer.Typer(help="The shared state: text under keys.", no_args_is_help=True)


def _key(key: str) -> str:
    if reason := invalid_key(key):
        raise typer.BadParameter(f"{key!r} is not a valid key: {reason}.")
    return key


def _pattern(pattern: str) -> str:
    if reason := invalid_key(pattern, pattern=True):
        raise typer.BadParameter(f"{pattern!r} is not a valid key or pattern: {reason}.")
    return pattern


_HELP: Final = "Words joined by dots, such as shop.settings.open."
Key = Annotated[str, typer.Argument(help=_HELP, callback=_key)]
Pattern = Annotated[str, typer.Argument(help=_HELP, callback=_pattern)]


@mesh_command(app)
async def get(mesh: Connecting, key: Key, *, json_: Json = False) -> None:
    """Print the text under a key."""
    async with mesh as node:
        text = await _kv(node).get(key)
        print_line(to_json_text({"key": key, "value": text}) if json_ else text)


@mesh_command(app)
async def put(
    mesh: Connecting,
    key: Key,
    value: Annotated[str, typer.Argument(help="The text.")],
    *,
    json_: Json = False,
) -> None:
    """Set a key."""
    async with mesh as node:
        revision = await _kv(node).put(key, value)
        if json_:
            print_json({"key": key, "revision": revision})


@mesh_command(app)
async def delete(mesh: Connecting, key: Key) -> None:
    """Delete a key."""
    async with mesh as node:
        await _kv(node).delete(key)


@mesh_command(app)
async def watch(mesh: Connecting, key: Pattern, *, json_: Json = False) -> None:
    """Print a key's text now and each time it changes, until Ctrl-C; '*' and '>' match many keys."""
    async with mesh as node, aclosing(_kv(node).watch(key)) as values:
        note(f"watching {key}; stop with Ctrl-C")
        await print_each(values, lambda text: to_json_text(text) if json_ else text)


def _kv(node: Node) -> KV:
    async def ready() -> KVBuckets:
        return node.buckets

    return KV(ready)
