"""Plugins by their names in mesh.toml: installed ones, and a team's own files."""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from openagentmesh.mesh.plugins import Plugin, Plugins
from openagentmesh.protocol.errors import PluginFailed, text_of
from openagentmesh.runtime.config import Config, ConfigError, near, problems_of

GROUP: Final = "openagentmesh.plugins"


def installed() -> dict[str, EntryPoint]:
    """The plugins that installed packages bring, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_plugins(config: Config, given: Iterable[object] = ()) -> Plugins:
    """The plugins that mesh.toml enables, in its order, and then those `given`; all have their settings.

    Raises:
        PluginFailed: one is not there, cannot be imported or used.
        ConfigError: its settings do not fit.

    """
    found = {name_of(entry): _load(entry, config) for entry in config.host.plugins}
    plugins = Plugins(found | Plugins.named(given))
    configure(plugins, config)
    return plugins


def configure(plugins: Plugins, config: Config) -> None:
    """Give plugins the settings that mesh.toml has for them; all of them, or none.

    Raises:
        PluginFailed: a plugin refuses its settings.
        ConfigError: they do not fit its model.

    """
    try:
        plugins.configure(config.plugins)
    except ValidationError as exc:
        failed = next(plugin for plugin in plugins.all if _fails(plugins, plugin, config))
        model = plugins.model(failed)
        problems = problems_of(exc, ("plugins", failed.name), model.model_fields if model else [])
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"mesh.toml cannot be used:\n{listed}") from exc


def name_of(entry: str) -> str:
    """The name of a plugin: of a file it is that without its ending."""
    return Path(entry).stem if _is_file(entry) else entry


def _fails(plugins: Plugins, plugin: Plugin, config: Config) -> bool:
    try:
        plugins.validated(plugin, config.plugins.get(plugin.name, {}))
    except ValidationError:
        return True
    return False


def _is_file(entry: str) -> bool:
    return entry.endswith(".py") or "/" in entry


def _load(entry: str, config: Config) -> object:
    known: Mapping[str, EntryPoint] = installed()
    if not _is_file(entry) and entry not in known:
        raise PluginFailed(
            f"[host] plugins: no plugin '{entry}' is installed; {near(entry, known, 'installed')}"
        )
    try:
        return (
            _from_file(config.folder / Path(entry).expanduser()) if _is_file(entry) else known[entry].load()
        )
    # Code of others may raise anything while it is imported.
    except Exception as exc:
        missing = isinstance(exc, ModuleNotFoundError) and not _is_file(entry)
        hint = f". Install what it needs: pip install 'openagentmesh[{entry}]'" if missing else ""
        raise PluginFailed(
            f"[host] plugins: '{entry}' cannot be loaded: {type(exc).__name__}: {text_of(exc)}{hint}",
            details={"plugin": entry},
        ) from exc


def _from_file(path: Path) -> object:
    """What a file has as `plugin`, else the module itself."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"oam_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "plugin", module)
