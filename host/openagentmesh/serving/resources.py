"""What all routes of a node share."""

from dataclasses import dataclass

from openagentmesh.agent.client_middleware import Border
from openagentmesh.serving.log_events import EventLog
from openagentmesh.transport.connection import Bus
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import Buckets


@dataclass(slots=True, frozen=True)
class Shared:
    """What all routes of a node share."""

    bus: Bus
    inbox: Inbox
    buckets: Buckets
    events: EventLog
    instance_id: str
    border: Border
