"""openagentmesh: agents as typed async functions, found and called by name over NATS."""

from openagentmesh.mesh.mesh import AgentMesh
from openagentmesh.protocol.contract import AgentContract, AgentSpec, CatalogEntry
from openagentmesh.protocol.errors import (
    AgentDied,
    Cancelled,
    ChunkSequenceError,
    ConnectionDenied,
    ConnectionFailed,
    HandlerError,
    InvalidAgent,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
    Overloaded,
    PayloadTooLarge,
)
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.runtime.host import Host
from openagentmesh.serving.call import Call, Endpoint, current_call

__all__ = [
    "AgentContract",
    "AgentDied",
    "AgentMesh",
    "AgentSpec",
    "Call",
    "Cancelled",
    "CatalogEntry",
    "ChunkSequenceError",
    "ConnectionDenied",
    "ConnectionFailed",
    "DeathNotice",
    "Endpoint",
    "HandlerError",
    "Host",
    "InvalidAgent",
    "InvalidInput",
    "InvocationMismatch",
    "MeshError",
    "MeshTimeout",
    "NotAvailable",
    "NotFound",
    "Overloaded",
    "PayloadTooLarge",
    "current_call",
]
