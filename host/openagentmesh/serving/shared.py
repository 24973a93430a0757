"""What all routes of a node share."""

from dataclasses import dataclass

from openagentmesh.bus.buckets import Buckets
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox
from openagentmesh.serving.eventlog import EventLog
from openagentmesh.serving.outgoing import Border


@dataclass(slots=True, frozen=True)
class Shared:
    """What all routes of a node share."""

    bus: Bus
    inbox: Inbox
    buckets: Buckets
    events: EventLog
    instance_id: str
    border: Border
