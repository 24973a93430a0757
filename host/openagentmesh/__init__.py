"""openagentmesh: agents as typed async functions, found and called by name over NATS."""

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Call, Caller, Endpoint, Middleware, current_call, report_usage
from openagentmesh.agent.client_middleware import ClientMiddleware, Outgoing
from openagentmesh.agent.sources import (
    Condition,
    KVCondition,
    KVSource,
    SubjectCondition,
    SubjectSource,
)
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.hooks.specs import Instance, Redactor, hookimpl
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
    KVConflict,
    KVKeyExists,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    PluginFailed,
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
from openagentmesh.protocol.objects import Artifact
from openagentmesh.runtime.host import Host

__all__ = [
    "Agent",
    "AgentContract",
    "AgentDied",
    "AgentMesh",
    "AgentSpec",
    "Artifact",
    "Call",
    "Caller",
    "Cancelled",
    "CatalogEntry",
    "ChunkSequenceError",
    "ClientMiddleware",
    "Condition",
    "ConnectionDenied",
    "ConnectionFailed",
    "DeathNotice",
    "Endpoint",
    "HandlerError",
    "Host",
    "Instance",
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
    "Middleware",
    "NotAvailable",
    "NotFound",
    "ObserveConfig",
    "Outcome",
    "Outgoing",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "PluginFailed",
    "Redactor",
    "SubjectCondition",
    "SubjectSource",
    "Unauthenticated",
    "Usage",
    "current_call",
    "hookimpl",
    "report_usage",
]
