"""What is known of the others: catalog, contract, discover (protocol §3, §4)."""

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

# A copy that is complete and hears nothing for this long, in seconds, is as new as it gets.
_STANDSTILL: Final = 1.0


class Directory:
    """A live copy of the registry, begun when it is first read.

    The catalog's single key gives the order; the registry, one key an agent, gives what the
    key has no room for. `changed` is called with the name of each agent whose registry key
    changes, None as its document when it was deleted.
    """

    def __init__(self, buckets: KVBuckets) -> None:
        self.changed: Callable[[str, bytes | None], None] = lambda _name, _document: None
        self._buckets = buckets
        self._documents: dict[str, bytes] = {}
        self._revision = 0
        self._current = False
        self._progress = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Begin to follow the registry; more calls do nothing."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Follow no more."""
        await cancel_and_wait(self._following)

    async def catalog(self) -> list[CatalogEntry]:
        """All agents, in the catalog's order, then those it has no room for."""
        listed = decode_catalog(await self._buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY))
        await self._catch_up()
        names = {entry.name for entry in listed}
        missing = [self.known(name) for name in self._documents if name not in names]
        return listed + [contract.to_catalog_entry() for contract in missing if contract]

    async def discover(self) -> list[AgentContract]:
        """The contracts of all agents, in the catalog's order."""
        contracts = [self.known(entry.name) for entry in await self.catalog()]
        return [contract for contract in contracts if contract]

    async def contract(self, name: str) -> AgentContract:
        """One agent's contract.

        Raises:
            NotFound: no agent has this name.

        """
        contract = await self.find(name)
        if contract is None:
            raise NotFound(f"Agent '{name}' is not in the catalog", agent=name)
        return contract

    async def find(self, name: str) -> AgentContract | None:
        """One agent's contract as it is now, or None."""
        if subjects.invalid_name(name):
            return None
        document = await self._buckets.get(subjects.REGISTRY_BUCKET, name)
        return AgentContract.from_document(document) if document else None

    async def _catch_up(self) -> None:
        """Wait until the copy has everything that was written before now."""
        self.follow()
        newest = await self._buckets.last_revision(subjects.REGISTRY_BUCKET)
        while self._revision < newest or not self._current:
            self._progress.clear()
            try:
                async with asyncio.timeout(_STANDSTILL):
                    await self._progress.wait()
            except TimeoutError:
                if self._current:  # a revision that was purged never arrives
                    self._revision = max(self._revision, newest)
                    return
                if self._following is None or self._following.done():
                    raise ConnectionFailed("The registry cannot be followed; the log says why.") from None

    async def _follow(self) -> None:
        try:
            await self._copy()
        except MeshError as exc:
            log.warning("the registry is not followed any more: %s", exc)

    async def _copy(self) -> None:
        loading: dict[str, bytes] = self._documents
        async with aclosing(self._buckets.watch(subjects.REGISTRY_BUCKET)) as entries:
            async for entry in entries:
                if isinstance(entry, Entry):
                    document = None if entry.operation else entry.value
                    if document:
                        loading[entry.key] = document
                    else:
                        loading.pop(entry.key, None)
                    self._revision = max(self._revision, entry.revision or 0)
                    self.changed(entry.key, document)
                elif entry == "reset":
                    loading, self._revision, self._current = {}, 0, False
                else:
                    self._documents, self._current = loading, True
                self._progress.set()

    def known(self, name: str) -> AgentContract | None:
        """One agent's contract as the copy has it now, or None."""
        document = self._documents.get(name)
        if document is None:
            return None
        try:
            return AgentContract.from_document(document)
        except MeshError as exc:
            log.warning("registry key '%s': %s", name, exc)
            return None
