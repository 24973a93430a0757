"""mesh.toml: read, expanded from the environment, validated, frozen."""

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from openagentmesh.agent.agent import DEFAULT_LIMITS, Limits
from openagentmesh.mesh.mesh import DRAIN_TIMEOUT_S
from openagentmesh.mesh.node import ContractPolicy
from openagentmesh.protocol.errors import MeshError

FILE_NAME: Final = "mesh.toml"
_BARE_KEY_RE: Final = re.compile(r"[A-Za-z0-9_-]+")
_VARIABLE_RE: Final = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^}]*))?\}")
# The path of a value in the file: the names of its tables, its own name, indexes of lists.
Loc = tuple[int | str, ...]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "input should be a valid integer")
    return value


def _names(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise PydanticCustomError("names", "input should be true, false or a list of names")


# A boolean is not a number; text may be one, because `${PORT}` is text.
Whole = Annotated[int, BeforeValidator(_no_bool)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ConfigError(MeshError):
    """mesh.toml is invalid; the message names file, key, what was expected and what to do."""

    code = "invalid_config"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeshSection(_Section):
    """`[mesh]`: where to connect. Without `url` an embedded server starts with the host."""

    url: str | None = None
    creds: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None


class ServerSection(_Section):
    """`[server]`: the embedded server. Port 0 is any free one, an empty store is temporary."""

    port: Annotated[Whole, Field(ge=0, le=65_535)] = 4222
    store: str = ".oam/nats"
    websocket: bool = False


class HostSection(_Section):
    """`[host]`: what is loaded, and how the host stops.

    Attributes:
        agents: folders, files and dotted modules; None for `agents/`.
        entry_points: whether installed agents are loaded, or the names of those that are.
        plugins: names or files, the outermost first.
        contract: what follows from a contract that is incompatible with that of another live instance, or
            with the version that it replaces.
        threads: the limit of blocking handlers that run at once; 0 for the number of processors plus 4, at
            most 32.
        load_timeout: seconds, of one reload.
        drain_timeout: seconds, for running requests at a stop.
    """

    name: str = ""
    agents: list[str] | None = None
    entry_points: Annotated[bool | list[str], BeforeValidator(_names)] = True
    plugins: list[str] = []
    strict: bool = False
    contract: ContractPolicy = "warn"
    reload: bool = True
    threads: Annotated[Whole, Field(ge=0, le=1000)] = 0
    load_timeout: Seconds = 10.0
    drain_timeout: Annotated[float, Field(ge=0, le=3600)] = DRAIN_TIMEOUT_S


class LimitsSection(_Section):
    """`[limits]`: the defaults of every agent; `timeout` and pauses in seconds."""

    concurrency: Annotated[Whole, Field(ge=1, le=100_000)] = DEFAULT_LIMITS.concurrency
    queue: Annotated[Whole, Field(ge=0, le=1_000_000)] = DEFAULT_LIMITS.queue
    timeout: Seconds = DEFAULT_LIMITS.timeout
    restart_pause: Seconds = DEFAULT_LIMITS.restart_pause
    restart_pause_max: Seconds = DEFAULT_LIMITS.restart_pause_max


class AgentSection(LimitsSection):
    """`[agents."name"]`: one agent; keys that are not set have the values of `[limits]`."""

    enabled: bool = True
    plugins: dict[str, dict[str, Any]] = {}


_DEFAULT_AGENT: Final = AgentSection()


class Config(_Section):
    """A whole mesh.toml. Relative paths in it start at `folder`, the file's folder."""

    folder: Annotated[Path, Field(exclude=True)] = Path()
    mesh: MeshSection = MeshSection()
    server: ServerSection = ServerSection()
    host: HostSection = HostSection()
    limits: LimitsSection = LimitsSection()
    agents: dict[str, AgentSection] = {}
    settings: dict[str, dict[str, Any]] = {}
    plugins: dict[str, dict[str, Any]] = {}

    def limits_of(self, name: str) -> Limits:
        """The limits of one agent."""
        section = self.agents.get(name, _DEFAULT_AGENT)
        own = section.model_dump(exclude={"enabled", "plugins"}, exclude_unset=True)
        return Limits(**(self.limits.model_dump() | own))

    def plugin_tables_of(self, name: str) -> dict[str, dict[str, Any]]:
        """The settings of one agent for plugins, by the plugins' names."""
        return self.agents.get(name, _DEFAULT_AGENT).plugins

    def is_enabled(self, name: str) -> bool:
        """Whether an agent is served."""
        return self.agents.get(name, _DEFAULT_AGENT).enabled

    def unused(self, modules: Collection[str], agents: Collection[str]) -> Iterator[str]:
        """Warnings about tables that match no agent, no enabled plugin, no key of a module."""
        for name in sorted(self.agents.keys() - set(agents)):
            yield f'mesh.toml has [agents."{name}"], but no loaded module declares that agent'
        enabled = {plugin_name(entry) for entry in self.host.plugins}
        tables: list[Loc] = [("plugins", name) for name in self.plugins]
        for agent, section in self.agents.items():
            tables += [("agents", agent, "plugins", name) for name in section.plugins]
        for table in tables:
            if table[-1] not in enabled:
                yield f"mesh.toml has [{_key(table)}], but [host] plugins does not enable it"
        for name in sorted(self.settings.keys() - set(modules)):
            hint = nearest(name, modules, "modules")
            yield f"mesh.toml has [{_key(('settings', name))}], but there is no module '{name}'; {hint}"

    def path(self, text: str | None) -> str | None:
        """A path of this file, made absolute."""
        return str(self.folder / Path(text).expanduser()) if text else None


def plugin_name(entry: str) -> str:
    """The name of an entry of `[host] plugins`; of a file its name without the suffix."""
    return Path(entry).stem if is_file(entry) else entry


def is_file(entry: str) -> bool:
    """Whether an entry of `[host] plugins` is a file, not the name of an installed plugin."""
    return entry.endswith(".py") or "/" in entry


def keys_that_need_restart(started: Config, now: Config) -> list[str]:
    """The changed keys that a running host does not apply."""
    fixed = {
        "mesh": MeshSection.model_fields,
        "server": ServerSection.model_fields,
        "host": ("name", "plugins", "reload", "threads"),
    }
    return [
        f"[{section}] {key}"
        for section, keys in fixed.items()
        for key in keys
        if getattr(getattr(started, section), key) != getattr(getattr(now, section), key)
    ]


def load_config(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read a mesh.toml; without a path, `mesh.toml` here, or the defaults when there is none.

    Raises:
        ConfigError: the file is missing, is not TOML, or is invalid.
    """
    file = path or Path(FILE_NAME)
    if path is None and not file.exists():
        return Config(folder=Path.cwd())
    problems: list[str] = []
    tables: dict[str, Any] = {k: _expanded(v, k, environ, problems) for k, v in _read(file).items()}
    reported = {problem.partition(":")[0] for problem in problems}
    if tables.pop("folder", None) is not None:
        problems.append(_unknown(("folder",)))
    try:
        config = Config(folder=file.resolve().parent, **tables)
        problems += _pause_problems(config)
    except ValidationError as exc:
        problems += [problem for problem in config_problems(exc) if problem.partition(":")[0] not in reported]
    if problems:
        raise ConfigError(f"{file} is invalid:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror}. Give its path with --config.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file} is not TOML: {exc}.") from exc


def _expanded(value: object, key: str, environ: Mapping[str, str], problems: list[str]) -> object:
    """`value` with `${NAME}` and `${NAME:-default}` replaced, at any depth."""
    if isinstance(value, dict):
        return {k: _expanded(v, f"{key}.{k}", environ, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v, f"{key}[{i}]", environ, problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = environ.get(name, default)
        if found is None:
            problems.append(f"{key}: the variable {name} is not set; set it, or write ${{{name}:-default}}")
        return found or ""

    return _VARIABLE_RE.sub(replace, value)


def _pause_problems(config: Config) -> Iterator[str]:
    """Sections whose restart_pause is longer than their restart_pause_max, own or inherited."""
    sections: dict[Loc, LimitsSection] = {("limits",): config.limits}
    sections |= {("agents", name): section for name, section in config.agents.items()}
    for loc, section in sections.items():
        limits = config.limits_of(str(loc[1])) if loc[1:] else Limits(**config.limits.model_dump())
        own = [key for key in ("restart_pause", "restart_pause_max") if key in section.model_fields_set]
        if own and limits.restart_pause > limits.restart_pause_max:
            yield (
                f"{_key((*loc, own[0]))}: restart_pause ({limits.restart_pause:g} s) is longer than "
                f"its maximum, restart_pause_max ({limits.restart_pause_max:g} s); lower the one or raise "
                "the other"
            )


def config_problems(
    exc: ValidationError, within: Loc = (), known: Collection[str] | None = None
) -> Iterator[str]:
    """The problems of a file, one line each; or of a plugin's table `within` it, with its `known` keys."""
    for error in exc.errors(include_url=False):
        loc, given = (*within, *error["loc"]), error["input"]
        if error["type"] == "extra_forbidden" and known is not None:
            yield f"{_key(loc)}: unknown key; {nearest(str(loc[-1]), known, 'known keys')}"
        elif error["type"] == "extra_forbidden":
            yield _unknown(loc, given)
        elif error["type"] in {"model_type", "dict_type"}:
            yield f"{_key(loc)}: {_not_a_table(loc)}, found {_shown(given)}"
        else:
            found = "" if isinstance(given, dict) else f", found {_shown(given)}"
            yield f"{_key(loc)}: {error['msg'][:1].lower()}{error['msg'][1:]}{found}"


def _unknown(loc: Loc, given: object = None) -> str:
    if loc[0] == "agents" and isinstance(given, dict):
        hint = f"quote the name of an agent: [agents.{_quoted_name(loc, given)}]"
        return f"{_key(loc)}: unexpected table; {hint}"
    return f"{_key(loc)}: unknown key; {nearest(str(loc[-1]), _known_keys(loc[:-1]), 'known keys')}"


def _quoted_name(loc: Loc, given: dict[str, Any]) -> str:
    """The agent's name that TOML read as nested tables, because it was not quoted."""
    parts = [str(part) for part in loc[1:]]
    while len(given) == 1:
        [(part, inner)] = given.items()
        if not isinstance(inner, dict):
            break
        parts.append(part)
        given = inner
    return f'"{".".join(parts)}"'


def _not_a_table(loc: Loc) -> str:
    if loc[0] == "agents" and loc[-1] in LimitsSection.model_fields:
        return "input should be the table of an agent; limits of all agents belong into [limits]"
    return f"input should be a table, [{_key(loc)}]"


def nearest(name: str, known: Collection[str], title: str) -> str:
    """A hint: the nearest of the known names, else all of them."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{found[0]}'?" if found else f"{title}: {', '.join(sorted(known)) or 'none'}"


def _known_keys(loc: Loc) -> list[str]:
    """The keys of the section at `loc`."""
    if not loc:
        return [name for name in Config.model_fields if name != "folder"]
    section = AgentSection() if loc[0] == "agents" else getattr(Config(), str(loc[0]))
    return list(type(section).model_fields)


def _key(loc: Loc) -> str:
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if _BARE_KEY_RE.fullmatch(part) else f'."{part}"'
        for part in loc
    ).removeprefix(".")


def _shown(value: object) -> str:
    """A value as TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)
