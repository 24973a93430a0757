"""`oam kv`: the shared state of the mesh."""

from contextlib import aclosing
from typing import Annotated, Final

import typer

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import Json, Url, as_json, note, run, say, say_each, usage_error
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.subjects import invalid_key
from openagentmesh.state.kv import KV
from openagentmesh.transport.kv import KVBuckets

app = typer.Typer(help="The shared state: texts under keys.", no_args_is_help=True)


def _key(key: str) -> str:
    if why := invalid_key(key):
        usage_error(f"{key!r} is no key: {why}.")
    return key


def _pattern(pattern: str) -> str:
    if why := invalid_key(pattern, pattern=True):
        usage_error(f"{pattern!r} matches no key: {why}.")
    return pattern


_HELP: Final = "Words joined by dots, as in shop.settings.open."
Key = Annotated[str, typer.Argument(help=_HELP, callback=_key)]
Pattern = Annotated[str, typer.Argument(help=_HELP, callback=_pattern)]


@app.command()
def get(key: Key, url: Url = None, *, json_: Json = False) -> None:
    """Print the text under a key."""

    async def main() -> None:
        async with connected(url) as node:
            text = await _kv(node).get(key)
            say(as_json({"key": key, "value": text}) if json_ else text)

    run(main(), json_=json_)


@app.command()
def put(
    key: Key,
    value: Annotated[str, typer.Argument(help="The text, as it is.")],
    url: Url = None,
    *,
    json_: Json = False,
) -> None:
    """Set a key."""

    async def main() -> None:
        async with connected(url) as node:
            revision = await _kv(node).put(key, value)
            if json_:
                say(as_json({"key": key, "revision": revision}))

    run(main(), json_=json_)


@app.command()
def delete(key: Key, url: Url = None, *, json_: Json = False) -> None:
    """Remove a key."""

    async def main() -> None:
        async with connected(url) as node:
            await _kv(node).delete(key)

    run(main(), json_=json_)


@app.command()
def watch(key: Pattern, url: Url = None, *, json_: Json = False) -> None:
    """Print a key's text as it is and each time it changes, until Ctrl-C; with '*' or '>' of many keys."""

    async def main() -> None:
        async with connected(url) as node, aclosing(_kv(node).watch(key)) as values:
            note(f"watching {key}; Ctrl-C stops")
            await say_each(values, lambda text: as_json(text) if json_ else text)

    run(main(), json_=json_)


def _kv(node: Node) -> KV:
    async def ready() -> KVBuckets:
        return node.buckets

    return KV(ready)
