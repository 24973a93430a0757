"""`oam plugins`: what is installed and enabled; and the plugins that commands themselves use."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import typer

from openagentmesh.agent.client_middleware import Border
from openagentmesh.cli.output import Json, as_json, fail, note, say
from openagentmesh.hooks.manager import Plugin, Plugins
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.config import FILE_NAME, load_config, plugin_name
from openagentmesh.runtime.loading.plugin_loader import installed, load_plugins


@cache
def enabled_here() -> tuple[Plugins, str]:
    """The plugins that the working folder's mesh.toml enables; none, and why, when they cannot be used.

    Commands carry what these plugins add to requests, such as a token.
    """
    if not Path(FILE_NAME).exists():
        return Plugins(), ""
    try:
        return load_plugins(load_config()), ""
    except MeshError as exc:
        return Plugins(), exc.message


def border_here() -> Border:
    """What requests of commands pass; a note when the plugins cannot be used."""
    found, why_not = enabled_here()
    if why_not:
        note_unusable(why_not)
    return found.border()


def note_unusable(why: str) -> None:
    """Tell why the plugins of the working folder's mesh.toml cannot be used."""
    note(f"the plugins of {FILE_NAME} are not used: {why}")


def plugins(config: Path | None = None, *, json_: Json = False) -> None:
    """Show all plugins: installed or a file, enabled in which order, the hooks they use, their settings."""
    try:
        read = load_config(config)
        found = load_plugins(read)
    except MeshError as exc:
        fail(exc, json_=json_)
    order = {plugin_name(entry): entry for entry in read.host.plugins}
    rows = [_described(found, plugin, order[plugin.name]) for plugin in found.all]
    rows += [{"name": name, "enabled": False} for name in sorted(installed().keys() - order.keys())]
    if json_:
        say(as_json(rows))
        return
    if not rows:
        note("no plugins are installed, and none are enabled")
    for number, row in enumerate(rows, 1):
        if not row["enabled"]:
            say(f"   {row['name']}  {typer.style('installed, not enabled', dim=True)}")
            continue
        say(f"{number:>2} {typer.style(row['name'], bold=True)}  {', '.join(row['hooks'])}")
        if row["settings"]:
            say(f"   {' ' * len(row['name'])}  {as_json(row['settings'])}")


def _described(found: Plugins, plugin: Plugin, entry: str) -> dict[str, Any]:
    # By way of pydantic's own JSON, which writes "no limit" as null.
    settings = json.loads(plugin.settings.model_dump_json()) if plugin.settings else {}
    return {
        "name": plugin.name,
        "enabled": True,
        "from": entry,
        "hooks": found.hooks_of(plugin),
        "settings": settings,
    }
