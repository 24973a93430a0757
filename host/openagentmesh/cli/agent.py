"""`oam agent`: call, stream, send, subscribe, contract."""

from contextlib import aclosing
from typing import Annotated, Any

import typer

from openagentmesh.cli.connecting import Connecting, mesh_command
from openagentmesh.cli.output import (
    Json,
    Payload,
    agent_name,
    print_each,
    print_json,
    print_line,
    to_json_text,
)
from openagentmesh.protocol.contract import AgentContract

app = typer.Typer(help="Use one agent.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The agent, such as nlp.summarizer.", callback=agent_name)]
Timeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds to wait; for a stream, from chunk to chunk.")
]


@mesh_command(app)
async def call(mesh: Connecting, name: Name, payload: Payload = None, timeout: Timeout = 30.0) -> None:
    """Call an agent and print its reply, one line of JSON."""
    async with mesh as node:
        print_json(await node.requests.call(name, payload, timeout, None))


@mesh_command(app)
async def stream(mesh: Connecting, name: Name, payload: Payload = None, timeout: Timeout = 60.0) -> None:
    """Call a streamer and print its chunks, one line of JSON each."""
    async with mesh as node, aclosing(node.requests.stream(name, payload, timeout, None)) as chunks:
        async for chunk in chunks:
            print_json(chunk)


@mesh_command(app)
async def send(mesh: Connecting, name: Name, payload: Payload = None) -> None:
    """Send a request without waiting for its result."""
    async with mesh as node:
        await node.requests.send(name, payload, None, None)


@mesh_command(app)
async def subscribe(mesh: Connecting, name: Name) -> None:
    """Print the events of a publisher, one line of JSON each, until its run ends or Ctrl-C."""
    async with mesh as node, aclosing(node.events.of_agent(name, None)) as events:
        await print_each(events, lambda event: to_json_text(event.data))


@mesh_command(app)
async def contract(
    mesh: Connecting,
    name: Name,
    *,
    text: Annotated[bool, typer.Option("--text", help="Print it as text.")] = False,
    json_: Json = False,
) -> None:
    """Print an agent's input and output types."""
    if text and json_:
        raise typer.BadParameter("--text and --json are mutually exclusive; give one of them")
    async with mesh as node:
        found = await node.directory.contract(name)
        print_line(_as_text(found) if text else to_json_text(found.to_document(), indent=2))


def _as_text(contract: AgentContract) -> str:
    kind = "streamer" if contract.streaming else "responder"
    kind = kind if contract.invocable else "publisher" if contract.streaming else "background task"
    lines = [f"{contract.name} {contract.version} ({kind})", contract.description]
    if contract.tags:
        lines.append(f"tags: {', '.join(contract.tags)}")
    for title, schema in (
        ("input", contract.input_schema),
        ("output", contract.output_schema),
        ("chunks" if contract.invocable else "events", contract.chunk_schema),
    ):
        if schema is not None:
            lines += [f"{title}:", *_fields(schema)]
    return "\n".join(line for line in lines if line)


def _fields(schema: dict[str, Any]) -> list[str]:
    if "properties" not in schema:
        return [f"  {_type(schema)}"]
    required = schema.get("required", [])
    return [
        f"  {name}: {_type(field)}"
        + ("" if name in required else f" = {to_json_text(field.get('default'))}")
        + (f"  {field['description']}" if "description" in field else "")
        for name, field in schema["properties"].items()
    ]


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"array of {_type(field.get('items', {}))}"
    return str(field.get("format") or field.get("type") or "any")
