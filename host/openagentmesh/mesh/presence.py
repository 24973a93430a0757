"""Who is alive: the instance record and death notices (protocol §3, §9)."""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json, to_json

from openagentmesh.bus.buckets import Buckets
from openagentmesh.bus.connection import Bus
from openagentmesh.protocol import subjects
from openagentmesh.protocol.messages import DeathNotice

log = logging.getLogger(__name__)


class Presence:
    """This instance's record; `about` is what it tells of itself besides its agents."""

    def __init__(self, bus: Bus, buckets: Buckets, instance_id: str, about: dict[str, Any]) -> None:
        self._bus = bus
        self._buckets = buckets
        self._instance_id = instance_id
        self._about = about
        self._agents: set[str] = set()

    async def announce(self, agents: Iterable[str]) -> None:
        """Say that this instance serves these agents as well."""
        self._agents |= set(agents)
        await self.restore()

    async def restore(self) -> None:
        """Write the record again."""
        if self._agents or self._about:
            record = self._about | {"agents": sorted(self._agents)}
            await self._buckets.put(subjects.INSTANCES_BUCKET, self._instance_id, to_json(record))

    async def withdraw(self) -> set[str]:
        """Delete the record; returns those of its agents that no other instance serves."""
        if not self._agents and not self._about:
            return set()
        await self._buckets.delete(subjects.INSTANCES_BUCKET, self._instance_id)
        others = await instances(self._buckets)
        return self._agents - {name for record in others.values() for name in record["agents"]}

    async def notify_deaths(self, agents: Iterable[str]) -> None:
        """Tell everyone that the last instance of these agents stops (clean stop)."""
        now = datetime.now(UTC).isoformat()
        for name in sorted(agents):
            notice = DeathNotice(
                agent=name, reason="graceful_shutdown", detected_at=now, instance_id=self._instance_id
            )
            await self._bus.publish(subjects.death(name), notice.model_dump_json().encode())


async def instances(buckets: Buckets) -> dict[str, dict[str, Any]]:
    """All instance records by instance id; what is no record is left out."""
    found = {}
    for instance_id, value in (await buckets.read(subjects.INSTANCES_BUCKET)).items():
        try:
            record = from_json(value)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("agents"), list):
            found[instance_id] = record
    return found
