"""`oam agent`: call, stream, contract."""

import json
from contextlib import aclosing
from typing import Annotated, Any

import typer

from openagentmesh.cli.connecting import connected
from openagentmesh.cli.output import (
    Json,
    Payload,
    Url,
    agent_name,
    as_json,
    read_payload,
    run,
    say,
    say_each,
    usage_error,
)
from openagentmesh.protocol.contract import AgentContract

app = typer.Typer(help="Use one agent.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The agent, as in nlp.summarizer.", callback=agent_name)]
Timeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds to wait; for a stream, from chunk to chunk.")
]


@app.command()
def call(
    name: Name, payload: Payload = None, timeout: Timeout = 30.0, url: Url = None, *, json_: Json = False
) -> None:
    """Call an agent and print its reply, one line of JSON."""
    given = read_payload(payload)

    async def main() -> None:
        async with connected(url) as node:
            say(as_json(await node.caller.call(name, given, timeout, None)))

    run(main(), json_=json_)


@app.command()
def stream(
    name: Name, payload: Payload = None, timeout: Timeout = 60.0, url: Url = None, *, json_: Json = False
) -> None:
    """Call a streamer and print its chunks, one line of JSON each."""
    given = read_payload(payload)

    async def main() -> None:
        async with (
            connected(url) as node,
            aclosing(node.caller.stream(name, given, timeout, None)) as chunks,
        ):
            async for chunk in chunks:
                say(as_json(chunk))

    run(main(), json_=json_)


@app.command()
def send(name: Name, payload: Payload = None, url: Url = None, *, json_: Json = False) -> None:
    """Send a request without waiting for what the agent does with it."""
    given = read_payload(payload)

    async def main() -> None:
        async with connected(url) as node:
            await node.caller.send(name, given, None, None)

    run(main(), json_=json_)


@app.command()
def subscribe(name: Name, url: Url = None, *, json_: Json = False) -> None:
    """Print the events of a publisher, one line of JSON each, until it ends or Ctrl-C."""

    async def main() -> None:
        async with connected(url) as node, aclosing(node.events.of_agent(name, None)) as events:
            await say_each(events, lambda event: as_json(event.data))

    run(main(), json_=json_)


@app.command()
def contract(
    name: Name,
    text: Annotated[bool, typer.Option("--text", help="Print it for people.")] = False,  # noqa: FBT002 - a flag
    url: Url = None,
    *,
    json_: Json = False,
) -> None:
    """Print what an agent takes and gives back."""
    if text and json_:
        usage_error("--text is for people, --json for programs; give one of them")

    async def main() -> None:
        async with connected(url) as node:
            found = await node.directory.contract(name)
            say(_as_text(found) if text else as_json(json.loads(found.to_registry_json()), indent=2))

    run(main(), json_=json_)


def _as_text(contract: AgentContract) -> str:
    kind = "streamer" if contract.streaming else "responder"
    kind = kind if contract.invocable else "publisher" if contract.streaming else "background task"
    lines = [f"{contract.name} {contract.version} ({kind})", contract.description]
    if contract.tags:
        lines.append(f"tags: {', '.join(contract.tags)}")
    for title, schema in (
        ("takes", contract.input_schema),
        ("gives", contract.output_schema),
        ("chunks" if contract.invocable else "events", contract.chunk_schema),
    ):
        if schema is not None:
            lines += [f"{title}:", *_fields(schema)]
    return "\n".join(line for line in lines if line)


def _fields(schema: dict[str, Any]) -> list[str]:
    fields = schema.get("properties")
    if fields is None:
        return [f"  {_type(schema)}"]
    required = schema.get("required", [])
    return [
        f"  {name}: {_type(field)}"
        + ("" if name in required else f" = {as_json(field.get('default'))}")
        + (f"  {field['description']}" if "description" in field else "")
        for name, field in fields.items()
    ]


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"array of {_type(field.get('items', {}))}"
    return str(field.get("format") or field.get("type") or "any")
