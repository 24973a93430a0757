"""Who is alive: the instance record, death notices, and clearing up after the dead (protocol §9)."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic_core import from_json, to_json

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.registry.liveness import is_gone
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets

log = logging.getLogger(__name__)

Records = dict[str, dict[str, Any]]
# How often each instance asks its neighbour whether it lives, in seconds.
HEARTBEAT: Final = 3.0
# Only instances that say so in their record answer pings; peers of other makes do not.
_ANSWERS_PINGS: Final = "answers_pings"


class Presence:
    """This instance's record, and an eye on the others'.

    Args:
        connection: the connection.
        inbox: its reply subjects.
        buckets: its KV buckets.
        instance_id: this instance.
        about: what the record tells besides the agents.

    """

    def __init__(
        self,
        connection: Connection,
        inbox: Inbox,
        buckets: KVBuckets,
        instance_id: str,
        about: dict[str, Any],
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._buckets = buckets
        self._instance_id = instance_id
        self._about = about | {_ANSWERS_PINGS: True}
        self._agents: set[str] = set()
        self._recorded = False

    async def announce(self, agents: Iterable[str]) -> None:
        """Say that this instance serves these agents as well."""
        self._agents |= set(agents)
        self._recorded = True
        await self.restore()

    async def restore(self) -> None:
        """Write the record again, if there was one."""
        if self._recorded:
            record = self._about | {"agents": sorted(self._agents)}
            await self._buckets.put(subjects.INSTANCES_BUCKET, self._instance_id, to_json(record))

    async def renounce(self, agents: Iterable[str]) -> set[str]:
        """Serve these agents no more; returns those of them that no other instance serves."""
        self._agents -= set(agents)
        await self.restore()
        return set(agents) - await self.served_elsewhere()

    async def withdraw(self) -> set[str]:
        """Delete the record; returns those of its agents that no other instance serves."""
        if not self._recorded:
            return set()
        self._recorded = False
        await self._buckets.delete_all(subjects.INSTANCES_BUCKET, [self._instance_id])
        return self._agents - _served(await instances(self._buckets))

    async def served_elsewhere(self) -> set[str]:
        """The agents that other instances serve now."""
        records = await instances(self._buckets)
        records.pop(self._instance_id, None)
        return _served(records)

    async def notify_deaths(
        self,
        agents: Iterable[str],
        instance_id: str,
        reason: Literal["graceful_shutdown", "disconnect"],
    ) -> None:
        """Tell everyone that the last instance of these agents is gone."""
        now = datetime.now(UTC).isoformat()
        for name in sorted(agents):
            notice = DeathNotice(agent=name, reason=reason, detected_at=now, instance_id=instance_id)
            await self._connection.publish(subjects.death(name), notice.model_dump_json().encode())

    async def watch_over(self, clear: Callable[[set[str]], Awaitable[set[str]]]) -> None:
        """Clear up after instances that died without a word; runs until cancelled.

        At first all records are looked at, then each instance looks after the next one in
        the order of their ids. `clear` is given the agents that are in no record any more,
        and returns those that nobody serves.
        """
        suspects: set[str] = set()
        newcomer = True
        while True:
            await asyncio.sleep(HEARTBEAT * random.uniform(0.8, 1.2))  # noqa: S311 - no secret depends on it
            if not self._connection.connected:
                continue
            try:
                records = await instances(self._buckets)
                watched = set(records) if newcomer else suspects | self._neighbour(records)
                newcomer = False
                # Twice in a row: a peer that lost its connection for a moment comes back.
                silent = await self._silent({key: records[key] for key in watched if key in records})
                for instance_id in silent & suspects:
                    await self._bury(instance_id, records, clear)
                suspects = silent
            except MeshError as exc:
                log.debug("looking after the others: %s", exc)

    def _neighbour(self, records: Records) -> set[str]:
        others = sorted(records.keys() - {self._instance_id})
        after = [key for key in others if key > self._instance_id]
        return set((after or others)[:1])

    async def _silent(self, records: Records) -> set[str]:
        """Those of these instances whose ping subject nobody listens to."""
        asked = [
            key for key, record in records.items() if record.get(_ANSWERS_PINGS) and key != self._instance_id
        ]
        gone = await asyncio.gather(*[is_gone(self._inbox, key) for key in asked])
        return {key for key, nobody in zip(asked, gone, strict=True) if nobody}

    async def _bury(
        self, instance_id: str, records: Records, clear: Callable[[set[str]], Awaitable[set[str]]]
    ) -> None:
        record = records.pop(instance_id)
        await self._buckets.delete_all(subjects.INSTANCES_BUCKET, [instance_id])
        lonely = set(record["agents"]) - _served(records)
        log.warning("instance %s died; nobody serves %d of its agents now", instance_id[:8], len(lonely))
        await self.notify_deaths(await clear(lonely), instance_id, "disconnect")


async def instances(buckets: KVBuckets) -> Records:
    """All instance records by instance id; what is no record is left out."""
    found = {}
    for instance_id, value in (await buckets.read_all(subjects.INSTANCES_BUCKET)).items():
        try:
            record = from_json(value)
        except ValueError:
            continue
        agents = record.get("agents") if isinstance(record, dict) else None
        if isinstance(agents, list):
            # They become parts of subjects and keys, and who wrote them may be anybody.
            record["agents"] = [name for name in agents if subjects.is_name(name)]
            found[instance_id] = record
    return found


def _served(records: Records) -> set[str]:
    return {name for record in records.values() for name in record["agents"]}
