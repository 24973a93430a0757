"""What all routes of a node share."""

from dataclasses import dataclass

from openagentmesh.agent.client_middleware import Border
from openagentmesh.serving.log_events import EventLog
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets


@dataclass(slots=True, frozen=True)
class Shared:
    """What all routes of a node share."""

    connection: Connection
    inbox: Inbox
    buckets: KVBuckets
    events: EventLog
    instance_id: str
    border: Border
