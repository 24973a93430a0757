"""One participant: a connection, the agents it serves, and what it knows about other participants."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, Literal

from pydantic_core import to_json

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.client_middleware import ClientMiddlewares
from openagentmesh.agent.threads import pool
from openagentmesh.client.pending import PendingRequests
from openagentmesh.client.requests import RequestClient
from openagentmesh.client.subscriptions import EventClient
from openagentmesh.hooks.manager import Plugins
from openagentmesh.hooks.specs import Instance
from openagentmesh.mesh.reconciler import Reconciler
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import MeshError, error_text
from openagentmesh.protocol.status import ConnectionStatus, NodeStatus
from openagentmesh.registry.directory import Directory
from openagentmesh.registry.liveness import served_without_record
from openagentmesh.registry.nats_services import NatsServices
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
Control = Callable[[bytes], Awaitable[bytes]]

# More agents do not fit into the reply to `oam status`.
_MAX_AGENTS_IN_STATUS: Final = 1000
# After a peer has removed agents of this node from the registry, they are published again after this delay.
_REPUBLISH_DELAY_S: Final = 0.5


class Node:
    """Serves agents and calls others, over one connection.

    `about` is what the instance record contains besides the agents; `prepare` adds limits and middlewares to
    a declared agent. By `contract_policy` an agent serves, with or without a warning, or is refused when its
    contract is incompatible with that of another live instance.

    Attributes:
        refused: the refused agents, with the reason.
        status: returns the node's state; a host replaces it.
        on_finished: awaited when nothing runs any more, while the connection is still open.
        controls: answer requests to this instance, by the last word of the subject.
    """

    def __init__(  # noqa: PLR0913 - one parameter per choice of its owner
        self,
        target: Target,
        instance_id: str,
        *,
        about: dict[str, Any] | None = None,
        prepare: Callable[[AgentVersion], AgentVersion] = lambda agent: agent,
        plugins: Plugins | None = None,
        middlewares: ClientMiddlewares | None = None,
        contract_policy: ContractPolicy = "warn",
    ) -> None:
        self.plugins = plugins or Plugins()
        middlewares = middlewares or self.plugins.client_middlewares()
        self.instance_id = instance_id
        self.started_at = time.time()
        self.connection = connection = Connection(target, f"oam-host-{instance_id}")
        self.inbox = inbox = Inbox(connection)
        self.buckets = buckets = KVBuckets(connection, inbox)
        self.objects = ObjectStore(connection, inbox)
        self.router = Router(connection, inbox, buckets, instance_id, middlewares)
        self.directory = Directory(buckets)
        self.registry = Registry(buckets, lambda: connection.max_payload)
        self.presence = Presence(connection, inbox, buckets, instance_id, about or {})
        self.services = NatsServices(connection, self.router, instance_id)
        self.pending = PendingRequests(connection, inbox, self.directory, self.own)
        self.requests = RequestClient(connection, inbox, self.pending, instance_id, middlewares, self.router)
        self.events = EventClient(connection, self.directory, instance_id, self.own, middlewares)
        self.status: Callable[[], NodeStatus] = self.node_status
        self.on_finished: Callable[[], Awaitable[None]] | None = None
        self.controls: dict[str, Control] = {"info": self._info}
        self.refused: dict[str, str] = {}
        self.prepare = prepare
        self.contract_policy = contract_policy
        self.reconciler = Reconciler(self.router, self._serve)
        self._plugins_running = AsyncExitStack()
        self._removed_by_peer = asyncio.Event()
        self._monitoring: list[asyncio.Task[None]] = []
        self._following_levels: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._registering = asyncio.Lock()

    async def start(self, agents: Iterable[AgentVersion] = (), *, is_host: bool = False) -> None:
        """Connect, serve `agents`, which are prepared, and publish their contracts.

        With `is_host` there is an instance record even without agents.

        Raises:
            ConnectionFailed: no server is reachable, or it has no JetStream.
            ConnectionDenied: the server rejects the credentials.
            PluginFailed: a plugin cannot start.
        """
        await self.connection.connect()
        self.connection.restore = self._restore
        self.connection.on_closed = self._on_closed
        try:
            await self.inbox.open()
            await self.pending.open()
            await self.connection.subscribe(subjects.host(self.instance_id, "*"), self._on_control)
            await self.buckets.create_missing()
            await self._plugins_running.enter_async_context(
                self.plugins.lifespan(Instance(self.instance_id, self.status))
            )
            for agent in agents:
                self.reconciler.add(agent)
            self.reconciler.start()
            await self.wait_served()
            if is_host and not len(self.router):
                await self._announce([])
        except BaseException:
            await self._close()
            raise

    def serve(self, agent: AgentVersion) -> None:
        """Serve an agent, in place of the one of the same name; `wait_served` waits for it."""
        self.reconciler.add(self.prepare(agent))

    async def wait_served(self, names: Collection[str] | None = None) -> None:
        """Wait until all agents are served, or these; raises the error that prevents it."""
        await self.reconciler.wait(names)

    def remove(self, names: Collection[str]) -> list[Route]:
        """Serve these agents no longer; returns their routes, for `withdraw`."""
        for name in names:
            self.refused.pop(name, None)
        routes = self.reconciler.remove(names)
        self.plugins.notify_unloaded(self.reconciler.wanted)
        return routes

    async def withdraw(self, routes: Collection[Route], drain_timeout: float) -> None:
        """Close removed routes: unsubscribe, finish what runs, deregister."""
        if not routes:
            return
        await self.reconciler.wait_idle()  # one of them may be about to open
        await asyncio.gather(*[route.close(drain_timeout) for route in routes])
        await retry_forever(
            partial(self._deregister, {route.agent.name for route in routes}), "deregistering"
        )

    async def _deregister(self, names: set[str]) -> None:
        async with self._registering:
            # An agent may have been declared again meanwhile.
            removed = {name for name in names if self.router.get(name) is None}
            await self._withdraw(removed, await self.presence.remove_agents(removed))

    async def _withdraw(self, names: Collection[str], unlisted: set[str]) -> None:
        """Withdraw the contracts of these agents, and remove those of them that no instance serves."""
        unserved = await self._unserved(unlisted)
        await self.registry.withdraw(names, everywhere=unserved)
        await self.presence.notify_deaths(unserved, self.instance_id, "graceful_shutdown")
        for name in names:
            await self.router.logs.publish("info", name, "agent_deregistered")

    async def _serve(self, names: Collection[str]) -> None:
        await self._check_conflicts(names)
        # Agents may be replaced or removed during each await.
        wanted = self.reconciler.wanted
        for name in names:
            if name in wanted and name not in self.refused:
                await self.router.serve(wanted[name])
        await self.connection.flush()  # from here on they can be called
        async with self._registering:
            contracts = [contract for name in names if (contract := self.own(name))]
            await self.registry.publish(contracts)
            await self._announce([contract.name for contract in contracts])
        for contract in contracts:
            data: dict[str, object] = {"version": contract.version}
            await self.router.logs.publish("info", contract.name, "agent_registered", data=data)

    async def _check_conflicts(self, names: Collection[str]) -> None:
        """Warn about, or refuse, agents that other live instances serve with incompatible contracts."""
        for name in names:
            self.refused.pop(name, None)
        if self.contract_policy == "allow":
            return
        # A new version of an agent served here has been compared with its old one.
        new = {name for name in names if self.router.get(name) is None}
        shared = await self.presence.served_elsewhere() & new if new else set()
        wanted = self.reconciler.wanted
        compared = [wanted[name].contract for name in sorted(shared & wanted.keys())]
        for name, changes in (await self.registry.conflicts(compared)).items():
            if name not in wanted:
                continue
            listed = "; ".join(map(str, changes))
            reason = f"contract incompatible with the one of another live instance: {listed}"
            if self.contract_policy == "refuse":
                log.error("%s not served: %s", name, reason)
                self.refused[name] = reason
            else:
                log.warning('%s: %s; serving anyway (contract = "warn")', name, reason)

    async def _announce(self, agents: Iterable[str]) -> None:
        await self.services.open()
        await self.presence.announce(agents)
        if not self._monitoring:
            self.directory.on_change = self._on_registry_change
            self.directory.follow()
            work = (self.presence.monitor_others(self._remove_unserved), self._keep_published())
            self._monitoring = [asyncio.create_task(each) for each in work]
            following = partial(follow_levels, self.buckets, self.router.logs)
            self._following_levels = asyncio.create_task(retry_forever(following, "following log levels"))

    async def _remove_unserved(self, agents: set[str]) -> set[str]:
        """Remove agents of dead instances from the registry, unless they are served; returns them."""
        unserved = await self._unserved(agents)
        await self.registry.withdraw([], everywhere=unserved)
        return unserved

    async def _unserved(self, agents: set[str]) -> set[str]:
        """Which of these agents, which no record lists, no instance without a record serves either."""
        known = [self.own(name) or self.directory.cached(name) for name in agents]
        contracts = [contract for contract in known if contract]
        return agents - await served_without_record(self.connection, self.inbox, contracts)

    async def stop(self, drain_timeout: float) -> None:
        """Leave queue groups, finish what runs while replies still work, deregister, close."""
        await self.reconciler.stop()
        await cancel_and_wait(*self._monitoring)
        await self.services.close()
        try:
            if self.connection.connected and self._monitoring:
                await self.router.drain(drain_timeout)
                names = [route.agent.name for route in self.router]
                await self._withdraw(names, await self.presence.delete_record())
                await self.connection.flush()
        except MeshError as exc:
            log.warning("not deregistered, another instance will do it: %s", exc)
        finally:
            await self._close()

    async def _close(self) -> None:
        await self.reconciler.stop()
        await cancel_and_wait(*self._monitoring, self._following_levels)
        try:
            await self.router.finish(0)
            if self.on_finished is not None:
                await self.on_finished()
            self.plugins.notify_unloaded(())
            await self._plugins_running.aclose()
        finally:
            self.events.fail_all()
            await self.requests.close()
            await self.pending.close()
            await self.directory.close()
            await self.connection.close()

    def own(self, name: str) -> AgentContract | None:
        """The contract of an agent served here."""
        route = self.router.get(name)
        return route.agent.contract if route else None

    def node_status(self) -> NodeStatus:
        """Its state, for `oam status`."""
        connection = self.connection
        return NodeStatus(
            instance_id=self.instance_id,
            started_at=self.started_at,
            agent_count=len(self.router),
            agents=[route.status() for route in self.router],
            refused=self.refused,
            threads=pool.status(),
            connection=ConnectionStatus(
                url=connection.target.display_url,
                server=connection.server.get("version"),
                connected=connection.connected,
                reconnects=connection.reconnects,
                history=list(connection.history),
            ),
        )

    def _on_closed(self) -> None:
        self.buckets.fail_pending()
        self.pending.fail_all()
        self.events.fail_all()

    async def _restore(self) -> None:
        """Restore buckets, contracts, records and watches after a reconnect."""
        await self.buckets.restore()
        await self._republish()
        await self.presence.restore()
        if self._monitoring:
            self.directory.follow()
        self.reconciler.start()
        await self.objects.restore()

    def _on_registry_change(self, name: str, document: bytes | None) -> None:
        if document is None and self.registry.owns(name):
            self._removed_by_peer.set()

    async def _keep_published(self) -> None:
        """Publish contracts again: a stopping replica of the published SDK removes them for all instances."""
        while True:
            await self._removed_by_peer.wait()
            await asyncio.sleep(_REPUBLISH_DELAY_S)  # until the peer has removed everything
            self._removed_by_peer.clear()  # removals from here on are repaired in the next round
            await retry_forever(self._republish, "publishing contracts again")

    async def _republish(self) -> None:
        async with self._registering:  # an agent that is withdrawn meanwhile must not come back
            await self.registry.restore()

    def _on_control(self, message: Message) -> None:
        if message.reply:
            task = asyncio.create_task(self._answer_control(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer_control(self, message: Message) -> None:
        verb = message.subject.rpartition(".")[2]
        try:
            control = self.controls.get(verb)
            body = await control(message.body) if control is not None else b"{}"
            await self.connection.publish(message.reply, body)
        except MeshError as exc:
            log.warning("control request '%s' not answered: %s", verb, exc)
        # The request ends here.
        except Exception as exc:
            log.exception("control request '%s' failed", verb)
            error = to_json({"error": f"{type(exc).__name__}: {error_text(exc)}"})
            await self.connection.publish(message.reply, error)

    async def _info(self, _body: bytes) -> bytes:
        status = self.status()
        agents = status.agents[:_MAX_AGENTS_IN_STATUS]
        while True:
            body = status.model_copy(update={"agents": agents}).model_dump_json().encode()
            if len(body) <= self.connection.max_payload or not agents:
                return body
            agents = agents[: len(agents) // 2]
