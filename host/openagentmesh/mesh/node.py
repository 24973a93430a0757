"""One participant: a connection, the agents it serves, what it knows of the others."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from typing import Any, Literal

from pydantic_core import to_json

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.client_middleware import Border
from openagentmesh.agent.threads import pool
from openagentmesh.client.crossing import BorderCaller
from openagentmesh.client.pending import Waits
from openagentmesh.client.requests import Caller
from openagentmesh.client.subscriptions import Events
from openagentmesh.hooks.manager import Plugins
from openagentmesh.hooks.specs import Instance
from openagentmesh.mesh.reconciler import Binding
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import MeshError, error_text
from openagentmesh.registry.directory import Directory
from openagentmesh.registry.liveness import served_by_strangers
from openagentmesh.registry.nats_services import Micro
from openagentmesh.registry.presence import Presence
from openagentmesh.registry.registry import Registry
from openagentmesh.serving.route import Route
from openagentmesh.serving.router import Router
from openagentmesh.state.observe import follow_levels
from openagentmesh.transport.connection import Connection, Target
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.object_store import ObjectStore
from openagentmesh.transport.tasks import cancel_and_wait, retry_forever

log = logging.getLogger(__name__)

ContractPolicy = Literal["warn", "refuse", "allow"]

# More agents than this do not fit into an answer to `oam status`, nor do they when each has much to tell.
_MOST_DESCRIBED = 1000
# Registered agents that somebody else's clean-up removed come back after this much quiet.
_REPAIR_WAIT = 0.5


class Node:
    """Serves agents and calls others, over one connection.

    Args:
        target: where to connect.
        instance_id: this instance's id on the wire.
        about: what the instance record tells besides the agents.
        ready: makes an agent that was declared ready to serve.
        plugins: what is put around all that comes and leaves, and runs beside the agents.
        border: what all that leaves passes; else that of the plugins.
        contract_policy: what happens to an agent whose contract does not go together with the
            one that another live instance serves: it is served all the same, with or without
            a warning, or it is refused.

    Attributes:
        refused: the agents that were refused, and why.

    """

    def __init__(  # noqa: PLR0913 - one parameter a choice of its owner
        self,
        target: Target,
        instance_id: str,
        *,
        about: dict[str, Any] | None = None,
        ready: Callable[[Agent], Agent] = lambda agent: agent,
        plugins: Plugins | None = None,
        border: Border | None = None,
        contract_policy: ContractPolicy = "warn",
    ) -> None:
        self.plugins = plugins or Plugins()
        border = border or self.plugins.border()
        self.instance_id = instance_id
        self.started_at = time.time()
        self.connection = Connection(target, f"oam-host-{instance_id}")
        self.inbox = Inbox(self.connection)
        self.buckets = KVBuckets(self.connection, self.inbox)
        self.objects = ObjectStore(self.connection, self.inbox)
        self.router = Router(self.connection, self.inbox, self.buckets, instance_id, border)
        self.directory = Directory(self.buckets)
        self.registry = Registry(self.buckets, lambda: self.connection.max_payload)
        self.presence = Presence(self.connection, self.inbox, self.buckets, instance_id, about or {})
        self.micro = Micro(self.connection, self.router, instance_id)
        self.waits = Waits(self.connection, self.inbox, self.directory, self.own)
        asking = (self.connection, self.inbox, self.waits, instance_id)
        self.caller = BorderCaller(*asking, border) if border else Caller(*asking)
        self.caller.inside = self.router.take_inside
        self.events = Events(self.connection, self.directory, instance_id, self.own, border)
        self.describe: Callable[[], dict[str, Any]] = self.description
        # Awaited when nothing runs any more, while the connection is still there.
        self.on_finished: Callable[[], Awaitable[None]] = _do_nothing
        # What others may ask this instance, by the last word of the subject.
        self.controls: dict[str, Callable[[bytes], Awaitable[bytes]]] = {"info": self._info}
        self.refused: dict[str, str] = {}
        self.ready = ready
        self._plugins_running = AsyncExitStack()
        self.contract_policy = contract_policy
        self.binding = Binding(self.router, self._serve)
        # What was published, for new code alone is no reason to publish a contract again.
        self._published: dict[str, AgentContract] = {}
        self._torn = asyncio.Event()
        self._repairing: asyncio.Task[None] | None = None
        self._watching_over: asyncio.Task[None] | None = None
        self._following_levels: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._registering = asyncio.Lock()

    async def start(self, agents: Iterable[Agent] = (), *, serves: bool = False) -> None:
        """Connect, serve `agents`, which are `ready`, publish their contracts.

        With `serves` it is recorded as an instance even while it has no agents.

        Raises:
            ConnectionFailed: no server, or one without JetStream.
            ConnectionDenied: the server refuses the credentials.
            PluginFailed: a plugin cannot start.

        """
        await self.connection.connect()
        self.connection.restore = self._restore
        self.connection.on_closed = self._on_closed
        try:
            await self.inbox.open()
            await self.waits.open()
            await self.connection.subscribe(subjects.host(self.instance_id, "*"), self._on_host_request)
            await self.buckets.create_missing()
            await self._plugins_running.enter_async_context(
                self.plugins.lifespan(Instance(self.instance_id, self.describe))
            )
            for agent in agents:
                self.binding.want(agent)
            self.binding.start()
            await self.settled()
            if serves and not len(self.router):
                await self._announce([])  # a host without agents is there all the same
        except BaseException:
            await self._close()
            raise

    def bind(self, agent: Agent) -> None:
        """Serve an agent, in place of one of the same name; `settled` waits until it is up."""
        self.binding.want(self.ready(agent))

    def drop(self, names: Collection[str]) -> list[Route]:
        """Serve these agents no more; the routes they had are for `withdraw`."""
        for name in names:
            self.refused.pop(name, None)
        routes = self.binding.drop(names)
        self.plugins.tell_unloaded(self.binding.wanted)
        return routes

    async def withdraw(self, routes: Collection[Route], drain_timeout: float) -> None:
        """End what was dropped: leave, finish what runs, deregister."""
        if not routes:
            return
        await self.binding.idle()  # one of them may just be opened
        await asyncio.gather(*[route.end(drain_timeout) for route in routes])
        await retry_forever(lambda: self._deregister({route.agent.name for route in routes}), "deregistering")

    async def _deregister(self, names: set[str]) -> None:
        async with self._registering:
            # One may have come back meanwhile.
            gone = {name for name in names if self.router.get(name) is None}
            lonely = await self._nobodys(await self.presence.renounce(gone))
            await self.registry.withdraw(gone, everywhere=lonely)
            for name in gone:
                self._published.pop(name, None)
            await self.presence.notify_deaths(lonely, self.instance_id, "graceful_shutdown")
            for name in gone:
                await self.router.events.emit("info", name, "agent_deregistered")

    async def settled(self, names: Collection[str] | None = None) -> None:
        """Wait until every agent bound so far is up, or these; raises what kept them from that."""
        await self.binding.settled(names)

    async def _serve(self, names: Collection[str]) -> None:
        for name, why in (await self._conflicts(names)).items():
            if name not in self.binding.wanted:
                continue
            if self.contract_policy == "refuse":
                log.error("%s is not served: %s", name, why)
                self.refused[name] = why
            else:
                log.warning("%s is served all the same: %s", name, why)
        # Whenever others had their turn an agent may be another version, or dropped.
        wanted = self.binding.wanted
        for name in names:
            if name in wanted and name not in self.refused:
                await self.router.point(wanted[name])
        await self.connection.flush()  # from here on they can be called
        async with self._registering:
            agents = {route.agent.name: route.agent for n in names if (route := self.router.get(n))}
            contracts = {n: a.contract for n, a in agents.items() if not self._is_published(a.contract)}
            if contracts:
                await self.registry.publish(contracts.values())
                self._published |= contracts
            await self._announce(agents)
        for agent in agents.values():
            data: dict[str, object] = {"version": agent.contract.version}
            await self.router.events.emit("info", agent.name, "agent_registered", data=data)

    def _is_published(self, contract: AgentContract) -> bool:
        known = self._published.get(contract.name)
        return known is not None and known.equals(contract)

    async def _conflicts(self, names: Collection[str]) -> dict[str, str]:
        """Which of these agents other live instances serve with contracts that do not go together."""
        for name in names:
            self.refused.pop(name, None)
        if self.contract_policy == "allow":
            return {}
        wanted = self.binding.wanted
        # A new version of one that is served here has been compared with its old one.
        new = {name for name in names if self.router.get(name) is None}
        shared = await self.presence.served_elsewhere() & new if new else set()
        compared = [wanted[name].contract for name in sorted(shared & wanted.keys())]
        conflicts = await self.registry.conflicts(compared)
        return {
            name: "its contract does not go together with the one that another live instance serves: "
            + "; ".join(map(str, changes))
            for name, changes in conflicts.items()
        }

    async def _announce(self, agents: Iterable[str]) -> None:
        if self._watching_over is None:
            await self.micro.open()
        await self.presence.announce(agents)
        if self._watching_over is None:
            self.directory.changed = self._on_registry_change
            self.directory.follow()
            self._watching_over = asyncio.create_task(self.presence.watch_over(self._clear))
            self._repairing = asyncio.create_task(self._keep_published())
            self._following_levels = asyncio.create_task(
                retry_forever(lambda: follow_levels(self.buckets, self.router.events), "following log levels")
            )

    async def _clear(self, agents: set[str]) -> set[str]:
        """Take agents that died out of the registry, but for those that somebody serves; returns them."""
        gone = await self._nobodys(agents)
        await self.registry.withdraw([], everywhere=gone)
        return gone

    async def _nobodys(self, agents: set[str]) -> set[str]:
        """Those of these agents, in no record, that peers without records do not serve either."""
        known = [self.own(name) or self.directory.known(name) for name in agents]
        contracts = [contract for contract in known if contract]
        return agents - await served_by_strangers(self.connection, self.inbox, contracts)

    async def stop(self, drain_timeout: float) -> None:
        """Leave queue groups, finish what runs while replies still work, deregister, close."""
        served = self._watching_over is not None
        await self.binding.stop()
        await cancel_and_wait(self._repairing, self._watching_over)
        await self.micro.close()
        try:
            if self.connection.connected and served:
                await self.router.drain(drain_timeout)
                lonely = await self._nobodys(await self.presence.withdraw())
                await self.registry.withdraw([route.agent.name for route in self.router], everywhere=lonely)
                await self.presence.notify_deaths(lonely, self.instance_id, "graceful_shutdown")
                for route in self.router:
                    await self.router.events.emit("info", route.agent.name, "agent_deregistered")
                await self.connection.flush()
        except MeshError as exc:
            log.warning("not deregistered, others will clear up: %s", exc)
        finally:
            await self._close()

    async def _close(self) -> None:
        await self.binding.stop()
        await cancel_and_wait(self._repairing, self._watching_over, self._following_levels)
        try:
            await self.router.finish(0)
            await self.on_finished()
            self.plugins.tell_unloaded(())
            await self._plugins_running.aclose()
        finally:
            self.events.fail_all()
            await self.caller.close()
            await self.waits.close()
            await self.directory.close()
            await self.connection.close()

    def own(self, name: str) -> AgentContract | None:
        """The contract of an agent served here."""
        route = self.router.get(name)
        return route.agent.contract if route else None

    def description(self) -> dict[str, Any]:
        """What this node does, for `oam status`; JSON."""
        return {
            "instance_id": self.instance_id,
            "started_at": self.started_at,
            "agent_count": len(self.router),
            "agents": [route.description() for route in self.router],
            "refused": self.refused,
            "threads": pool.description(),
            "connection": {
                "url": self.connection.target.display_url,
                "server": self.connection.server.get("version"),
                "connected": self.connection.connected,
                "reconnects": self.connection.reconnects,
                "history": [
                    {"at": event.at.isoformat(), "what": event.what} for event in self.connection.history
                ],
            },
        }

    def _on_closed(self) -> None:
        self.buckets.fail_pending()
        self.waits.fail_all()
        self.events.fail_all()

    async def _restore(self) -> None:
        """Make everything true again that was true before the connection was lost."""
        await self.buckets.restore()
        await self._publish_again()
        await self.presence.restore()
        if self._watching_over is not None:
            self.directory.follow()
        self.binding.start()
        await self.objects.restore()

    def _on_registry_change(self, name: str, document: bytes | None) -> None:
        if document is None and self.registry.owns(name):
            self._torn.set()

    async def _keep_published(self) -> None:
        """Put back what is ours: a stock replica removes the agent for all when it stops."""
        while True:
            await self._torn.wait()
            await asyncio.sleep(_REPAIR_WAIT)  # let the other finish what it removes
            self._torn.clear()  # what is removed from here on needs another repair
            await retry_forever(self._publish_again, "publishing again what others removed")

    async def _publish_again(self) -> None:
        async with self._registering:  # what is withdrawn meanwhile must not come back
            await self.registry.restore()

    def _on_host_request(self, message: Message) -> None:
        if message.reply:
            task = asyncio.create_task(self._answer_host_request(message))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _answer_host_request(self, message: Message) -> None:
        verb = message.subject.rpartition(".")[2]
        try:
            control = self.controls.get(verb)
            body = await control(message.body) if control is not None else b"{}"
            await self.connection.publish(message.reply, body)
        except MeshError as exc:
            log.warning("a question about this host could not be answered: %s", exc)
        # The question ends here.
        except Exception as exc:
            log.exception("a question about this host could not be answered")
            await self.connection.publish(
                message.reply, to_json({"error": f"{type(exc).__name__}: {error_text(exc)}"})
            )

    async def _info(self, _body: bytes) -> bytes:
        described = self.describe()
        shown = described["agents"][:_MOST_DESCRIBED]
        while len(body := to_json(described | {"agents": shown})) > self.connection.max_payload and shown:
            shown = shown[: len(shown) // 2]
        return body


async def _do_nothing() -> None:
    return
