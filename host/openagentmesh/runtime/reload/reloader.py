"""The reload transaction: load a new generation beside the old, then swap, then let the old one go."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, Final

from openagentmesh.agent.agent import Agent
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import PluginFailed
from openagentmesh.runtime.config import Config, ConfigError, unfollowed
from openagentmesh.runtime.loading.files import Stamp
from openagentmesh.runtime.loading.imports import Stage
from openagentmesh.runtime.loading.loader import Loader, Module, claimed_twice
from openagentmesh.runtime.loading.modules import Source
from openagentmesh.runtime.loading.origins import Origin
from openagentmesh.runtime.loading.plugin_loader import configure
from openagentmesh.runtime.reload import checks as verdict
from openagentmesh.runtime.reload.changes import Changes, Files, Places, Plan, names_of
from openagentmesh.runtime.reload.checks import Candidate, Doubtful, LoadFailed, ReloadRefused
from openagentmesh.runtime.reload.off_loop import aside
from openagentmesh.runtime.reload.replay import Replays
from openagentmesh.runtime.reload.retirement import Retired, Retirements, dispose, forget_hints, left_by_tried
from openagentmesh.runtime.reload.state import Transfer, move
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

_REMEMBERED: Final = 20
# So many modules are looked at beside the event loop.
_MANY: Final = 200
Notes = Iterable[str]
Ready = Callable[[Agent, Config], Agent]
# A load that took this many seconds is not waited for the next time.
_SLOW: Final = 0.008


class Reloader:
    """Keeps what a node serves like what is on disk.

    Args:
        loader: loads modules.
        node: serves their agents.
        changes: finds out what differs.
        config: what mesh.toml says.
        ready: makes an agent ready to serve: its limits, and what plugins put around it.
        replays: requests that a new version has to answer before it serves.

    Attributes:
        modules: all modules, in the order of their origins.
        config: what is in force now.
        history: the last reloads.
        on_outcome: called with each reload, and with each that was refused.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - all that a reload touches
        self,
        loader: Loader,
        node: Node,
        changes: Changes,
        config: Config,
        ready: Ready,
        replays: Replays | None = None,
    ) -> None:
        self.modules: list[Module] = []
        self.config = self._started = config
        self.history: deque[Outcome] = deque(maxlen=_REMEMBERED)
        self.on_outcome: Callable[[Outcome], Awaitable[None]] = _tell_nobody
        self._ready = ready
        self._replays = replays or Replays(0)
        self._loader = loader
        self._node = node
        self._changes = changes
        self._turn = asyncio.Lock()
        self._running: asyncio.Task[Any] | None = None
        self._closed = False
        self.retirements = Retirements(node, self._go_back)
        self._config_error = ""  # that was told last, and is still there
        node.on_finished = self._dispose

    def load_all(self, origins: list[Origin]) -> list[Agent]:
        """Load everything for the first time; modules that fail say so, the others serve.

        Returns the agents that are to be served, ready for it.
        """
        loader = self._loader
        loader.prepare(self.config, origins)
        for origin in origins:
            stage = loader.imports.stage = Stage()
            module = loader.load(origin, stage)
            self.modules.append(module)
            if module.state == "failed":
                self._changes.tried_first(origin, stage.executed)
        agents = loader.agents_of(self.modules)
        for module, why, twice, first in claimed_twice(self.modules, agents):
            module.fail(why, line=twice.source)
            agents[module] = []
            self._changes.tried_first(module.origin, [], [first.file])
        ready: list[Agent] = []
        for module in self.modules:
            enabled = [agent for agent in agents[module] if self.config.enabled(agent.name)]
            try:
                ready += [self._ready(agent, self.config) for agent in enabled]
                module.agents = agents[module]
            except PluginFailed as exc:
                module.fail(exc.message)
                self._changes.tried_first(module.origin, [])
        return ready

    async def reload(
        self, only: str = "", *, sure: bool = True, settled: Mapping[str, Stamp] | None = None
    ) -> Outcome | None:
        """Load what differs from disk, or `only` one module anyway; None when nothing does.

        Never raises for what is on disk: a failure is an outcome, and changes nothing else.

        Raises:
            Doubtful: what is on disk may be half a save, and nobody is `sure` that it is not; or a
                file is not as it had `settled` any more.

        """
        async with self._turn:
            if self._closed:
                return None
            self._running = asyncio.current_task()
            try:
                outcome = await self._reload(only, settled or {}, sure=sure)
                if outcome is not None:
                    await self.on_outcome(outcome)
            finally:
                self._running = None
            return outcome

    async def _reload(self, only: str, settled: Mapping[str, Stamp], *, sure: bool) -> Outcome | None:
        began = perf_counter()
        try:
            plan = await self._find(only)
            self._config_error = ""
        except ConfigError as exc:
            told, self._config_error = self._config_error, exc.message
            if told != exc.message:
                return self._told(Outcome(self._shown(self._changes.config_cause()), error=exc.message))
            # It is told already; what else has changed is reloaded all the same.
            plan = await self._find(only, lenient=True)
        self._look_for_restored()
        if plan is None:
            return None
        if plan.is_doubtful and not sure:
            raise Doubtful
        return await self._carry_out(plan, settled, began, sure=sure)

    async def _find(self, only: str, *, lenient: bool = False) -> Plan | None:
        """What differs; to look at many files must not hold up the event loop."""
        find = partial(self._changes.find, self.modules, self.config, only, lenient=lenient)
        return await asyncio.to_thread(find) if len(self.modules) > _MANY else find()

    def _look_for_restored(self) -> None:
        """Say of what could not be loaded that it is again what is served, or gone."""
        paths = {module: module.origin.path for module in self.modules if module.state == "failed"}
        gone = [module for module, path in paths.items() if path is not None and not path.exists()]
        self.modules = [module for module in self.modules if module not in gone]
        outdated = [module for module in self.modules if module.state == "outdated"]
        differing = self._changes.differing() if outdated else set()
        refused = {name for attempt in self._changes.attempts for name in attempt.names}
        for module in outdated:
            if module.name not in differing | refused:
                module.state, module.error, module.traceback, module.line = "serving", "", "", ""
                log.info("%s is again what is being served", module.origin.shown)

    async def _carry_out(
        self, plan: Plan, settled: Mapping[str, Stamp], began: float, *, sure: bool
    ) -> Outcome:
        """The transaction."""
        imports, plugins = self._loader.imports, self._node.plugins
        stage, settings, limit = Stage(), plugins.in_force, plan.config.host.load_timeout
        try:
            verdict.check_willing(imports.sources, plan.names)
            self._loader.prepare(plan.config, plan.origins)
            stage = imports.take_out(plan.names)
            try:
                new = await aside(
                    lambda: self._load(plan.load, stage),
                    limit,
                    is_slow=sum(source.took for source in stage.sources.values()) > _SLOW,
                    when_late=imports.mend,
                )
            finally:
                verdict.check_settled(stage.executed, settled, sure=sure)
            if plan.config.plugins != self.config.plugins:
                configure(plugins, plan.config)
            candidate = self._check(plan, new, stage, sure=sure)
            with imports.loading(stage):  # they may import more of the new version
                await move(candidate.transfers, limit)
                if await self._replay(candidate, strict=plan.config.host.replay_strict):
                    await move(candidate.transfers, limit)  # without what replays have done to it
        # Code of others may raise anything.
        except BaseException as exc:
            imports.put_back(stage)
            imports.stage = Stage()  # nobody holds what was tried
            plugins.restore(settings, self.config.folder)
            plugins.tell_unloaded(self._node.binding.wanted)
            self._loader.prepare(self.config, [module.origin for module in self.modules])
            task = asyncio.current_task()
            if isinstance(exc, Doubtful) or (task is not None and task.cancelling()):
                raise
            return self._refused(plan, stage.executed, exc, began, left_by_tried(stage.executed))
        # Above this line anything may fail, and nothing has changed.
        return self._commit(plan, stage, candidate, began)

    def _load(self, origins: Iterable[Origin], stage: Stage) -> list[Module]:
        forget_hints()
        modules = []
        for origin in origins:
            if stage.given_up:
                raise SystemExit("the load took too long")
            module = self._loader.load(origin, stage, can_be_left=False)
            if module.state == "failed":
                raise LoadFailed(module)
            modules.append(module)
        return modules

    def _check(self, plan: Plan, new: list[Module], stage: Stage, *, sure: bool) -> Candidate:
        """What is to serve from now on; raises why it must not."""
        known = {module.origin: module for module in self.modules} | {module.origin: module for module in new}
        modules = [known[origin] for origin in plan.origins if origin in known]
        before = {module.origin: module for module in self.modules}
        for module in new:
            old = before.get(module.origin)
            if old is not None:
                module.take_over(old)
        agents = self._loader.agents_of(modules)
        for module in new:
            old = before.get(module.origin)
            if not sure and old is not None and old.agents and not agents[module]:
                raise Doubtful
        # Those that serve come first, wherever they stand: a new one takes nothing from them.
        for module, why, twice, first in claimed_twice(sorted(modules, key=new.__contains__), agents):
            if module in new:
                module.fail(why, line=twice.source)
                raise LoadFailed(module, [first.file])
            agents[module] = []
        wanted = {a.name: a for found in agents.values() for a in found if plan.config.enabled(a.name)}
        served = self._node.binding.wanted
        differing = verdict.different(wanted, served, plan.config, self.config, self._node.refused)
        serve = [self._ready(agent, plan.config) for agent in differing]
        verdict.check_publishable(serve, self._node.connection.max_payload)
        notes = verdict.compared(serve, served, plan.config.host.contract)
        if self._changes.config_file in plan.causes:
            notes += plan.config.unread(
                {m.origin.key for m in modules}, [a.name for f in agents.values() for a in f]
            )
            if keys := unfollowed(self._started, plan.config):
                notes.append(f"mesh.toml: the host follows {', '.join(keys)} after a restart only")
        transfers = [Transfer(source.generation) for source in stage.executed if source.generation.before]
        gone = verdict.withdrawn(served, wanted, self.modules, stage.sources.values())
        return Candidate(modules, agents, serve, gone, transfers, notes)

    async def _replay(self, candidate: Candidate, *, strict: bool) -> bool:
        """Note what the new versions do differently; tells whether anything was replayed."""
        for agent in candidate.serve:
            before = self._node.binding.wanted.get(agent.name)
            for difference in await self._replays.differences(agent, before):
                candidate.notes.append(f"{agent.name}: {difference.text}")
                if strict and difference.is_new_error:
                    why = "fails on what the version before it answers"
                    raise ReloadRefused(f"{agent.name} {why}: {difference.text}")
        return any(self._replays.kept(agent.name) for agent in candidate.serve)

    def _commit(self, plan: Plan, stage: Stage, candidate: Candidate, began: float) -> Outcome:
        """Let the new generation serve, without a pause in which both or none do."""
        routes = {name: route for a in candidate.serve if (route := self._node.router.get(name := a.name))}
        old = {name: route.agent for name, route in routes.items()}
        added = [agent.name for agent in candidate.serve if agent.name not in self._node.binding.wanted]
        replaced = [module for module in self.modules if module not in candidate.modules]
        self.config, self.modules = plan.config, candidate.modules
        for module in self.modules:
            module.agents = candidate.agents[module]
            if module.origin in plan.load:
                module.state = "serving"
        self._node.contract_policy = plan.config.host.contract
        self._node.binding.replace(candidate.serve)
        gone = self._node.drop(candidate.gone)
        self._replays.accept(candidate.serve, candidate.gone)
        self._changes.done(plan)
        # From here on nothing but what runs on it holds the old generation.
        self._loader.imports.stage = Stage()
        for source in stage.executed:
            source.generation.before = None
        # Of what was tried, what serves now.
        stage.executed = [s for s in stage.executed if self._loader.imports.sources.get(s.name) is s]
        outcome = Outcome(
            self._shown(plan.causes),
            [*verdict.in_words(old, candidate.serve), *[f"{name} withdrawn" for name in candidate.gone]],
            notes=candidate.notes,
            took_ms=_ms(began),
            in_flight=sum(route.running_on(old[name]) for name, route in routes.items())
            + sum(route.in_flight for route in gone),
        )
        outcome.names = sorted({*old, *[agent.name for agent in candidate.serve], *candidate.gone})
        agents = [(routes[name], agent) for name, agent in old.items()]
        retired = Retired(agents, gone, added, stage, replaced, plan)
        self.retirements.begin(retired, plan.config.host.drain_timeout, outcome)
        return self._told(outcome)

    async def _go_back(self, retired: Retired, why: str) -> bool:
        """Let an old version serve again, all of it, unless another reload has replaced the new one."""
        imports, stage = self._loader.imports, retired.stage
        async with self._turn:
            replaced = any(imports.sources.get(s.name) is not s for s in stage.executed)
            if self._closed or not stage.executed or replaced:  # once back, it goes nowhere else
                return False
            try:
                serve = [self._ready(agent.bare, self.config) for agent in retired.old_agents(self.config)]
            except PluginFailed as failure:
                log.warning("%s; the old version cannot run again: %s", why, failure.message)
                return False
            executed, stage.executed = stage.executed, []
            failed = imports.take_out({source.name for source in executed})
            imports.put_back(stage)
            imports.stage = Stage()
            agents = [(route, route.agent) for route, _ in retired.agents]
            before = {module.origin: module for module in retired.modules}
            new = [module for module in self.modules if module.name in failed.modules]
            kept = [module for module in self.modules if module not in new or module.origin in before]
            self.modules = [before.pop(module.origin, module) for module in kept]
            self.modules += before.values()
            self._node.binding.replace(serve)
            self._replays.accept(serve, retired.added)
            gone = self._node.drop(retired.added)
            again = Stage(failed.modules, sources=failed.sources)
            exc = ReloadRefused(f"{why}, so the old version runs again")
            outcome = self._refused(retired.plan, executed, exc, perf_counter())
            drain_timeout = self.config.host.drain_timeout
            self.retirements.begin(Retired(agents, gone, [], again, [], retired.plan), drain_timeout, outcome)
            await self.on_outcome(outcome)
        return True

    def _told(self, outcome: Outcome) -> Outcome:
        self.history.append(outcome)
        verdict.tell(outcome)
        return outcome

    def _refused(
        self, plan: Plan, executed: Iterable[Source], exc: BaseException, began: float, notes: Notes = ()
    ) -> Outcome:
        """Remember and tell that what is on disk is not served, and why."""
        also = exc.files if isinstance(exc, LoadFailed) else []
        self._changes.tried(plan.causes, executed, also, plan.names)
        error, details, line = verdict.why_of(exc)
        files = self._shown(plan.causes) or ["the configuration"]
        outcome = Outcome(files, error=error, details=details, line=line, notes=[*notes], took_ms=_ms(began))
        failed = exc.module.origin if isinstance(exc, LoadFailed) else None
        for module in self.modules:
            at_fault = module.origin == failed or (failed is None and module.origin in plan.load)
            if at_fault or module.name in plan.names:
                module.error, module.traceback, module.line = error, details, line
                outcome.names += [agent.name for agent in module.agents]
                module.state = "failed" if module.state == "failed" else "outdated"
        for origin in plan.load:
            if origin not in {module.origin for module in self.modules}:
                self.modules.append(Module(origin, state="failed", error=error, traceback=details, line=line))
        return self._told(outcome)

    def _shown(self, causes: Files) -> list[str]:
        folder = self.config.folder
        return sorted(str(p.relative_to(folder)) if p.is_relative_to(folder) else str(p) for p in causes)

    def knows(self, module: str) -> bool:
        """Whether there is a module of this name."""
        return any(module in names_of(each) for each in self.modules)

    def places(self) -> Places:
        """Where to look for what may change."""
        return self._changes.places(self.config)

    async def close(self) -> None:
        """Reload nothing more, and wait for what is being let go, as long as a stop may take."""
        self._closed = True
        await cancel_and_wait(self._running)
        await self.retirements.finish(self.config.host.drain_timeout)

    async def _dispose(self) -> None:
        """Dispose of what served to the last, and of what could not be let go of before."""
        await self.retirements.dispose()
        generations = [source.generation for source in self._loader.imports.sources.values()]
        await dispose(generations + [module.loose for module in self.modules])


async def _tell_nobody(_outcome: Outcome) -> None: ...


def _ms(began: float) -> float:
    return (perf_counter() - began) * 1000
