"""`oam check`: what would fail at a start, without one."""

import asyncio

import typer

from openagentmesh.cli.output import ConfigFile, count, fail, note, print_line
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.config import load_config
from openagentmesh.runtime.host import Host


def check(config: ConfigFile = None) -> None:
    """Report what would fail at a start: mesh.toml, plugins and their settings, modules. Connects to nothing.

    Modules are imported for that, as at a start. The exit code is 1 when anything fails.
    """
    try:
        host = Host(load_config(config))
        problems = asyncio.run(host.check())
    except MeshError as exc:
        fail(exc)
    for problem in problems:
        print_line(problem)
    if problems:
        raise typer.Exit(1)
    modules, plugins = count(len(host.modules), "module"), count(len(host.plugins.all), "plugin")
    note(f"no problems: {modules}, {plugins}")
