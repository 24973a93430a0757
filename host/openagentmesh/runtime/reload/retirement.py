"""Retiring an old version: wait for what runs on it, dispose of it, report what it left behind."""

import asyncio
import logging
import traceback
import typing
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.mesh.module_context import Generation
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.imports import ImportTransaction
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.modules import ManagedModule
from openagentmesh.runtime.reload.changes import Plan
from openagentmesh.runtime.reload.leftovers import find_leftovers, find_references, mark
from openagentmesh.serving.route import Route
from openagentmesh.transport.tasks import cancel_and_wait, cancel_within, retry_forever

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload is rolled back.
_PROBATION_S: Final = 1.0
_DISPOSAL_TIMEOUT_S: Final = 5.0
_CANCEL_GRACE_S: Final = 1.0
_BACKGROUND_KINDS: Final = frozenset({"publisher", "watcher"})


@dataclass(slots=True)
class RetiringVersion:
    """What a reload has replaced.

    Attributes:
        agents: routes, and the versions that they pointed at.
        removed: the routes of agents that do not exist any more.
        added: the names of agents that did not exist before.
        transaction: the old modules, and what was executed in their place.
        modules: the old modules with their agents.
        plan: what was carried out.
        finds_references: search for what keeps the old modules in memory, which blocks the loop.
    """

    agents: list[tuple[Route, AgentVersion]]
    removed: list[Route]
    added: list[str]
    transaction: ImportTransaction
    modules: list[Module]
    plan: Plan
    finds_references: bool = False

    @property
    def generations(self) -> list[Generation]:
        """What the modules declared; unmanaged declarations belong to the next module of the same origin."""
        unmanaged = [module.unmanaged for module in self.modules if module.origin not in self.plan.origins]
        return [module.generation for module in self.transaction.replaced.values()] + unmanaged

    def old_agents(self, config: Config) -> list[AgentVersion]:
        """The versions that served before, without those that are disabled now."""
        old = [agent for _, agent in self.agents] + [route.agent for route in self.removed]
        return [agent for agent in old if config.is_enabled(agent.name)]


Rollback = Callable[[RetiringVersion, str], Awaitable[bool]]


class Retirements:
    """The versions that are being retired; `rollback` lets one serve again, see `retire`."""

    def __init__(self, node: Node, rollback: Rollback) -> None:
        self._node = node
        self._rollback = rollback
        self._running: dict[asyncio.Task[None], RetiringVersion] = {}
        self._unfinished: list[RetiringVersion] = []

    def begin(self, retiring: RetiringVersion, drain_timeout: float, result: ReloadResult) -> None:
        """Retire a version, in a task."""
        task = asyncio.create_task(retire(retiring, self._node, drain_timeout, result, self._rollback))
        self._running[task] = retiring
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        retiring = self._running.pop(task)
        if task.cancelled():
            self._unfinished.append(retiring)
        elif exc := task.exception():
            log.error("an old version could not be retired", exc_info=exc)

    async def finish(self, timeout: float | None = None) -> None:
        """Wait until all are retired, at most `timeout` seconds."""
        while self._running and timeout is None:
            await asyncio.wait(self._running)
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)
        await cancel_and_wait(*self._running)

    async def dispose(self) -> None:
        """Dispose of versions that could not be retired in time."""
        await dispose([generation for retiring in self._unfinished for generation in retiring.generations])


async def retire(
    retiring: RetiringVersion, node: Node, drain_timeout: float, result: ReloadResult, rollback: Rollback
) -> None:
    """Finish what runs on the old version, dispose of it, report what it left behind.

    When a publisher or watcher of the new version fails at once, `rollback` is called with the reason; if it
    lets the old version serve again, nothing is disposed of.
    """
    names = [*(agent.name for _, agent in retiring.agents), *(route.agent.name for route in retiring.removed)]
    failure, _, _ = await asyncio.gather(
        _early_failure(retiring.agents, node),
        node.withdraw(retiring.removed, drain_timeout),
        asyncio.gather(*[route.finish(drain_timeout, agent) for route, agent in retiring.agents]),
    )
    if failure and await rollback(retiring, failure):
        return
    await dispose(retiring.generations)
    found = find_leftovers(list(retiring.transaction.modules.values()))
    marks = mark(retiring.transaction.modules) if retiring.finds_references and not found else {}
    # From here on nothing of ours refers to the old version.
    retiring.agents, retiring.removed, retiring.modules = [], [], []
    retiring.transaction.clear()
    if marks:
        await asyncio.sleep(0)  # what has just ended is released in the loop's next turn
        found = find_references(marks)
    result.notes += found
    for what in found:
        log.warning("the old version of %s left behind: %s", ", ".join(names) or "a module", what)


def leftovers_of_attempt(executed: Iterable[ManagedModule]) -> list[str]:
    """What modules that were executed and do not serve have left behind, as text."""
    modules = [managed.module for managed in executed if managed.module is not None]
    return [f"the refused version left behind: {what}" for what in find_leftovers(modules)]


def clear_typing_caches() -> None:
    """Clear the caches of `typing`: versions would share annotations, and what names in them mean."""
    for clear in getattr(typing, "_cleanups", ()):
        clear()


async def dispose(generations: Collection[Generation]) -> None:
    """Call the authors' disposal functions, once; failures are logged."""
    while waiting := [generation for generation in generations if generation.disposals]:
        function = waiting[0].disposals.pop(0)
        # In a task of its own, which is abandoned when it does not end.
        disposing = asyncio.create_task(_call(function))
        try:
            await asyncio.wait([disposing], timeout=_DISPOSAL_TIMEOUT_S)
        finally:
            still_running = await cancel_within(_CANCEL_GRACE_S, [disposing])
        if problem := _problem_of(disposing, does_not_end=bool(still_running)):
            name = getattr(function, "__qualname__", "") or repr(function)
            log.error("disposal function %s failed: %s", name, problem)


def _problem_of(disposing: "asyncio.Task[str]", *, does_not_end: bool) -> str:
    if does_not_end:
        return f"it did not end within {_DISPOSAL_TIMEOUT_S:g}s, and ignores its cancellation"
    if disposing.cancelled():
        return f"it did not end within {_DISPOSAL_TIMEOUT_S:g}s"
    return disposing.result()


async def _call(function: Callable[[], Any]) -> str:
    """Call an author's function; returns its traceback, empty for none."""
    try:
        result = function()
        if isawaitable(result):
            await result
    except BaseException as exc:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        return "".join(traceback.format_exception(exc))
    return ""


async def _early_failure(agents: list[tuple[Route, AgentVersion]], node: Node) -> str:
    """Why new publishers and watchers that replaced old ones failed at once; empty when none did."""
    names = [agent.name for _, agent in agents]
    # Publishing the new contracts may have to wait for the server.
    await retry_forever(lambda: node.wait_served(names), "serving reloaded agents")
    backgrounds = [
        background
        for route, old in agents
        if {route.agent.kind, old.kind} <= _BACKGROUND_KINDS and (background := route.background) is not None
    ]
    failures = await asyncio.gather(*[each.failed_within(_PROBATION_S) for each in backgrounds])
    named = zip(backgrounds, failures, strict=True)
    return "; ".join(f"{each.name} failed at once ({failure})" for each, failure in named if failure)
