"""The agents of the mesh: catalog, contract, discover (protocol §3, §4)."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract, CatalogEntry, decode_catalog
from openagentmesh.protocol.errors import ConnectionFailed, MeshError, NotFound
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.kv_watch import Entry
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

# The contract of an agent that this node serves, by name; None for other agents.
OwnContracts = Callable[[str], AgentContract | None]
# A complete copy that receives nothing for this long is up to date: purged revisions never arrive.
_CATCH_UP_TIMEOUT_S: Final = 1.0


class Directory:
    """A live copy of the registry, started when it is first read.

    The catalog's single key gives the order; the registry, one key per agent, has the agents for which
    that key has no space.
    """

    def __init__(self, buckets: KVBuckets) -> None:
        # Called with an agent's name and its document, None when it was deleted.
        self.on_change: Callable[[str, bytes | None], None] = lambda _name, _document: None
        self._buckets = buckets
        self._documents: dict[str, bytes] = {}
        self._revision = 0
        self._is_complete = False
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Start to follow the registry, once."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following."""
        await cancel_and_wait(self._following)

    async def catalog(self) -> list[CatalogEntry]:
        """All agents, in the catalog's order, then those for which it has no space."""
        listed = decode_catalog(await self._buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY))
        await self._catch_up()
        names = {entry.name for entry in listed}
        missing = [self.cached(name) for name in self._documents if name not in names]
        return listed + [contract.to_catalog_entry() for contract in missing if contract]

    async def discover(self) -> list[AgentContract]:
        """The contracts of all agents, in the catalog's order."""
        contracts = [self.cached(entry.name) for entry in await self.catalog()]
        return [contract for contract in contracts if contract]

    async def contract(self, name: str) -> AgentContract:
        """One agent's contract; raises NotFound when there is none."""
        contract = await self.find(name)
        if contract is None:
            raise not_found(name)
        return contract

    async def find(self, name: str) -> AgentContract | None:
        """One agent's contract, read from the server; None when there is none."""
        if subjects.invalid_name(name):
            return None
        document = await self._buckets.get(subjects.REGISTRY_BUCKET, name)
        return AgentContract.from_document(document) if document else None

    def cached(self, name: str) -> AgentContract | None:
        """One agent's contract, from the copy; None when there is none."""
        document = self._documents.get(name)
        if document is None:
            return None
        try:
            return AgentContract.from_document(document)
        except MeshError as exc:
            log.warning("registry key '%s': %s", name, exc)
            return None

    async def _catch_up(self) -> None:
        """Wait until the copy contains everything that was written before now."""
        self.follow()
        newest = await self._buckets.last_revision(subjects.REGISTRY_BUCKET)
        while self._revision < newest or not self._is_complete:
            self._changed.clear()
            try:
                async with asyncio.timeout(_CATCH_UP_TIMEOUT_S):
                    await self._changed.wait()
            except TimeoutError:
                if self._is_complete:
                    self._revision = max(self._revision, newest)
                    return
                if self._following is None or self._following.done():
                    raise ConnectionFailed("The registry cannot be followed; see the log.") from None

    async def _follow(self) -> None:
        try:
            await self._copy()
        except MeshError as exc:
            log.warning("the registry is not followed any more: %s", exc)

    async def _copy(self) -> None:
        loading = self._documents
        async with aclosing(self._buckets.watch(subjects.REGISTRY_BUCKET)) as entries:
            async for entry in entries:
                if isinstance(entry, Entry):
                    document = None if entry.operation else entry.value
                    if document:
                        loading[entry.key] = document
                    else:
                        loading.pop(entry.key, None)
                    self._revision = max(self._revision, entry.revision or 0)
                    self.on_change(entry.key, document)
                elif entry == "reset":
                    loading, self._revision, self._is_complete = {}, 0, False
                else:
                    self._documents, self._is_complete = loading, True
                self._changed.set()


def not_found(name: str) -> NotFound:
    """The error for a name without an agent."""
    return NotFound(f"Agent '{name}' is not in the catalog", agent=name)
