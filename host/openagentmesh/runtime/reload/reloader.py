"""The reload transaction: load a new generation beside the old one, swap, retire the old one."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Final

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import PluginFailed
from openagentmesh.runtime.config import Config, ConfigError
from openagentmesh.runtime.loading.files import Stamp
from openagentmesh.runtime.loading.imports import ImportTransaction
from openagentmesh.runtime.loading.loader import Loader, Module, Prepare
from openagentmesh.runtime.loading.modules import ManagedModule
from openagentmesh.runtime.loading.origins import Origin
from openagentmesh.runtime.loading.plugin_loader import configure
from openagentmesh.runtime.reload import checks
from openagentmesh.runtime.reload.changes import Changes, Files, Plan, WatchedPaths, names_of
from openagentmesh.runtime.reload.checks import Candidate, LoadFailed, ReloadRefused, Serving, UnstableFiles
from openagentmesh.runtime.reload.leftovers import clear_typing_caches, find_leftovers
from openagentmesh.runtime.reload.module_states import load_all, mark_refused, update_failed
from openagentmesh.runtime.reload.off_loop import run_off_loop
from openagentmesh.runtime.reload.retirement import Retirements, RetiringVersion, dispose
from openagentmesh.runtime.reload.state import StateTransfer, transfer_state
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

_MAX_HISTORY: Final = 20
# From this number of modules on, changes are searched for off the loop.
_MANY_MODULES: Final = 200
# The loop does not block for a module that took this long to load before.
_SLOW_S: Final = 0.008


class Reloader:
    """Keeps what a node serves equal to what is on disk.

    Attributes:
        modules: all modules, in the order of their origins.
        config: the settings in force.
        on_result: awaited with each reload, completed or refused.
    """

    def __init__(
        self, loader: Loader, node: Node, changes: Changes, config: Config, prepare: Prepare
    ) -> None:
        self.modules: list[Module] = []
        self.config = self._started = config
        self.history: deque[ReloadResult] = deque(maxlen=_MAX_HISTORY)
        self.on_result: Callable[[ReloadResult], Awaitable[None]] = _do_nothing
        self.retirements = Retirements(node, self._roll_back)
        self._prepare = prepare
        self._loader = loader
        self._node = node
        self._changes = changes
        self._lock = asyncio.Lock()
        self._running: asyncio.Task[Any] | None = None
        self._is_closed = False
        self._config_error = ""  # the last one that was reported, while it persists
        node.on_finished = self._dispose

    def load_all(self, origins: list[Origin]) -> list[AgentVersion]:
        """Load everything for the first time; returns the agents that serve, prepared."""
        self.modules, agents = load_all(self._loader, self._changes, origins, self.config, self._prepare)
        return agents

    async def reload(
        self,
        name: str = "",
        *,
        is_stable: bool = True,
        scanned: Mapping[str, Stamp] | None = None,
        finds_references: bool = False,
    ) -> ReloadResult | None:
        """Load what differs from disk, or the module `name` in any case; None when nothing does.

        Never raises for what is on disk: a failure is a result, and changes nothing else. Files that changed
        since `scanned` are unstable; of files that are stable no save is incomplete. With `finds_references`
        what keeps the old version in memory is reported, which blocks the loop.

        Raises:
            UnstableFiles: a save may be incomplete, or a file changed since it was scanned.
        """
        async with self._lock:
            if self._is_closed:
                return None
            self._running, began = asyncio.current_task(), perf_counter()
            try:
                found = await self._find(name)
                if found is None:
                    return None
                if isinstance(found, Plan):
                    if found.has_unstable_files and not is_stable:
                        raise UnstableFiles
                    found = await self._carry_out(
                        found, scanned or {}, is_stable=is_stable, finds_references=finds_references
                    )
                await self._report(found, began)
                return found
            finally:
                self._running = None

    async def _find(self, name: str) -> Plan | ReloadResult | None:
        """What to do; a result when mesh.toml is invalid and that was not reported yet."""
        changes, previous = self._changes, self._config_error
        try:
            if name:
                plan = await self._search(lambda: changes.find_named(self.modules, self.config, name))
            else:
                plan = await self._search(lambda: changes.find(self.modules, self.config))
                self._config_error = ""
        except ConfigError as exc:
            self._config_error = exc.message
            if previous != exc.message:
                return ReloadResult(self._display_names(changes.config_cause()), error=exc.message)
            # Reported already; other changes are reloaded.
            plan = await self._search(lambda: changes.find_with_invalid_config(self.modules, self.config))
        self.modules = update_failed(self.modules, changes)
        return plan

    async def _search(self, find: Callable[[], Plan | None]) -> Plan | None:
        return await asyncio.to_thread(find) if len(self.modules) > _MANY_MODULES else find()

    async def _report(self, result: ReloadResult, began: float) -> None:
        result.took_ms = (perf_counter() - began) * 1000
        self.history.append(result)
        checks.log_result(result)
        await self.on_result(result)

    async def _carry_out(
        self, plan: Plan, scanned: Mapping[str, Stamp], *, is_stable: bool, finds_references: bool
    ) -> ReloadResult:
        """The transaction."""
        transaction = ImportTransaction()
        try:
            checks.check_not_declined(self._loader.imports.modules, plan.names)
            with self._staged(plan) as transaction:
                new = await self._load(plan, transaction, scanned, is_stable=is_stable)
                candidate = self._candidate(plan, new, transaction, is_stable=is_stable)
                checks.check(candidate)
                serve = [self._prepare(agent, plan.config) for agent in candidate.changed]
                await self._check_with_state(candidate, serve)
        # Authors' code may raise anything.
        except BaseException as exc:  # noqa: BLE001 - as above
            task = asyncio.current_task()
            try:
                if isinstance(exc, UnstableFiles) or (task is not None and task.cancelling()):
                    raise
                return self._refuse(plan, transaction.executed, exc)
            finally:
                transaction.clear()
        # Above this line anything may fail, and nothing has changed.
        return self._commit(candidate, serve, finds_references=finds_references)

    @contextmanager
    def _staged(self, plan: Plan) -> Iterator[ImportTransaction]:
        """Replace modules and settings; an error in the block restores all of them."""
        plugins, settings = self._node.plugins, self._node.plugins.current_settings
        self._loader.prepare(plan.config, plan.origins)
        try:
            with self._loader.imports.staged(plan.names) as transaction:
                yield transaction
        except BaseException:
            plugins.restore(settings, self.config.folder)
            plugins.notify_unloaded(self._node.reconciler.wanted)
            self._loader.prepare(self.config, [module.origin for module in self.modules])
            raise

    async def _load(
        self, plan: Plan, transaction: ImportTransaction, scanned: Mapping[str, Stamp], *, is_stable: bool
    ) -> list[Module]:
        """Load the modules off the loop, then apply the plugins' settings."""
        try:
            new = await run_off_loop(
                lambda: self._load_modules(plan.load, transaction),
                plan.config.host.load_timeout,
                is_slow=sum(module.took_s for module in transaction.replaced.values()) > _SLOW_S,
                on_late_end=self._loader.imports.repair,
            )
        finally:
            checks.check_scanned(transaction.executed, scanned, is_stable=is_stable)
        if plan.config.plugins != self.config.plugins:
            configure(self._node.plugins, plan.config)
        return new

    def _load_modules(self, origins: Iterable[Origin], transaction: ImportTransaction) -> list[Module]:
        clear_typing_caches()
        modules = []
        for origin in origins:
            if transaction.is_abandoned:
                raise SystemExit("the load took too long")
            module = self._loader.load(origin, transaction, may_interrupt=False)
            if module.state == "failed":
                raise LoadFailed(module)
            modules.append(module)
        return modules

    def _candidate(
        self, plan: Plan, new: list[Module], transaction: ImportTransaction, *, is_stable: bool
    ) -> Candidate:
        node, before = self._node, {module.origin: module for module in self.modules}
        for module in new:
            if module.origin in before:
                module.take_over(before[module.origin])
        known = before | {module.origin: module for module in new}
        modules = [known[origin] for origin in plan.origins if origin in known]
        wanted, limit = node.reconciler.wanted, node.connection.max_payload
        serving = Serving(wanted, self.modules, self.config, self._started, node.refused, limit)
        agents = self._loader.agents_of(modules)
        return Candidate(plan, serving, modules, new, agents, transaction, is_stable)

    async def _check_with_state(self, candidate: Candidate, serve: list[AgentVersion]) -> None:
        """Transfer the kept state, and let plugins check the new versions."""
        limit, plugins = candidate.plan.config.host.load_timeout, self._node.plugins
        generations = [managed.generation for managed in candidate.transaction.executed]
        transfers = [StateTransfer(generation) for generation in generations if generation.previous]
        await transfer_state(transfers, limit)
        has_effects = False
        for agent in serve:
            serving = candidate.serving.agents.get(agent.name)
            notes = await plugins.check_candidate(agent, serving, limit)
            has_effects |= notes is not None
            candidate.notes += notes or []
        if has_effects:
            await transfer_state(transfers, limit)  # without the effects of the checks

    def _commit(
        self, candidate: Candidate, serve: list[AgentVersion], *, finds_references: bool
    ) -> ReloadResult:
        """Let the new generation serve, without a pause in which both or none do."""
        plan, node, removed = candidate.plan, self._node, candidate.removed
        agents = [(route, route.agent) for agent in serve if (route := node.router.get(agent.name))]
        old = {agent.name: agent for _, agent in agents}
        added = [agent.name for agent in serve if agent.name not in node.reconciler.wanted]
        replaced = [module for module in self.modules if module not in candidate.modules]
        self._apply(candidate)
        node.reconciler.replace(serve)
        retiring = RetiringVersion(
            agents, node.remove(removed), added, candidate.transaction, replaced, plan, finds_references
        )
        changes = [checks.describe_change(old.get(agent.name), agent) for agent in serve]
        result = ReloadResult(
            self._display_names(plan.causes),
            [*changes, *[f"{name} withdrawn" for name in removed]],
            notes=candidate.notes,
            names=sorted({*[agent.name for agent in serve], *removed}),
            in_flight=retiring.in_flight,
        )
        self.retirements.begin(retiring, plan.config.host.drain_timeout, result)
        return result

    def _apply(self, candidate: Candidate) -> None:
        """Make the new modules and settings the current ones, and hold the old generation no longer."""
        plan, transaction = candidate.plan, candidate.transaction
        self.config, self.modules = plan.config, candidate.modules
        for module in self.modules:
            module.agents = candidate.agents[module]
            if module.origin in plan.load:
                module.state = "serving"
        self._node.contract_policy = plan.config.host.contract
        self._changes.complete(plan)
        serving = self._loader.imports.modules
        for managed in transaction.executed:
            managed.generation.previous = None
        transaction.executed = [m for m in transaction.executed if serving.get(m.name) is m]

    async def _roll_back(self, retiring: RetiringVersion, reason: str) -> bool:
        """Let an old version serve again, as a whole, unless a later reload has replaced the new one."""
        imports, transaction = self._loader.imports, retiring.transaction
        async with self._lock:
            began = perf_counter()
            is_replaced = any(imports.modules.get(m.name) is not m for m in transaction.executed)
            if self._is_closed or not transaction.executed or is_replaced:  # rolled back once at most
                return False
            config, old = self.config, [agent.without_middlewares() for agent in retiring.versions]
            try:
                serve = [self._prepare(agent, config) for agent in old if config.is_enabled(agent.name)]
            except PluginFailed as failure:
                log.warning("%s; rollback failed: %s", reason, failure.message)
                return False
            executed = list(transaction.executed)
            undone = imports.revert(transaction)
            self.modules = self._modules_before(retiring, undone)
            agents = [(route, route.agent) for route, _ in retiring.agents]
            self._node.reconciler.replace(serve)
            removed = self._node.remove(retiring.added)
            error = ReloadRefused(f"{reason}, so the old version runs again")
            result = self._refuse(retiring.plan, executed, error, has_served=True)
            failed = RetiringVersion(agents, removed, [], undone, [], retiring.plan)
            self.retirements.begin(failed, config.host.drain_timeout, result)
            await self._report(result, began)
        return True

    def _modules_before(self, retiring: RetiringVersion, undone: ImportTransaction) -> list[Module]:
        """All modules, with the old ones in place of those that were undone."""
        old = {module.origin: module for module in retiring.modules}
        kept = [m for m in self.modules if m.name not in undone.modules or m.origin in old]
        modules = [old.pop(module.origin, module) for module in kept]
        return [*modules, *old.values()]

    def _refuse(
        self, plan: Plan, executed: list[ManagedModule], exc: BaseException, *, has_served: bool = False
    ) -> ReloadResult:
        """Remember that a version is refused; leftovers of one that `has_served` are reported later."""
        clear_typing_caches()
        files = exc.files if isinstance(exc, LoadFailed) else []
        self._changes.add_failure(plan.causes, executed, files, plan.names)
        error, details, line = checks.explain(exc)
        failed = exc.module.origin if isinstance(exc, LoadFailed) else None
        modules = [] if has_served else [m.module for m in executed if m.module is not None]
        return ReloadResult(
            self._display_names(plan.causes) or ["the configuration"],
            error=error,
            details=details,
            line=line,
            notes=[f"the refused version left behind: {what}" for what in find_leftovers(modules)],
            names=mark_refused(self.modules, plan, failed, (error, details, line)),
        )

    def _display_names(self, causes: Files) -> list[str]:
        folder = self.config.folder
        return sorted(str(p.relative_to(folder)) if p.is_relative_to(folder) else str(p) for p in causes)

    def knows(self, name: str) -> bool:
        """Whether there is a module of this name."""
        return any(name in names_of(module) for module in self.modules)

    def watched_paths(self) -> WatchedPaths:
        """Where changes may happen."""
        return self._changes.watched_paths(self.config)

    async def close(self) -> None:
        """Reload nothing more, and wait for retiring versions, as long as a stop may take."""
        self._is_closed = True
        await cancel_and_wait(self._running)
        await self.retirements.finish(self.config.host.drain_timeout)

    async def _dispose(self) -> None:
        """Dispose of the serving version, and of those that could not be retired in time."""
        await self.retirements.dispose()
        generations = [managed.generation for managed in self._loader.imports.modules.values()]
        await dispose(generations + [module.unmanaged for module in self.modules])


async def _do_nothing(_result: ReloadResult) -> None: ...
