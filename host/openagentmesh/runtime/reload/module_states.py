"""The states of a host's modules: loaded at the start, failed, outdated, restored."""

import logging
from collections.abc import Iterable

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
    paths = {module: module.origin.path for module in modules if module.state == "failed"}
    kept = [module for module in modules if (path := paths.get(module)) is None or path.exists()]
    if outdated := [module for module in kept if module.state == "outdated"]:
        failed = [attempt.names for attempt in changes.failed_attempts]
        changed = changes.changed_modules().union(*failed)
        for module in [each for each in outdated if each.name not in changed]:
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
    causes = plan.load if failed is None else [failed]
    affected = [module for module in modules if module.origin in causes or module.name in plan.names]
    for module in affected:
        module.set_error("failed" if module.state == "failed" else "outdated", *error)
    known = {module.origin for module in modules}
    for origin in plan.load:
        if origin not in known:
            modules.append(Module(origin))
            modules[-1].set_error("failed", *error)
    return [agent.name for module in affected for agent in module.agents]
