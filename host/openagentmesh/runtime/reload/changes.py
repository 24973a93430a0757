"""What differs between the modules that are loaded and what is on disk."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.files import Digest, Disk, digest_of
from openagentmesh.runtime.loading.imports import Imports
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.modules import Folder, Source, importers, reached
from openagentmesh.runtime.loading.origins import (
    Origin,
    agent_places,
    find_origins,
    missing_places,
    origins_left,
    place_of,
)

_EMPTY: Final = digest_of(b"")
Files = dict[Path, Digest]


@dataclass(slots=True)
class _Cause:
    """What one changed file concerns: modules that read it, and origins that it is the entry of."""

    names: set[str] = field(default_factory=set)
    origins: set[Origin] = field(default_factory=set)


@dataclass(slots=True, frozen=True)
class Attempt:
    """A load that failed: no use to try again before one of these files changes, or one of these appears."""

    causes: Files
    files: Files
    sought: tuple[tuple[Folder, str], ...]
    names: frozenset[str]

    @classmethod
    def of(cls, causes: Files, executed: Iterable[Source], more: Files, names: Iterable[str]) -> "Attempt":
        """What was tried because of `causes` for modules, and executed then, with `more` that counts."""
        executed = list(executed)
        files = dict(pair for source in executed for pair in _files(source))
        sought = tuple((source.folder, name) for source in executed for name in source.sought)
        return cls(causes, causes | files | more, sought, frozenset(names))

    def is_hopeless(self, disk: Disk) -> bool:
        """Whether trying again would give the same."""
        return all(disk.digest(path) == digest for path, digest in self.files.items()) and not any(
            folder.has(name) for folder, name in self.sought
        )


@dataclass(slots=True, frozen=True)
class Plan:
    """One reload: what differs, what has to be executed anew for it, and what is gone."""

    config: Config
    origins: list[Origin]
    causes: Files
    names: set[str]
    load: list[Origin]

    @property
    def is_doubtful(self) -> bool:
        """Whether a file is gone or empty, as editors leave it for a moment."""
        return any(digest in {None, _EMPTY} for digest in self.causes.values())


@dataclass(frozen=True)
class Places:
    """Where to look: `roots` with all below them, `files` each for itself."""

    roots: frozenset[Path]
    files: frozenset[Path]

    @cached_property
    def elsewhere(self) -> frozenset[str]:
        """The files that a look at all Python files below the roots does not find."""
        roots = tuple(f"{root}{os.sep}" for root in self.roots)
        names = {str(file) for file in self.files}
        return frozenset(name for name in names if not (name.endswith(".py") and name.startswith(roots)))

    @cached_property
    def folders(self) -> frozenset[Path]:
        """The folders of the single files that are below none of the roots."""
        roots = tuple(f"{root}{os.sep}" for root in self.roots)
        return frozenset(Path(name).parent for name in self.elsewhere if not name.startswith(roots))


class Changes:
    """Finds out what a reload has to do.

    Args:
        imports: what is loaded.
        config_file: mesh.toml, which may come and go.
        read_config: reads it, and adds what the command line says.

    """

    def __init__(self, imports: Imports, config_file: Path | None, read_config: Callable[[], Config]) -> None:
        self.disk = Disk()
        self.config_file = config_file
        self.attempts: list[Attempt] = []
        self._imports = imports
        self._read_config = read_config
        self._config_digest = self._digest_of_config()

    def tried(
        self, causes: Files, executed: Iterable[Source], files: Iterable[Path] = (), names: Iterable[str] = ()
    ) -> None:
        """Remember a load that failed, of these other files too; `names` are the modules concerned."""
        wanted = [place for path in causes if not path.is_absolute() for place in _places_of(path.name)]
        more = self.config_cause() | {path: self.disk.digest(path) for path in (*files, *wanted)}
        attempt = Attempt.of(causes, executed, more, names)
        if attempt not in self.attempts:
            self.attempts.append(attempt)

    def tried_first(self, origin: Origin, executed: Iterable[Source], files: Iterable[Path] = ()) -> None:
        """Remember an origin that failed when the host started."""
        entry = self._entry_of(origin)
        self.tried({entry: self.disk.digest(entry)}, executed, files)

    def differing(self) -> set[str]:
        """The modules that are not what is on disk, or import what is not."""
        found: dict[Path, _Cause] = defaultdict(_Cause)
        self._files_that_differ(found)
        return importers(self._imports.sources, {name for cause in found.values() for name in cause.names})

    def done(self, plan: Plan) -> None:
        """Remember that a plan was carried out."""
        if self.config_file in plan.causes:
            self._config_digest = plan.causes[self.config_file]

    def places(self, config: Config) -> Places:
        """Where all is that the loaded modules came from, or that others may come from."""
        wanted = [place_of(place, config.folder) for place in agent_places(config)]
        roots = {place for place in wanted if place.suffix != ".py"}
        roots |= {folder.path for folder in list(self._imports.folders) if folder.is_package}
        # Copies: somebody may load something in a thread meanwhile.
        files = {path for source in list(self._imports.sources.values()) for path, _ in _files(source)}
        files |= {path for attempt in self.attempts for path in attempt.files}
        files |= {place for place in wanted if place.suffix == ".py"}
        return Places(
            frozenset(roots), frozenset(files | ({self.config_file} if self.config_file else set()))
        )

    def config_cause(self) -> Files:
        """mesh.toml as the one cause."""
        return {self.config_file: self._digest_of_config()} if self.config_file else {}

    def find(
        self, modules: list[Module], config: Config, only: str = "", *, lenient: bool = False
    ) -> Plan | None:
        """What to do now; None when there is nothing. `only` this module, whether it differs or not.

        With `only`, and when `lenient`, mesh.toml stays as it was read last; then places that it
        names and that are not there matter to nobody else.

        Raises:
            ConfigError: mesh.toml has changed and cannot be used, or names what is not there.

        """
        self.attempts = [attempt for attempt in self.attempts if attempt.is_hopeless(self.disk)]
        hopeless = {pair for attempt in self.attempts for pair in attempt.causes.items()}
        config_now = self._digest_of_config()
        reread = not only and not lenient and config_now != self._config_digest
        reread = reread and (self.config_file, config_now) not in hopeless
        wanted = self._read_config() if reread else config
        origins = origins_left(wanted, [m.origin for m in modules]) if lenient else find_origins(wanted)
        found = self._causes(modules, origins, config, wanted)
        if lenient:
            gone = missing_places(wanted)
            found = {path: c for path, c in found.items() if not any(path.is_relative_to(g) for g in gone)}
        if only:
            found, hopeless = self._named(modules, only, found), set()
        causes = {path: self.disk.digest(path) for path in found}
        causes = {path: digest for path, digest in causes.items() if (path, digest) not in hopeless}
        if reread and self.config_file is not None:
            causes[self.config_file] = config_now
        if not causes:
            return None
        names = importers(
            self._imports.sources, {n for path in causes if path in found for n in found[path].names}
        )
        entries = {origin for path in causes if path in found for origin in found[path].origins}
        entries |= {module.origin for module in modules if module.name in names}
        return Plan(wanted, origins, causes, names, [origin for origin in origins if origin in entries])

    def _causes(
        self, modules: list[Module], origins: list[Origin], before: Config, now: Config
    ) -> dict[Path, _Cause]:
        found: dict[Path, _Cause] = defaultdict(_Cause)
        self._files_that_differ(found)
        loaded = {module.origin: module for module in modules if module.state != "failed"}
        here = set(origins)
        for origin in origins:
            if origin not in loaded:
                found[self._entry_of(origin)].origins.add(origin)
        for origin, module in loaded.items():
            if origin not in here:
                found[self._entry_of(origin)].names.add(module.name)
            elif before.settings.get(origin.key) != now.settings.get(origin.key) and self.config_file:
                found[self.config_file].names.add(module.name)
        return found

    def _files_that_differ(self, found: dict[Path, _Cause]) -> None:
        present = {folder.path: _names_in(folder.path) for folder in self._imports.folders if folder.bare}
        # Copies: in a thread of our own, while a request may import something.
        for source in list(self._imports.sources.values()):
            for path, digest in _files(source):
                if self.disk.digest(path) != digest:
                    found[path].names.add(source.name)
            for name in source.sought & present.get(source.folder.path, set()):
                if source.folder.has(name):
                    found[_entry(source.folder.path / name)].names.add(source.name)

    def _named(self, modules: list[Module], only: str, differing: dict[Path, _Cause]) -> dict[Path, _Cause]:
        """The modules of this name, as if all of them differed, and what differs of what they import."""
        named = [module for module in modules if only in names_of(module)]
        theirs = reached(self._imports.sources, [module.name for module in named])
        found = {path: cause for path, cause in differing.items() if cause.names & theirs}
        return found | {self._entry_of(m.origin): _Cause({m.name}, {m.origin}) for m in named}

    def _entry_of(self, origin: Origin) -> Path:
        """The file by which an origin is there, or not."""
        if origin.path is not None:
            return _entry(origin.path)
        source = self._imports.sources.get(origin.module)
        return source.path if source else Path(origin.module)  # it is nowhere yet, and called by its name

    def _digest_of_config(self) -> Digest:
        return self.disk.digest(self.config_file) if self.config_file else None


def names_of(module: Module) -> set[str]:
    """How people may call a module."""
    origin = module.origin
    return {origin.shown, origin.key, module.name, origin.path.name if origin.path else origin.module}


def _places_of(module: str) -> Iterator[Path]:
    """Where a module would be that is not there."""
    top = module.partition(".")[0]
    for place in filter(None, sys.path):
        yield from (Path(place, f"{top}.py"), Path(place, top, "__init__.py"))


def _files(source: Source) -> Iterator[tuple[Path, Digest]]:
    yield source.path, source.digest
    yield from list(source.data.items())


def _entry(path: Path) -> Path:
    """The file of a module, or of a package's folder."""
    if path.suffix == ".py":
        return path
    package = path / "__init__.py"
    return package if package.exists() or path.is_dir() else path.with_suffix(".py")


def _names_in(path: Path) -> set[str]:
    """The names of the modules that a folder may have."""
    try:
        return {name.removesuffix(".py") for name in os.listdir(path)}  # noqa: PTH208 - names are all we want
    except OSError:
        return set()
