"""Publish and withdraw contracts: one key per agent, one change of the catalog for all of them."""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract, catalog_objects, decode_catalog, encode_catalog
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.schema_diff import Change, breaking_changes
from openagentmesh.transport.kv import HEADER_RESERVE, KVBuckets

log = logging.getLogger(__name__)


class Registry:
    """The contracts that this node has published."""

    def __init__(self, buckets: KVBuckets, max_payload: Callable[[], int]) -> None:
        self._buckets = buckets
        self._max_payload = max_payload
        self._own: dict[str, AgentContract] = {}

    def owns(self, name: str) -> bool:
        """Whether this node has published `name`."""
        return name in self._own

    async def publish(self, contracts: Iterable[AgentContract]) -> None:
        """Publish new and changed contracts; a changed one moves to the end of the catalog."""
        changed = {c.name: c for c in contracts if c.name not in self._own or not c.equals(self._own[c.name])}
        if not changed:
            return
        previous = {name: self._own[name] for name in changed if name in self._own}
        self._remove(changed)
        self._own |= changed  # before it is written: from here on a removal by a peer is noticed
        try:
            await self._put(changed)
            await self._change_catalog(changed.values())
        except BaseException:
            self._remove(changed)
            self._own |= previous
            raise

    async def conflicts(self, contracts: Iterable[AgentContract]) -> dict[str, list[Change]]:
        """The breaking changes between these contracts and the published ones, by agent."""
        own = {contract.name: contract for contract in contracts}
        published = await self._buckets.read_all(subjects.REGISTRY_BUCKET) if own else {}
        found = {name: _conflict(own[name], published[name]) for name in own if name in published}
        return {name: changes for name, changes in found.items() if changes}

    async def withdraw(self, names: Iterable[str], *, everywhere: Iterable[str]) -> None:
        """Keep `names` published no longer; delete `everywhere`, which no instance serves."""
        self._remove(names)
        unserved = set(everywhere)
        await self._buckets.delete_all(subjects.REGISTRY_BUCKET, unserved)
        await self._change_catalog([], unserved)

    async def restore(self) -> None:
        """Publish missing contracts again: a new server has none, and a peer may have removed some."""
        if not self._own:
            return
        found = await self._buckets.read_all(subjects.REGISTRY_BUCKET)
        await self._put({name: own for name, own in self._own.items() if name not in found})
        catalog = decode_catalog(await self._buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY))
        listed = {entry.name for entry in catalog}
        if unlisted := [own for name, own in self._own.items() if name not in listed]:
            await self._change_catalog(unlisted)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._own.pop(name, None)

    async def _put(self, contracts: dict[str, AgentContract]) -> None:
        documents = {name: contract.to_registry_json().encode() for name, contract in contracts.items()}
        await self._buckets.put_all(subjects.REGISTRY_BUCKET, documents)

    async def _change_catalog(self, added: Collection[AgentContract], removed: Iterable[str] = ()) -> None:
        replaced = {contract.name for contract in added} | set(removed)
        entries = [contract.to_catalog_entry().model_dump() for contract in added]

        def update(old: bytes | None) -> bytes | None:
            before = catalog_objects(old)
            after = [entry for entry in before if entry.get("name") not in replaced] + entries
            return self._encode_catalog(after) if after != before else None

        await self._buckets.update(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY, update)

    def _encode_catalog(self, entries: list[dict[str, Any]]) -> bytes:
        """The value of the catalog's key, without the last entries when it would exceed the size limit."""
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
    # Instances share a queue group and get each other's requests: inputs must be compatible both ways.
    changes = breaking_changes(published, own)
    reverse = [change for change in breaking_changes(own, published) if change.what == "input"]
    return changes + [change for change in reverse if change not in changes]
