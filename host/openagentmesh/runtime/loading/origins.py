"""Where modules come from: folders, files, dotted names and entry points."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from openagentmesh.protocol.errors import error_text
from openagentmesh.runtime.config import Config, ConfigError
from openagentmesh.runtime.loading.files import Stamp, is_cyclic_link, stamp

ENTRY_POINT_GROUP: Final = "openagentmesh.agents"
DEFAULT_FOLDER: Final = "agents"
_DOTTED_RE: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(slots=True, frozen=True)
class Origin:
    """Where one module comes from.

    Attributes:
        key: its name in `[settings.<key>]`.
        path: a file, or a package's folder.
        module: a dotted name, when there is no path.
        attribute: of an entry point.
    """

    display_name: str
    key: str
    path: Path | None = None
    module: str = ""
    attribute: str = ""


def find_origins(config: Config) -> list[Origin]:
    """All modules in mesh.toml, in the order they are loaded; a missing one raises ConfigError."""
    has_places = config.host.agents is not None or (config.folder / DEFAULT_FOLDER).is_dir()
    places = agent_places(config) if has_places else []
    found = [origin for place in places for origin in _at(place, config.folder)]
    return _unique([*found, *_entry_points(config.host.entry_points)])


def find_origins_leniently(config: Config, known: Iterable[Origin]) -> list[Origin]:
    """As `find_origins`, but known origins in missing folders and entry points are kept."""
    known, found = list(known), list[Origin]()
    for place in agent_places(config):
        try:
            found += _at(place, config.folder)
        except ConfigError:
            path = place_path(place, config.folder)
            found += [origin for origin in known if origin.path and origin.path.is_relative_to(path)]
    try:
        found += _entry_points(config.host.entry_points)
    except ConfigError:
        found += [origin for origin in known if origin.path is None]
    return _unique(found)


def missing_places(config: Config) -> list[Path]:
    """The folders and files in mesh.toml that do not exist."""
    paths = [place_path(place, config.folder) for place in agent_places(config)]
    return [path for path in paths if not path.exists()]


def _unique(origins: list[Origin]) -> list[Origin]:
    """Each file and each module once, the first of several."""
    return list({origin.path or origin.module: origin for origin in origins[::-1]}.values())[::-1]


def agent_places(config: Config) -> list[str]:
    """The folders, files and modules of `[host] agents`; `agents/` without it."""
    return [DEFAULT_FOLDER] if config.host.agents is None else config.host.agents


def place_path(place: str, folder: Path) -> Path:
    """The path of a place in mesh.toml; a `~` of an unknown user is kept."""
    with suppress(RuntimeError):
        return folder / Path(place).expanduser()
    return folder / place


def _at(place: str, folder: Path) -> list[Origin]:
    path = place_path(place, folder)
    try:
        if path.is_dir():
            return list(_in_folder(path.resolve(), folder, ()))
    except (OSError, RuntimeError) as exc:
        raise ConfigError(f"host.agents: '{place}' cannot be read: {error_text(exc)}.") from exc
    if path.is_file() and path.suffix == ".py":
        return [_from_path(path.resolve(), folder)]
    if "/" in place or place.endswith(".py") or not _DOTTED_RE.fullmatch(place) or place == DEFAULT_FOLDER:
        raise ConfigError(
            f"host.agents: '{place}' is neither a folder nor a Python file (looked for {path}). "
            "Give a folder, a file, or a dotted module name."
        )
    return [Origin(place, place.rpartition(".")[2], module=place)]


def _in_folder(path: Path, root: Path, parents: tuple[str, ...]) -> Iterator[Origin]:
    with os.scandir(path) as entries:
        items = sorted((entry for entry in entries if entry.name[0] not in "_."), key=lambda e: e.name)
    if (path / "__init__.py").is_file():
        yield _from_path(path, root)
        return
    for item in items:
        if item.name.endswith(".py") and item.is_file():
            yield _from_path(path / item.name, root)
        elif item.is_dir() and not is_cyclic_link(item.path, parents):
            yield from _in_folder(path / item.name, root, (*parents, os.path.realpath(item.path)))


def _from_path(path: Path, root: Path) -> Origin:
    display = path.relative_to(root) if path.is_relative_to(root) else path
    return Origin(str(display), path.stem, path=path)


@lru_cache(maxsize=1)
def _installed(_stamps: tuple[tuple[str, Stamp | None], ...]) -> dict[str, EntryPoint]:
    """The entry points of installed packages; cached while the folders of `sys.path` do not change."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _entry_points(wanted: bool | list[str]) -> Iterator[Origin]:  # noqa: FBT001 - mesh.toml's own value
    if wanted is False:
        return
    installed = _installed(tuple((path, stamp(path)) for path in sys.path))
    for name in sorted(installed) if wanted is True else wanted:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise ConfigError(
                f"host.entry_points: no installed package has the agent entry point '{name}' "
                f"(group '{ENTRY_POINT_GROUP}'; installed: {known})."
            )
        point = installed[name]
        package = point.dist.name if point.dist else point.module
        yield Origin(f"{package} (entry point {name})", name, module=point.module, attribute=point.attr or "")
