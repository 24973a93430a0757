"""openagentmesh: agents as typed async functions, discovered and called by name over NATS.

Importing the package starts nothing; `Host` is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from openagentmesh.agent.agent import Agent, RecordedRequest, Redactor
from openagentmesh.agent.call import Call, Caller, Endpoint, Middleware, current_call, report_usage
from openagentmesh.agent.client_middleware import ClientMiddleware, ClientOperation
from openagentmesh.agent.sources import Condition, KVCondition, KVSource, SubjectCondition, SubjectSource
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.hooks.specs import Instance, hookimpl
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
    InvalidReply,
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
from openagentmesh.protocol.messages import DeathNotice, KVEntry, LogEvent, MeshMessage, ObserveConfig, Usage
from openagentmesh.protocol.objects import Artifact
from openagentmesh.protocol.status import HostStatus, NodeStatus

if TYPE_CHECKING:
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
    "ClientOperation",
    "Condition",
    "ConnectionDenied",
    "ConnectionFailed",
    "DeathNotice",
    "Endpoint",
    "HandlerError",
    "Host",
    "HostStatus",
    "Instance",
    "InvalidAgent",
    "InvalidInput",
    "InvalidReply",
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
    "NodeStatus",
    "NotAvailable",
    "NotFound",
    "ObserveConfig",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "PluginFailed",
    "RecordedRequest",
    "Redactor",
    "ReloadResult",
    "SubjectCondition",
    "SubjectSource",
    "Unauthenticated",
    "Usage",
    "current_call",
    "hookimpl",
    "report_usage",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    if name == "Host":
        from openagentmesh.runtime.host import Host  # noqa: PLC0415 - most programs use no host

        return Host
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
