"""Publish and withdraw contracts: a key an agent, one change of the catalog for all of them."""

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
    """The contracts this node has published, and what keeps them published."""

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
        """What callers would notice if these contracts shared requests with the published ones.

        By agent; without those that go together. Requests made for either go to both, so the
        input has to fit both ways.
        """
        ours = {contract.name: contract for contract in contracts}
        published = await self._buckets.read_all(subjects.REGISTRY_BUCKET) if ours else {}
        found = {}
        for name, own in ours.items():
            try:
                theirs = AgentContract.from_document(published[name]) if name in published else own
            except MeshError as exc:
                log.warning("the contract that others published for %s cannot be compared: %s", name, exc)
                continue
            changes = breaking_changes(theirs, own)
            back = [change for change in breaking_changes(own, theirs) if change.what == "input"]
            if changes := changes + [change for change in back if change not in changes]:
                found[name] = changes
        return found

    async def withdraw(self, names: Iterable[str], *, everywhere: Iterable[str]) -> None:
        """Keep `names` published no more; delete those of `everywhere`, which nobody else serves."""
        for name in names:
            self._own.pop(name, None)
            self._entries.pop(name, None)
        gone = set(everywhere)
        await self._buckets.delete_all(subjects.REGISTRY_BUCKET, gone)
        await self._change_catalog({}, gone)

    async def restore(self) -> None:
        """Publish again what is missing, whoever lost it: a new server, or a peer that stopped."""
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
        away = set(added) | set(removed)

        def changed(old: bytes | None) -> bytes | None:
            before = catalog_objects(old)
            kept = [entry for entry in before if entry.get("name") not in away]
            after = kept + [entry.model_dump() for entry in added.values()]
            return self._fitting(after) if after != before else None

        await self._buckets.update(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY, changed)

    def _fitting(self, entries: list[dict[str, Any]]) -> bytes:
        """The key's value, without the newest entries where it would outgrow the server's limit.

        Those stay in the registry, which our readers read as well.
        """
        limit = self._max_payload() - HEADER_RESERVE
        document = encode_catalog(entries)
        kept = len(entries)
        while len(document) > limit:
            kept = min(kept - 1, int(kept * limit / len(document)))
            document = encode_catalog(entries[:kept])
        if kept < len(entries):
            log.info(
                "the catalog's key has room for %d of %d agents; the others are in the registry only",
                kept, len(entries),
            )  # fmt: skip
        return document
