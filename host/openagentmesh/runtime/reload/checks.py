"""Whether a reload may be carried out: small rules, each with a reason."""

import logging
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.protocol.errors import MeshError, error_text, valid_text
from openagentmesh.protocol.schema_diff import breaking_changes
from openagentmesh.runtime.config import Config, keys_that_need_restart
from openagentmesh.runtime.loading.files import Stamp, file_digest, stamp
from openagentmesh.runtime.loading.imports import ImportTransaction
from openagentmesh.runtime.loading.loader import Module, authors_frames, find_duplicates
from openagentmesh.runtime.loading.modules import INSTALLED, ManagedModule, is_written_by_code
from openagentmesh.runtime.reload.changes import Plan
from openagentmesh.runtime.reload.off_loop import TookTooLong
from openagentmesh.transport.kv import HEADER_RESERVE

log = logging.getLogger(__name__)


class ReloadRefused(MeshError):
    """A changed module does not replace the one that serves."""

    code = "reload_refused"


class LoadFailed(Exception):
    """A module could not be loaded; the module has the reason. `files` are others that it depended on."""

    def __init__(self, module: Module, files: Iterable[Path] = ()) -> None:
        super().__init__(module.error)
        self.module = module
        self.files = list(files)


class UnstableFiles(Exception):
    """A save may be incomplete: a file is missing, empty or changed again, or a module lost its agents."""


@dataclass(slots=True)
class Serving:
    """What serves during a reload, with the settings in force and those at the host's start.

    Attributes:
        refused: the names of agents that do not serve because of their contracts.
        max_payload: the server's limit, in bytes.
    """

    agents: Mapping[str, AgentVersion]
    modules: list[Module]
    config: Config
    started: Config
    refused: Container[str]
    max_payload: int


@dataclass
class Candidate:
    """A loaded generation that does not serve yet.

    Attributes:
        modules: all modules afterwards.
        new: those of them that were loaded.
        is_stable: the files have not changed for long, so that an incomplete save is excluded.
        notes: for the result.
    """

    plan: Plan
    serving: Serving
    modules: list[Module]
    new: list[Module]
    agents: dict[Module, list[AgentVersion]]
    transaction: ImportTransaction
    is_stable: bool
    notes: list[str] = field(default_factory=list)

    # Both are computed once `check` has removed the agents of duplicates.
    @cached_property
    def wanted(self) -> dict[str, AgentVersion]:
        """All agents that serve afterwards."""
        config = self.plan.config
        return {a.name: a for agents in self.agents.values() for a in agents if config.is_enabled(a.name)}

    @cached_property
    def changed(self) -> list[AgentVersion]:
        """The agents that serve now in another form, or not at all."""
        return [agent for agent in self.wanted.values() if self._differs(agent)]

    def _differs(self, agent: AgentVersion) -> bool:
        name, before, after = agent.name, self.serving.config, self.plan.config
        served = self.serving.agents.get(name)
        if served is None or served.handler is not agent.handler or served.limits != after.limits_of(name):
            return True
        if before.plugin_tables_of(name) != after.plugin_tables_of(name) or before.plugins != after.plugins:
            return True
        return name in self.serving.refused and before.host.contract != after.host.contract

    @property
    def removed(self) -> list[str]:
        """The agents that serve no longer.

        An agent that a file declared while it ran is removed with that file; reloads of others keep it.
        """
        declared = {agent.name for module in self.serving.modules for agent in module.agents}
        files = {module.path for module in self.transaction.replaced.values()}
        wanted = self.wanted
        unwanted = [a for name, a in self.serving.agents.items() if name not in wanted]
        return [agent.name for agent in unwanted if agent.name in declared or agent.file in files]


def check_not_declined(modules: Mapping[str, ManagedModule], names: Iterable[str]) -> None:
    """Refuse to replace modules that decline it."""
    for module in [modules[name] for name in names if name in modules]:
        if module.generation.declined:
            reason = f"{module.path.name} declines to be reloaded: {module.generation.declined}"
            raise ReloadRefused(f"{reason}. Restart the host")


def check_scanned(
    executed: Iterable[ManagedModule], scanned: Mapping[str, Stamp], *, is_stable: bool
) -> None:
    """Raise UnstableFiles if a file changed since it was scanned.

    Stable files, and files that modules write themselves to import them, only have to be what was executed.
    """
    for module in executed:
        path = str(module.path)
        has_changed = path in scanned and stamp(path) != scanned[path]
        may_change = is_stable or is_written_by_code(path)
        if has_changed and not (may_change and file_digest(module.path) == module.digest):
            raise UnstableFiles


def check(candidate: Candidate) -> None:
    """Apply all rules: they raise UnstableFiles, LoadFailed or ReloadRefused, or add notes."""
    _check_kept_agents(candidate)
    _check_names(candidate)
    _check_sizes(candidate)
    candidate.notes += [*_breaking_changes(candidate), *_notes_on_config(candidate)]


def _check_kept_agents(candidate: Candidate) -> None:
    """A module that loses all its agents may be an incomplete save."""
    before = {module.origin: module.agents for module in candidate.serving.modules}
    lost_all = any(before.get(module.origin) and not candidate.agents[module] for module in candidate.new)
    if lost_all and not candidate.is_stable:
        raise UnstableFiles


def _check_names(candidate: Candidate) -> None:
    """A new module takes no name from a module that serves, whatever their order."""
    in_order = sorted(candidate.modules, key=candidate.new.__contains__)
    for duplicate in find_duplicates(in_order, candidate.agents):
        module = duplicate.module
        if module in candidate.new:
            module.fail(duplicate.error, line=duplicate.agent.source)
            raise LoadFailed(module, [duplicate.earlier.file])
        candidate.agents[module] = []


def _check_sizes(candidate: Candidate) -> None:
    """A contract above the server's limit could not be published."""
    limit = candidate.serving.max_payload
    for agent in candidate.changed:
        size = len(agent.contract.to_registry_json().encode())
        if size > limit - HEADER_RESERVE:
            raise ReloadRefused(
                f"{agent.name}: its contract has {size} bytes, and the server's max_payload is {limit}. "
                "Shorten its description or its schemas, or raise max_payload"
            )


def _breaking_changes(candidate: Candidate) -> list[str]:
    """The breaking changes of contracts; refused with `contract = "refuse"`."""
    policy, served = candidate.plan.config.host.contract, candidate.serving.agents
    if policy == "allow":
        return []
    changes = [
        f"{agent.name} breaks callers: {change}"
        for agent in candidate.changed
        if agent.name in served
        for change in breaking_changes(served[agent.name].contract, agent.contract)
    ]
    if changes and policy == "refuse":
        raise ReloadRefused(
            'callers would break, and [host] contract is "refuse": ' + "; ".join(changes),
            details={"changes": changes},
        )
    return changes


def _notes_on_config(candidate: Candidate) -> Iterator[str]:
    """The tables of a changed mesh.toml that match nothing, and its keys that need a restart."""
    config = candidate.plan.config
    if config is candidate.serving.config:
        return
    agents = [agent.name for found in candidate.agents.values() for agent in found]
    yield from config.unused({module.origin.key for module in candidate.modules}, agents)
    if keys := keys_that_need_restart(candidate.serving.started, config):
        yield f"mesh.toml: restart the host to apply {', '.join(keys)}"


def describe_change(before: AgentVersion | None, agent: AgentVersion) -> str:
    """What changes of an agent, as text."""
    version = agent.contract.version
    if before is None:
        return f"{agent.name} {version} new"
    if before.contract.version == version:
        return f"{agent.name} {version}"
    return f"{agent.name} {before.contract.version} → {version}"


def explain(exc: BaseException) -> tuple[str, str, str]:
    """Message, details and `file:line` of a failure, for its author."""
    if isinstance(exc, LoadFailed):
        return exc.module.error, exc.module.traceback, exc.module.line
    if isinstance(exc, TookTooLong):
        frames = authors_frames(exc.stack)
        own = [frame for frame in frames if not frame.filename.startswith(INSTALLED)] or frames
        line = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
        message = "it takes too long to load ([host] load_timeout); do slow work in a watcher"
        return message, "".join(exc.stack.format()), line
    if isinstance(exc, MeshError):
        return exc.message, "", ""
    return (
        f"{type(exc).__name__}: {error_text(exc)}",
        valid_text("".join(traceback.format_exception(exc))),
        "",
    )


def log_result(result: ReloadResult) -> None:
    """Log a reload, completed or refused."""
    text = f"{result.text}\n{result.details}" if result.details else result.text
    log.log(logging.ERROR if result.error else logging.INFO, "%s", text)
    for note in result.notes:
        log.warning("%s", note)
