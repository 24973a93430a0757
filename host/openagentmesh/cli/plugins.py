"""`oam plugins`: installed and enabled plugins; and the plugins that commands themselves use."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import typer

from openagentmesh.agent.client_middleware import ClientMiddlewares
from openagentmesh.cli.output import ConfigFile, Json, fail, note, print_json, print_line, to_json_text
from openagentmesh.hooks.manager import Plugin, Plugins
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.config import FILE_NAME, load_config, plugin_name
from openagentmesh.runtime.loading.plugin_loader import installed_plugins, load_plugins


@cache
def load_local() -> tuple[Plugins, str]:
    """The plugins of the working folder's mesh.toml, and the error when they cannot be used.

    Commands send what these plugins add to requests, such as a token.
    """
    if not Path(FILE_NAME).exists():
        return Plugins(), ""
    try:
        return load_plugins(load_config()), ""
    except MeshError as exc:
        return Plugins(), exc.message


def local_client_middlewares() -> ClientMiddlewares:
    """The client middlewares of these plugins; a note on stderr when they cannot be used."""
    found, error = load_local()
    if error:
        note_unusable(error)
    return found.client_middlewares()


def note_unusable(error: str) -> None:
    """Print why the plugins of the working folder's mesh.toml are not used."""
    note(f"the plugins of {FILE_NAME} are not used: {error}")


def plugins(config: ConfigFile = None, *, json_: Json = False) -> None:
    """List all plugins: installed or a file, their order, hooks and settings."""
    try:
        read = load_config(config)
        found = load_plugins(read)
    except MeshError as exc:
        fail(exc, json_=json_)
    order = {plugin_name(entry): entry for entry in read.host.plugins}
    rows = [_row(found, plugin, order[plugin.name]) for plugin in found.all]
    rows += [{"name": name, "enabled": False} for name in sorted(installed_plugins().keys() - order.keys())]
    if json_:
        print_json(rows)
        return
    if not rows:
        note("no plugins are installed, and none are enabled")
    for number, row in enumerate(rows, 1):
        if not row["enabled"]:
            print_line(f"   {row['name']}  {typer.style('installed, not enabled', dim=True)}")
            continue
        print_line(f"{number:>2} {typer.style(row['name'], bold=True)}  {', '.join(row['hooks'])}")
        if row["settings"]:
            print_line(f"   {' ' * len(row['name'])}  {to_json_text(row['settings'])}")


def _row(found: Plugins, plugin: Plugin, entry: str) -> dict[str, Any]:
    # Pydantic's own JSON writes infinity, which means no limit, as null.
    settings = json.loads(plugin.settings.model_dump_json()) if plugin.settings else {}
    return {
        "name": plugin.name,
        "enabled": True,
        "from": entry,
        "hooks": found.hooks_of(plugin),
        "settings": settings,
    }
