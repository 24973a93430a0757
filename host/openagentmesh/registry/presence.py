"""Instance records, death notices, and the removal of dead instances (protocol §9)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import to_json

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError
from openagentmesh.protocol.status import InstanceRecord
from openagentmesh.registry.liveness import DeathReason, death_notice, is_dead
from openagentmesh.transport.backoff import jitter
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets

log = logging.getLogger(__name__)

Records = dict[str, InstanceRecord]
RemoveAgents = Callable[[set[str]], Awaitable[set[str]]]
# How often each instance pings its neighbour.
HEARTBEAT_S: Final = 3.0


class Presence:
    """This instance's record, which has `about` and the agents, and the monitoring of other instances."""

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
        self._about = about
        self._agents: set[str] = set()
        self._has_record = False

    async def announce(self, agents: Iterable[str]) -> None:
        """Add agents to the record."""
        self._agents |= set(agents)
        self._has_record = True
        await self.restore()

    async def restore(self) -> None:
        """Write the record, if there was one."""
        if self._has_record:
            # Instances without this key do not answer pings.
            record = self._about | {"answers_pings": True, "agents": sorted(self._agents)}
            await self._buckets.put(subjects.INSTANCES_BUCKET, self._instance_id, to_json(record))

    async def remove_agents(self, agents: Iterable[str]) -> set[str]:
        """Remove agents from the record; returns those that no other record lists."""
        self._agents -= set(agents)
        await self.restore()
        return set(agents) - await self.served_elsewhere()

    async def delete_record(self) -> set[str]:
        """Delete the record; returns those of its agents that no other record lists."""
        if not self._has_record:
            return set()
        self._has_record = False
        await self._buckets.delete_all(subjects.INSTANCES_BUCKET, [self._instance_id])
        return self._agents - await self.served_elsewhere()

    async def served_elsewhere(self) -> set[str]:
        """The agents that other records list."""
        records = await read_records(self._buckets)
        records.pop(self._instance_id, None)
        return _agents_of(records)

    async def notify_deaths(self, agents: Iterable[str], instance_id: str, reason: DeathReason) -> None:
        """Publish death notices: the last instance of these agents has stopped or died."""
        for name in sorted(agents):
            notice = death_notice(name, instance_id, reason)
            await self._connection.publish(subjects.death(name), notice.model_dump_json().encode())

    async def monitor_others(self, remove_agents: RemoveAgents) -> None:
        """Remove instances that died without deleting their record; runs until cancelled.

        First all records are checked, then each instance pings the next one in the order of their ids.
        `remove_agents` gets agents that no record lists any more, removes those that are not served from
        the registry, and returns them.
        """
        suspects: set[str] = set()
        is_first = True
        while True:
            await asyncio.sleep(HEARTBEAT_S * jitter(0.8, 1.2))
            if not self._connection.connected:
                continue
            try:
                records = await read_records(self._buckets)
                checked = set(records) if is_first else suspects | self._neighbour(records)
                is_first = False
                # A disconnected instance may reconnect, so it must be found dead twice in a row.
                dead = await self._dead({key: records[key] for key in checked if key in records})
                for instance_id in dead & suspects:
                    await self._remove(instance_id, records, remove_agents)
                suspects = dead
            except MeshError as exc:
                log.debug("other instances could not be checked: %s", exc)

    def _neighbour(self, records: Records) -> set[str]:
        # Instances that do not answer pings must not hide those behind them.
        others = sorted({key for key in records if records[key].answers_pings} - {self._instance_id})
        following = [key for key in others if key > self._instance_id]
        return set((following or others)[:1])

    async def _dead(self, records: Records) -> set[str]:
        """The instances without a subscription on their ping subject."""
        pinged = [key for key, record in records.items() if record.answers_pings and key != self._instance_id]
        results = await asyncio.gather(*[is_dead(self._inbox, key) for key in pinged])
        return {key for key, dead in zip(pinged, results, strict=True) if dead}

    async def _remove(self, instance_id: str, records: Records, remove_agents: RemoveAgents) -> None:
        record = records.pop(instance_id)
        await self._buckets.delete_all(subjects.INSTANCES_BUCKET, [instance_id])
        unlisted = set(record.agents) - _agents_of(records)
        log.warning("instance died: %s; agents without an instance: %d", instance_id[:8], len(unlisted))
        await self.notify_deaths(await remove_agents(unlisted), instance_id, "disconnect")


async def read_records(buckets: KVBuckets) -> Records:
    """All instance records by instance id; malformed ones are left out."""
    found = {}
    for instance_id, value in (await buckets.read_all(subjects.INSTANCES_BUCKET)).items():
        try:
            found[instance_id] = InstanceRecord.model_validate_json(value)
        except ValidationError:
            log.debug("instance record '%s' is malformed: %.100r", instance_id, value)
    return found


def _agents_of(records: Records) -> set[str]:
    return {name for record in records.values() for name in record.agents}
