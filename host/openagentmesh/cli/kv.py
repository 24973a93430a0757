"""`oam kv`: the shared state of the mesh."""

from contextlib import aclosing
from typing import Annotated, Final

import typer

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import Json, Url, note, print_each, print_line, run, to_json_text, usage_error
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.subjects import invalid_key
from openagentmesh.state.kv import KV
from openagentmesh.transport.kv import KVBuckets

app = typer.Typer(help="The shared state: text under keys.", no_args_is_help=True)


def _key(key: str) -> str:
    if reason := invalid_key(key):
        usage_error(f"{key!r} is not a valid key: {reason}.")
    return key


def _pattern(pattern: str) -> str:
    if reason := invalid_key(pattern, pattern=True):
        usage_error(f"{pattern!r} is not a valid key or pattern: {reason}.")
    return pattern


_HELP: Final = "Words joined by dots, such as shop.settings.open."
Key = Annotated[str, typer.Argument(help=_HELP, callback=_key)]
Pattern = Annotated[str, typer.Argument(help=_HELP, callback=_pattern)]


@app.command()
def get(key: Key, url: Url = None, *, json_: Json = False) -> None:
    """Print the text under a key."""

    async def main() -> None:
        async with connected(url) as node:
            text = await _kv(node).get(key)
            print_line(to_json_text({"key": key, "value": text}) if json_ else text)

    run(main(), json_=json_)


@app.command()
def put(
    key: Key, value: Annotated[str, typer.Argument(help="The text.")], url: Url = None, *, json_: Json = False
) -> None:
    """Set a key."""

    async def main() -> None:
        async with connected(url) as node:
            revision = await _kv(node).put(key, value)
            if json_:
                print_line(to_json_text({"key": key, "revision": revision}))

    run(main(), json_=json_)


@app.command()
def delete(key: Key, url: Url = None, *, json_: Json = False) -> None:
    """Delete a key."""

    async def main() -> None:
        async with connected(url) as node:
            await _kv(node).delete(key)

    run(main(), json_=json_)


@app.command()
def watch(key: Pattern, url: Url = None, *, json_: Json = False) -> None:
    """Print a key's text now and each time it changes, until Ctrl-C; '*' and '>' match many keys."""

    async def main() -> None:
        async with connected(url) as node, aclosing(_kv(node).watch(key)) as values:
            note(f"watching {key}; stop with Ctrl-C")
            await print_each(values, lambda text: to_json_text(text) if json_ else text)

    run(main(), json_=json_)


def _kv(node: Node) -> KV:
    async def ready() -> KVBuckets:
        return node.buckets

    return KV(ready)
