"""Plugins by their names in mesh.toml: installed ones, and a team's own files."""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from openagentmesh.hooks.manager import Plugins
from openagentmesh.protocol.errors import PluginFailed, error_text
from openagentmesh.runtime.config import Config, ConfigError, config_problems, is_file, near, plugin_name
from openagentmesh.runtime.loading.files import Stamp, stamp

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
    names = [plugin_name(entry) for entry in config.host.plugins]
    others = Plugins.named(given)
    if twice := next((name for name in names if names.count(name) > 1 or name in others), ""):
        raise PluginFailed(f"[host] plugins: two plugins are called '{twice}'; rename a file.")
    found = dict(zip(names, [_load(entry, config) for entry in config.host.plugins], strict=True))
    plugins = Plugins(found | others)
    configure(plugins, config)
    return plugins


def configure(plugins: Plugins, config: Config) -> None:
    """Give plugins the settings that mesh.toml has for them; all of them, or none.

    Raises:
        PluginFailed: a plugin refuses its settings.
        ConfigError: they do not fit its model.

    """
    for plugin in plugins.all:
        try:
            plugins.validated(plugin, config.plugins.get(plugin.name, {}))
        except ValidationError as exc:
            known = getattr(plugins.settings_model(plugin), "model_fields", {})
            problems = config_problems(exc, ("plugins", plugin.name), known)
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(f"mesh.toml cannot be used:\n{listed}") from exc
    plugins.configure(config.plugins, config.folder)


def _load(entry: str, config: Config) -> object:
    known: Mapping[str, EntryPoint] = installed()
    if not is_file(entry) and entry not in known:
        raise PluginFailed(
            f"[host] plugins: no plugin '{entry}' is installed; {near(entry, known, 'installed')}"
        )
    try:
        return _from_file(config.folder / Path(entry).expanduser()) if is_file(entry) else known[entry].load()
    # Code of others may raise anything while it is imported, and exit.
    except (Exception, SystemExit) as exc:
        missing = isinstance(exc, ModuleNotFoundError) and not is_file(entry)
        hint = f". Install what it needs: pip install 'openagentmesh[{entry}]'" if missing else ""
        raise PluginFailed(
            f"[host] plugins: '{entry}' cannot be loaded: {type(exc).__name__}: {error_text(exc)}{hint}",
            details={"plugin": entry},
        ) from exc


def _from_file(path: Path) -> object:
    """What a file has as `plugin`, else the module itself; the same one until it is saved again."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _executed(path.resolve(), stamp(path))


@lru_cache(maxsize=100)
def _executed(path: Path, _stamp: Stamp | None) -> object:
    name = f"oam_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "plugin", module)
