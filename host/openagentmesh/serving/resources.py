"""What all routes of a node use."""

from dataclasses import dataclass

from openagentmesh.agent.client_middleware import ClientMiddlewares
from openagentmesh.serving.log_events import LogPublisher
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.kv import KVBuckets


@dataclass(slots=True, frozen=True)
class Resources:
    """The connection, and everything based on it, that all routes of a node share."""

    connection: Connection
    inbox: Inbox
    buckets: KVBuckets
    logs: LogPublisher
    instance_id: str
    middlewares: ClientMiddlewares
