"""The states of a host's modules: loaded at the start, failed, outdated, restored."""

import logging
from collections.abc import Iterable
from typing import Literal

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.protocol.errors import PluginFailed
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.imports import ImportTransaction
from openagentmesh.runtime.loading.loader import Loader, Module, Prepare, find_duplicates
from openagentmesh.runtime.loading.origins import Origin
from openagentmesh.runtime.reload.changes import Changes, Plan

log = logging.getLogger(__name__)


def load_all(
    loader: Loader, changes: Changes, origins: list[Origin], config: Config, prepare: Prepare
) -> tuple[list[Module], list[AgentVersion]]:
    """Load everything for the first time: the modules, and the agents that serve, prepared.

    Failed modules have their error, and do not affect the others.
    """
    modules: list[Module] = []
    loader.prepare(config, origins)
    for origin in origins:
        transaction = loader.imports.transaction = ImportTransaction()
        module = loader.load(origin, transaction)
        modules.append(module)
        if module.state == "failed":
            changes.add_failed_origin(origin, transaction.executed)
    agents = loader.agents_of(modules)
    for duplicate in find_duplicates(modules, agents):
        duplicate.module.fail(duplicate.error, line=duplicate.agent.source)
        agents[duplicate.module] = []
        changes.add_failed_origin(duplicate.module.origin, [], [duplicate.earlier.file])
    prepared: list[AgentVersion] = []
    for module in modules:
        try:
            prepared += [prepare(each, config) for each in agents[module] if config.is_enabled(each.name)]
            module.agents = agents[module]
        except PluginFailed as exc:
            module.fail(exc.message)
            changes.add_failed_origin(module.origin, [])
    return modules, prepared


def update_failed(modules: Iterable[Module], changes: Changes) -> list[Module]:
    """Clear the error of modules that match their files again; drop failed ones without a file."""
    kept = [module for module in modules if not _is_gone(module)]
    outdated = [module for module in kept if module.state == "outdated"]
    if outdated:
        changed = changes.changed_modules()
        failed = {name for attempt in changes.failed_attempts for name in attempt.names}
        for module in outdated:
            if module.name not in changed | failed:
                module.clear_error()
                log.info("%s: file matches the running version again", module.origin.display_name)
    return kept


def mark_refused(
    modules: list[Module], plan: Plan, failed: Origin | None, error: tuple[str, str, str]
) -> list[str]:
    """Give modules that could not be reloaded their error; returns the names of their agents.

    `failed` is the origin that could not be loaded; None when all of the plan's are affected. `error` is
    message, details and `file:line`.
    """
    names: list[str] = []
    for module in modules:
        is_cause = module.origin == failed or (failed is None and module.origin in plan.load)
        if is_cause or module.name in plan.names:
            state: Literal["failed", "outdated"] = "failed" if module.state == "failed" else "outdated"
            module.set_error(state, *error)
            names += [agent.name for agent in module.agents]
    known = {module.origin for module in modules}
    for origin in [origin for origin in plan.load if origin not in known]:
        module = Module(origin)
        module.set_error("failed", *error)
        modules.append(module)
    return names


def _is_gone(module: Module) -> bool:
    path = module.origin.path
    return module.state == "failed" and path is not None and not path.exists()
