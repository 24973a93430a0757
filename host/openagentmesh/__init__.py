"""openagentmesh: agents as typed async functions, found and called by name over NATS."""

from openagentmesh.mesh.mesh import AgentMesh
from openagentmesh.protocol.artifacts import Artifact
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
    KVConflict,
    KVKeyExists,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    Unauthenticated,
)
from openagentmesh.protocol.messages import (
    DeathNotice,
    KVEntry,
    LogEvent,
    MeshMessage,
    ObserveConfig,
    Usage,
)
from openagentmesh.runtime.hooks import hookimpl
from openagentmesh.runtime.host import Host
from openagentmesh.serving.call import Call, Endpoint, current_call, report_usage
from openagentmesh.serving.sources import (
    Condition,
    KVCondition,
    KVSource,
    SubjectCondition,
    SubjectSource,
)

__all__ = [
    "AgentContract",
    "AgentDied",
    "AgentMesh",
    "AgentSpec",
    "Artifact",
    "Call",
    "Cancelled",
    "CatalogEntry",
    "ChunkSequenceError",
    "Condition",
    "ConnectionDenied",
    "ConnectionFailed",
    "DeathNotice",
    "Endpoint",
    "HandlerError",
    "Host",
    "InvalidAgent",
    "InvalidInput",
    "InvocationMismatch",
    "KVCondition",
    "KVConflict",
    "KVEntry",
    "KVKeyExists",
    "KVSource",
    "LogEvent",
    "MeshError",
    "MeshMessage",
    "MeshTimeout",
    "NotAvailable",
    "NotFound",
    "ObserveConfig",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "SubjectCondition",
    "SubjectSource",
    "Unauthenticated",
    "Usage",
    "current_call",
    "hookimpl",
    "report_usage",
]
