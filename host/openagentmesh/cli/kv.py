"""`oam kv`: the shared state of the mesh."""

from contextlib import aclosing
from typing import Annotated

import typer

from openagentmesh.bus.buckets import Buckets
from openagentmesh.cli.output import Json, Url, as_json, connected, note, run, say, say_each
from openagentmesh.mesh.kv import KV
from openagentmesh.mesh.node import Node

app = typer.Typer(help="The shared state: texts under keys.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="Words joined by dots, as in shop.settings.open.")]


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
def watch(key: Key, url: Url = None, *, json_: Json = False) -> None:
    """Print a key's text as it is and each time it changes, until Ctrl-C; with '*' or '>' of many keys."""

    async def main() -> None:
        async with connected(url) as node, aclosing(_kv(node).watch(key)) as values:
            note(f"watching {key}; Ctrl-C stops")
            await say_each(values, lambda text: as_json(text) if json_ else text)

    run(main(), json_=json_)


def _kv(node: Node) -> KV:
    async def ready() -> Buckets:
        return node.buckets

    return KV(ready)
