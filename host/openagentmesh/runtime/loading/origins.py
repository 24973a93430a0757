"""Where agent modules come from: folders, files, dotted names and entry points."""

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
from openagentmesh.runtime.loading.files import Stamp, leads_back, stamp

ENTRY_POINT_GROUP: Final = "openagentmesh.agents"
DEFAULT_FOLDER: Final = "agents"
_DOTTED_RE: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(slots=True, frozen=True)
class Origin:
    """Where one module comes from: a `path` (a file, or a package's folder) or a dotted `module`.

    `shown` is how messages call it, `key` is its name in `[settings.<key>]`.
    """

    shown: str
    key: str
    path: Path | None = None
    module: str = ""
    attribute: str = ""


def find_origins(config: Config) -> list[Origin]:
    """All modules that mesh.toml asks for, in the order they are loaded.

    Raises:
        ConfigError: a place or an entry point does not exist.

    """
    places = agent_places(config)
    if config.host.agents is None and not (config.folder / DEFAULT_FOLDER).is_dir():
        places = []
    found = [origin for place in places for origin in _at(place, config.folder)]
    return _once(found + list(_entry_points(config.host.entry_points)))


def origins_left(config: Config, known: Iterable[Origin]) -> list[Origin]:
    """As `find_origins`, but what is known of places that are not there stays as it is."""
    found: list[Origin] = []
    for place in agent_places(config):
        with suppress(ConfigError):
            found += _at(place, config.folder)
            continue
        path = place_of(place, config.folder)
        found += [origin for origin in known if origin.path is not None and origin.path.is_relative_to(path)]
    with suppress(ConfigError):
        return _once(found + list(_entry_points(config.host.entry_points)))
    return _once(found + [origin for origin in known if origin.path is None])


def missing_places(config: Config) -> list[Path]:
    """The folders and files that mesh.toml asks for and that are not there."""
    places = [place_of(place, config.folder) for place in agent_places(config)]
    return [place for place in places if not place.exists()]


def _once(origins: Iterable[Origin]) -> list[Origin]:
    """Each file and each module once, however often it is named."""
    return list({origin.path or origin.module: origin for origin in reversed(list(origins))}.values())[::-1]


def agent_places(config: Config) -> list[str]:
    """Where mesh.toml says that agents are; `agents/` when it does not."""
    return [DEFAULT_FOLDER] if config.host.agents is None else config.host.agents


def place_of(place: str, folder: Path) -> Path:
    """Where a place of mesh.toml is, which lies in `folder`; as it stands where nobody has that home."""
    with suppress(RuntimeError):
        return folder / Path(place).expanduser()
    return folder / place


def _at(place: str, folder: Path) -> Iterator[Origin]:
    try:
        path = place_of(place, folder)
        found = list(_in_folder(path.resolve(), folder, ())) if path.is_dir() else []
    except (OSError, RuntimeError) as exc:  # no such user, no such right
        raise ConfigError(f"host.agents: '{place}' cannot be looked at: {error_text(exc)}.") from exc
    if path.is_dir():
        yield from found
    elif path.is_file() and path.suffix == ".py":
        yield _from_path(path.resolve(), folder)
    elif "/" in place or place.endswith(".py") or not _DOTTED_RE.fullmatch(place) or place == DEFAULT_FOLDER:
        raise ConfigError(
            f"host.agents: '{place}' is no folder and no Python file (looked for {path}). "
            "Give a folder, a file, or a dotted module name."
        )
    else:
        yield Origin(place, place.rpartition(".")[2], module=place)


def _in_folder(path: Path, shown_from: Path, above: tuple[str, ...]) -> Iterator[Origin]:
    with os.scandir(path) as entries:
        items = sorted((entry for entry in entries if entry.name[0] not in "_."), key=lambda e: e.name)
    if (path / "__init__.py").is_file():
        yield _from_path(path, shown_from)
        return
    for item in items:
        if item.name.endswith(".py") and item.is_file():
            yield _from_path(path / item.name, shown_from)
        elif item.is_dir() and not leads_back(item.path, above):
            yield from _in_folder(path / item.name, shown_from, (*above, os.path.realpath(item.path)))


def _from_path(path: Path, shown_from: Path) -> Origin:
    shown = path.relative_to(shown_from) if path.is_relative_to(shown_from) else path
    return Origin(str(shown), path.stem, path=path)


def _installed() -> dict[str, EntryPoint]:
    """What installed packages bring; looked up when something was installed, for it takes long."""
    return _installed_in(tuple((path, stamp(path)) for path in sys.path))


@lru_cache(maxsize=1)
def _installed_in(_paths: tuple[tuple[str, Stamp | None], ...]) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _entry_points(wanted: bool | list[str]) -> Iterator[Origin]:  # noqa: FBT001 - mesh.toml's own value
    if wanted is False:
        return
    installed = _installed()
    names = sorted(installed) if wanted is True else wanted
    for name in names:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise ConfigError(
                f"host.entry_points: no installed package has an agent entry point '{name}' "
                f"(group '{ENTRY_POINT_GROUP}'; installed: {known})."
            )
        point = installed[name]
        package = point.dist.name if point.dist else point.module
        yield Origin(f"{package} (entry point {name})", name, module=point.module, attribute=point.attr or "")
