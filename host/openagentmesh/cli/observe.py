"""`oam observe`: log events of agents, and the levels from which they are published."""

from contextlib import aclosing
from typing import Annotated

import typer

from openagentmesh.cli.connecting import Connecting, mesh_command
from openagentmesh.cli.output import Json, agent_name, note, print_each, print_json, print_line, to_json_text
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.messages import LogEvent, LogLevel
from openagentmesh.state.observe import Observe

app = typer.Typer(help="Log events of agents.", no_args_is_help=True)

Agent = Annotated[str | None, typer.Argument(help="One agent; all of them without it.", callback=agent_name)]
_COLORS = {"debug": typer.colors.BLUE, "warn": typer.colors.YELLOW, "error": typer.colors.RED}


@mesh_command(app)
async def logs(
    mesh: Connecting,
    agent: Agent = None,
    level: Annotated[LogLevel, typer.Option(help="From this level on.")] = "debug",
    *,
    json_: Json = False,
) -> None:
    """Print log events as they are published, until Ctrl-C."""
    async with mesh as node, aclosing(_observe(node).logs(agent, level=level)) as events:

        async def on_begin() -> None:
            await node.connection.flush()
            note(f"log events of {agent or 'all agents'}; stop with Ctrl-C")

        await print_each(events, lambda event: event.model_dump_json() if json_ else _line(event), on_begin)


@mesh_command(app)
async def config(mesh: Connecting, agent: Agent = None, *, json_: Json = False) -> None:
    """Print the lowest level of log events that an agent publishes."""
    async with mesh as node:
        found = await _observe(node).get(agent)
    print_line(to_json_text(found.model_dump()) if json_ else f"{agent or 'all agents'}: {found.log_level}")


@mesh_command(app, "set")
async def set_(
    mesh: Connecting,
    log_level: Annotated[LogLevel, typer.Option("--log-level", help="The lowest published level.")],
    agent: Annotated[
        str | None, typer.Argument(help="One agent; without it give --global.", callback=agent_name)
    ] = None,
    *,
    everywhere: Annotated[
        bool, typer.Option("--global", help="For all agents without a level of their own.")
    ] = False,
    json_: Json = False,
) -> None:
    """Set the lowest level of log events that an agent publishes, on all its instances and at once."""
    if (agent is None) != everywhere:
        raise typer.BadParameter("Give one agent, or --global.")
    async with mesh as node:
        if agent is None:
            await _observe(node).set_global(log_level=log_level)
        else:
            await _observe(node).set(agent, log_level=log_level)
        note(f"{agent or 'all agents'}: {log_level}")
        if json_:
            print_json({"log_level": log_level})


def _observe(node: Node) -> Observe:
    async def ready() -> Node:
        return node

    return Observe(ready)


def _line(event: LogEvent) -> str:
    level = typer.style(f"{event.level:<5}", fg=_COLORS.get(event.level))
    data = f"  {to_json_text(event.data)}" if event.data else ""
    message = f"  {event.message}" if event.message else ""
    return f"{event.timestamp[11:23]}  {level}  {event.agent}  {event.event}{message}{data}"
