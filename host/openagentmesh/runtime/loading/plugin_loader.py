"""Plugins by their names in mesh.toml: installed ones, and files."""

import importlib.util
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from openagentmesh.hooks.manager import Plugins
from openagentmesh.protocol.errors import PluginFailed, error_text
from openagentmesh.runtime.config import Config, ConfigError, config_problems, is_file, nearest, plugin_name
from openagentmesh.runtime.loading.files import Stamp, stamp

GROUP: Final = "openagentmesh.plugins"


def installed_plugins() -> dict[str, EntryPoint]:
    """The plugins of installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_plugins(config: Config, given: Iterable[object] = ()) -> Plugins:
    """The plugins that mesh.toml enables, in its order, then those `given`; configured.

    Raises PluginFailed if one cannot be imported or used, ConfigError if its settings are invalid.
    """
    names = [plugin_name(entry) for entry in config.host.plugins]
    others = Plugins.named(given)
    if twice := next((name for name in names if names.count(name) > 1 or name in others), ""):
        raise PluginFailed(f"[host] plugins: two plugins are named '{twice}'; rename a file.")
    plugins = Plugins({plugin_name(entry): _load(entry, config) for entry in config.host.plugins} | others)
    configure(plugins, config)
    return plugins


def configure(plugins: Plugins, config: Config) -> None:
    """Apply the settings of mesh.toml to all plugins, or to none.

    Raises PluginFailed if a plugin refuses its settings, ConfigError if they do not match its model.
    """
    for plugin in plugins.all:
        try:
            plugins.validated(plugin, config.plugins.get(plugin.name, {}))
        except ValidationError as exc:
            known = getattr(plugins.settings_model(plugin), "model_fields", {})
            problems = config_problems(exc, ("plugins", plugin.name), known)
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(f"The settings of the plugin '{plugin.name}' are invalid:\n{listed}") from exc
    plugins.configure(config.plugins, config.folder)


def _load(entry: str, config: Config) -> object:
    installed = installed_plugins()
    if not is_file(entry) and entry not in installed:
        hint = nearest(entry, installed, "installed")
        raise PluginFailed(f"[host] plugins: the plugin '{entry}' is not installed; {hint}")
    try:
        if is_file(entry):
            path = config.folder / Path(entry).expanduser()
            return _from_file(path.resolve(), stamp(path))
        return installed[entry].load()
    # Importing a plugin may raise anything, and exit.
    except (Exception, SystemExit) as exc:
        is_missing = isinstance(exc, ModuleNotFoundError) and not is_file(entry)
        hint = f". Install its dependencies: pip install 'openagentmesh[{entry}]'" if is_missing else ""
        raise PluginFailed(
            f"[host] plugins: '{entry}' cannot be loaded: {type(exc).__name__}: {error_text(exc)}{hint}",
            details={"plugin": entry},
        ) from exc


@lru_cache(maxsize=100)
def _from_file(path: Path, _stamp: Stamp | None) -> object:
    """A file's attribute `plugin`, else the module itself; the same object until the file changes."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"oam_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "plugin", module)
