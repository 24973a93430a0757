"""What differs between the loaded modules and what is on disk."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.files import Digest, DigestCache, digest_of
from openagentmesh.runtime.loading.imports import Imports
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.modules import ManagedModule, ModuleRoot, imported_by, importers
from openagentmesh.runtime.loading.origins import (
    Origin,
    agent_places,
    find_origins,
    find_origins_leniently,
    missing_places,
    place_path,
)

_EMPTY: Final = digest_of(b"")
Files = dict[Path, Digest]
Causes = dict[Path, "Cause"]


@dataclass(slots=True)
class Cause:
    """What one changed file affects: modules that read it, and origins whose file it is."""

    names: set[str] = field(default_factory=set)
    origins: set[Origin] = field(default_factory=set)


@dataclass(slots=True, frozen=True)
class FailedAttempt:
    """A load of modules that failed; it is repeated when a file changes, or a missing module appears.

    Attributes:
        causes: the changed files that it was for.
        files: all files that it depended on.
        missing: modules that it imported and that did not exist, with where they would be.
    """

    causes: Files
    files: Files
    missing: tuple[tuple[ModuleRoot, str], ...]
    names: frozenset[str]

    def is_unchanged(self, digests: DigestCache) -> bool:
        """Whether another attempt would have the same result."""
        has_changed = any(digests.digest(path) != digest for path, digest in self.files.items())
        return not has_changed and not any(root.has(name) for root, name in self.missing)


@dataclass(slots=True, frozen=True)
class Plan:
    """One reload: the settings to apply, all origins afterwards, and why.

    Attributes:
        causes: the changed files.
        names: the modules to replace.
        load: the origins to load.
    """

    config: Config
    origins: list[Origin]
    causes: Files
    names: set[str]
    load: list[Origin]

    @property
    def has_unstable_files(self) -> bool:
        """Whether a file is missing or empty, as editors leave it for a moment."""
        return any(digest in {None, _EMPTY} for digest in self.causes.values())


@dataclass(frozen=True)
class WatchedPaths:
    """What is watched: `roots` with everything below them, `files` one by one."""

    roots: frozenset[Path]
    files: frozenset[str]

    @cached_property
    def other_files(self) -> frozenset[str]:
        """The files that are not found by scanning the roots for Python files."""
        return frozenset(
            name for name in self.files if not (name.endswith(".py") and self._is_below_root(name))
        )

    @cached_property
    def folders(self) -> frozenset[Path]:
        """The folders of the files that are below none of the roots."""
        return frozenset(Path(name).parent for name in self.other_files if not self._is_below_root(name))

    def _is_below_root(self, name: str) -> bool:
        return name.startswith(self._prefixes)

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{root}{os.sep}" for root in self.roots)


class Changes:
    """Finds what a reload has to do; `config_file` is mesh.toml, which `read_config` reads."""

    def __init__(self, imports: Imports, config_file: Path | None, read_config: Callable[[], Config]) -> None:
        self.digests = DigestCache()
        self.config_file = config_file
        self.failed_attempts: list[FailedAttempt] = []
        self._imports = imports
        self._read_config = read_config
        self._applied = self.config_cause()

    def find(self, modules: list[Module], config: Config) -> Plan | None:
        """What to do now; None when nothing has changed.

        Raises:
            ConfigError: mesh.toml has changed and is invalid, or names something that does not exist.
        """
        known = self._known_failures()
        current = self.config_cause()
        is_new = current != self._applied and not current.items() <= known
        after = self._read_config() if is_new else config
        origins = find_origins(after)
        causes = self._causes(modules, origins, config, after)
        files = self._files_of(causes, known) | (current if is_new else {})
        return self._plan(modules, after, origins, causes, files)

    def find_with_invalid_config(self, modules: list[Module], config: Config) -> Plan | None:
        """As `find`, but the settings stay, and missing folders affect nothing."""
        known = self._known_failures()
        origins = find_origins_leniently(config, [module.origin for module in modules])
        missing = missing_places(config)
        found = self._causes(modules, origins, config, config)
        causes = {path: found[path] for path in found if not any(map(path.is_relative_to, missing))}
        return self._plan(modules, config, origins, causes, self._files_of(causes, known))

    def find_named(self, modules: list[Module], config: Config, name: str) -> Plan | None:
        """As `find`, for the modules of this name, changed or not, and their changed imports."""
        origins = find_origins_leniently(config, [module.origin for module in modules])
        named = [module for module in modules if name in names_of(module)]
        imported = imported_by(self._imports.modules, [module.name for module in named])
        found = self._causes(modules, origins, config, config)
        causes = {path: cause for path, cause in found.items() if cause.names & imported}
        causes |= {self._file_of(m.origin): Cause({m.name}, {m.origin}) for m in named}
        return self._plan(modules, config, origins, causes, self._files_of(causes, set()))

    def _known_failures(self) -> set[tuple[Path, Digest]]:
        """Changed files whose load has failed and would fail again."""
        self.failed_attempts = [each for each in self.failed_attempts if each.is_unchanged(self.digests)]
        return {pair for attempt in self.failed_attempts for pair in attempt.causes.items()}

    def _files_of(self, causes: Causes, known: set[tuple[Path, Digest]]) -> Files:
        files = {path: self.digests.digest(path) for path in causes}
        return {path: digest for path, digest in files.items() if (path, digest) not in known}

    def _plan(
        self, modules: list[Module], config: Config, origins: list[Origin], causes: Causes, files: Files
    ) -> Plan | None:
        if not files:
            return None
        affected = [causes[path] for path in files if path in causes]
        names = importers(self._imports.modules, set[str]().union(*[cause.names for cause in affected]))
        load = set[Origin]().union(*[cause.origins for cause in affected])
        load |= {module.origin for module in modules if module.name in names}
        return Plan(config, origins, files, names, [origin for origin in origins if origin in load])

    def _causes(self, modules: list[Module], origins: list[Origin], before: Config, after: Config) -> Causes:
        causes = self._changed_files()
        loaded = {module.origin: module for module in modules if module.state != "failed"}
        wanted = set(origins)
        for origin in wanted - loaded.keys():
            causes[self._file_of(origin)].origins.add(origin)
        for origin, module in loaded.items():
            if origin not in wanted:
                causes[self._file_of(origin)].names.add(module.name)
            elif before.settings.get(origin.key) != after.settings.get(origin.key) and self.config_file:
                causes[self.config_file].names.add(module.name)
        return causes

    def _changed_files(self) -> defaultdict[Path, Cause]:
        causes = defaultdict[Path, Cause](Cause)
        listings = {root.path: _module_names(root.path) for root in self._imports.roots if root.is_folder}
        # Copies: this may run in a thread, while a request imports something.
        for module in list(self._imports.modules.values()):
            for path, digest in _files(module):
                if self.digests.digest(path) != digest:
                    causes[path].names.add(module.name)
            for name in module.missing & listings.get(module.root.path, set()):
                if module.root.has(name):
                    causes[_entry_file(module.root.path / name)].names.add(module.name)
        return causes

    def changed_modules(self) -> set[str]:
        """The modules that differ from what is on disk, or import such modules."""
        causes = self._changed_files().values()
        return importers(self._imports.modules, set[str]().union(*[cause.names for cause in causes]))

    def add_failure(
        self,
        causes: Files,
        executed: Iterable[ManagedModule],
        files: Iterable[Path] = (),
        names: Iterable[str] = (),
    ) -> None:
        """Remember a failed load, which also depended on these files; `names` are the modules concerned."""
        executed = list(executed)
        candidates = [path for cause in causes if not cause.is_absolute() for path in _candidates(cause.name)]
        read = dict(pair for module in executed for pair in _files(module))
        more = {path: self.digests.digest(path) for path in (*files, *candidates)}
        missing = tuple((module.root, name) for module in executed for name in module.missing)
        everything = causes | read | self.config_cause() | more
        attempt = FailedAttempt(causes, everything, missing, frozenset(names))
        if attempt not in self.failed_attempts:
            self.failed_attempts.append(attempt)

    def add_failed_origin(
        self, origin: Origin, executed: Iterable[ManagedModule], files: Iterable[Path] = ()
    ) -> None:
        """Remember an origin that failed at the start."""
        file = self._file_of(origin)
        self.add_failure({file: self.digests.digest(file)}, executed, files)

    def complete(self, plan: Plan) -> None:
        """Remember that a plan was carried out."""
        if self.config_file in plan.causes:
            self._applied = {self.config_file: plan.causes[self.config_file]}

    def watched_paths(self, config: Config) -> WatchedPaths:
        """Where all loaded modules came from, and where others may come from."""
        places = {place_path(place, config.folder) for place in agent_places(config)}
        single = {place for place in places if place.suffix == ".py"}
        # Copies: something may be loaded in a thread meanwhile.
        packages = {root.path for root in list(self._imports.roots) if root.is_package}
        read = {path for module in list(self._imports.modules.values()) for path, _ in _files(module)}
        files = single.union(read, self.config_cause(), *[attempt.files for attempt in self.failed_attempts])
        return WatchedPaths(frozenset(places - single | packages), frozenset(map(str, files)))

    def config_cause(self) -> Files:
        """mesh.toml as the only changed file."""
        return {self.config_file: self.digests.digest(self.config_file)} if self.config_file else {}

    def _file_of(self, origin: Origin) -> Path:
        """The file whose existence decides about an origin."""
        if origin.path is not None:
            return _entry_file(origin.path)
        managed = self._imports.modules.get(origin.module)
        return managed.path if managed else Path(origin.module)  # not found yet, so its name stands for it


def names_of(module: Module) -> set[str]:
    """The names by which a command may refer to a module."""
    origin = module.origin
    return {origin.display_name, origin.key, module.name, origin.path.name if origin.path else origin.module}


def _candidates(module: str) -> Iterator[Path]:
    """The files that would be a missing module."""
    top = module.partition(".")[0]
    for place in filter(None, sys.path):
        yield from (Path(place, f"{top}.py"), Path(place, top, "__init__.py"))


def _files(module: ManagedModule) -> Iterator[tuple[Path, Digest]]:
    yield module.path, module.digest
    yield from list(module.data.items())


def _entry_file(path: Path) -> Path:
    """The file of a module, or of a package's folder."""
    if path.suffix == ".py":
        return path
    package = path / "__init__.py"
    return package if package.exists() or path.is_dir() else path.with_suffix(".py")


def _module_names(path: Path) -> set[str]:
    """The names of the modules that a folder may contain."""
    try:
        return {name.removesuffix(".py") for name in os.listdir(path)}  # noqa: PTH208 - only names are needed
    except OSError:
        return set()
