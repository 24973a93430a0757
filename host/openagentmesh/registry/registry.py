"""Publish and withdraw contracts: one key per agent, one change of the catalog for all of them."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import (
    AgentContract,
    CatalogEntry,
    catalog_objects,
    decode_catalog,
    encode_catalog,
)
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.schema_diff import Change, breaking_changes
from openagentmesh.transport.kv import HEADER_RESERVE, KVBuckets

log = logging.getLogger(__name__)


class Registry:
    """The contracts that this node has published."""

    def __init__(self, buckets: KVBuckets, max_payload: Callable[[], int]) -> None:
        self._buckets = buckets
        self._max_payload = max_payload
        self._own: dict[str, bytes] = {}
        self._entries: dict[str, CatalogEntry] = {}

    def owns(self, name: str) -> bool:
        """Whether this node has published `name`."""
        return name in self._own

    async def publish(self, contracts: Iterable[AgentContract]) -> None:
        """Publish these contracts; one published before is replaced and moves to the end."""
        documents = {c.name: c.to_registry_json().encode() for c in contracts}
        entries = {c.name: c.to_catalog_entry() for c in contracts}
        for name in documents:
            self._entries.pop(name, None)
        self._own |= documents
        self._entries |= entries
        await self._buckets.put_all(subjects.REGISTRY_BUCKET, documents)
        await self._change_catalog(entries)

    async def conflicts(self, contracts: Iterable[AgentContract]) -> dict[str, list[Change]]:
        """The breaking changes between these contracts and the published ones, by agent.

        Instances that share a queue group get each other's requests, so the input must be compatible both
        ways.
        """
        own = {contract.name: contract for contract in contracts}
        published = await self._buckets.read_all(subjects.REGISTRY_BUCKET) if own else {}
        found = {}
        for name, contract in own.items():
            if name in published and (changes := _conflict(contract, published[name])):
                found[name] = changes
        return found

    async def withdraw(self, names: Iterable[str], *, everywhere: Iterable[str]) -> None:
        """Keep `names` published no longer; delete those of `everywhere`, which no instance serves."""
        for name in names:
            self._own.pop(name, None)
            self._entries.pop(name, None)
        gone = set(everywhere)
        await self._buckets.delete_all(subjects.REGISTRY_BUCKET, gone)
        await self._change_catalog({}, gone)

    async def restore(self) -> None:
        """Publish missing contracts again, after the loss of a server or the stop of a peer."""
        if not self._own:
            return
        found = await self._buckets.read_all(subjects.REGISTRY_BUCKET)
        missing = {name: own for name, own in self._own.items() if name not in found}
        await self._buckets.put_all(subjects.REGISTRY_BUCKET, missing)
        listed = decode_catalog(await self._buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY))
        names = {entry.name for entry in listed}
        unlisted = {name: entry for name, entry in self._entries.items() if name not in names}
        if unlisted:
            await self._change_catalog(unlisted)

    async def _change_catalog(self, added: dict[str, CatalogEntry], removed: Iterable[str] = ()) -> None:
        replaced = set(added) | set(removed)

        def update(old: bytes | None) -> bytes | None:
            before = catalog_objects(old)
            kept = [entry for entry in before if entry.get("name") not in replaced]
            after = kept + [entry.model_dump() for entry in added.values()]
            return self._encode_catalog(after) if after != before else None

        await self._buckets.update(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY, update)

    def _encode_catalog(self, entries: list[dict[str, Any]]) -> bytes:
        """The value of the catalog's key, without the last entries when it would exceed the size limit.

        Those stay in the registry, which our own readers read as well.
        """
        limit = self._max_payload() - HEADER_RESERVE
        document = encode_catalog(entries)
        kept = len(entries)
        while len(document) > limit:
            kept = min(kept - 1, int(kept * limit / len(document)))
            document = encode_catalog(entries[:kept])
        if kept < len(entries):
            log.info(
                "the catalog's key has space for %d of %d agents; the others are in the registry only",
                kept, len(entries),
            )  # fmt: skip
        return document


def _conflict(own: AgentContract, document: bytes) -> list[Change]:
    try:
        published = AgentContract.from_document(document)
    except MeshError as exc:
        log.warning("the published contract of %s cannot be compared: %s", own.name, exc)
        return []
    changes = breaking_changes(published, own)
    reverse = [change for change in breaking_changes(own, published) if change.what == "input"]
    return changes + [change for change in reverse if change not in changes]
