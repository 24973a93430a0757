"""The error tree: one constructor, codes on the wire, copies that keep everything."""

import copy
import pickle
from typing import Any

import pytest
from openagentmesh import (
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

ON_THE_WIRE = [
    ("mesh_error", MeshError),
    ("invalid_input", InvalidInput),
    ("handler_error", HandlerError),
    ("invocation_mismatch", InvocationMismatch),
    ("not_found", NotFound),
    ("not_available", NotAvailable),
    ("timeout", MeshTimeout),
    ("agent_died", AgentDied),
    ("chunk_sequence_error", ChunkSequenceError),
    ("connection_failed", ConnectionFailed),
    ("connection_denied", ConnectionDenied),
    ("overloaded", Overloaded),
    ("payload_too_large", PayloadTooLarge),
    ("cancelled", Cancelled),
]


@pytest.mark.parametrize(("code", "kind"), ON_THE_WIRE)
def test_a_code_and_its_class_belong_together(code: str, kind: type[MeshError]) -> None:
    """Each class writes its own code, and that code is read as this very class."""
    assert code == kind("it broke").code
    read = MeshError.from_code(code, "it broke", "a", "r", {"k": 1})
    assert (kind, code, "it broke", "a", "r", {"k": 1}) == (type(read), *read.to_dict().values())


@pytest.mark.parametrize("code", ["quota_used_up", "invalid_agent", "", "Not_Found"])
def test_an_unknown_code_is_a_mesh_error_that_keeps_it(code: str) -> None:
    """A code of somebody else's is no reason to lose it; what is only ours is never read as ours."""
    error = MeshError.from_code(code, "m", "", "", {})
    assert (MeshError, code or "mesh_error", "m") == (type(error), error.code, error.message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MeshError("it broke"), "mesh_error", "it broke"),
        (NotFound("no 'x'"), "not_found", "no 'x'"),
        (NotFound(message="no 'x'"), "not_found", "no 'x'"),
        (NotFound("no 'x'", agent="x"), "not_found", "no 'x'"),
        (MeshError("quota_used_up", "Wait"), "quota_used_up", "Wait"),
        (HandlerError("quota_used_up", "Wait"), "quota_used_up", "Wait"),
        (MeshError("", "Wait"), "mesh_error", "Wait"),
        (MeshError("code", ""), "code", ""),
        (MeshError(), "mesh_error", ""),
    ],
)
def test_one_text_is_the_message_two_are_code_and_message(error: MeshError, code: str, message: str) -> None:
    """The constructor's two shapes, for every class; `str` is the message."""
    assert (code, message, message) == (error.code, error.message, str(error))


@pytest.mark.parametrize(
    "error",
    [
        MeshError("quota_used_up", "Wait", "a", "r", {"until": [1, None]}),
        NotFound("no 'x'", agent="x"),
        Overloaded("later", details={"retry_after_ms": 5}),
        MeshError("only", ""),
        InvalidAgent("cannot"),
    ],
)
def test_copies_and_pickles_keep_everything(error: MeshError) -> None:
    """An error that crosses a process is the same error there."""
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - our own
        assert (type(error), error.to_dict(), str(error)) == (type(twin), twin.to_dict(), str(twin))


def test_the_envelope_has_exactly_the_protocols_keys() -> None:
    """`code`, `message`, `agent`, `request_id` and `details`, always all five."""
    expected: dict[str, Any] = {
        "code": "not_found", "message": "m", "agent": "", "request_id": "", "details": {},
    }  # fmt: skip
    assert expected == NotFound("m").to_dict()


def test_an_error_is_located_in_the_request_at_hand() -> None:
    """What is sent has this request's id, and the raised object stays as it was."""
    assert ("a", "r") == _place(MeshError("m").for_request(agent="a", request_id="r"))
    inner = MeshError("m", agent="inner", request_id="ri")
    assert ("inner", "r") == _place(inner.for_request(agent="a", request_id="r"))
    assert ("inner", "ri") == _place(inner)


def _place(error: MeshError) -> tuple[str, str]:
    return error.agent, error.request_id


def test_details_are_never_shared_between_errors() -> None:
    """Two errors without details have two dicts, so one cannot write into the other."""
    first, second = MeshError("a"), MeshError("b")
    first.details["k"] = 1
    assert {} == second.details


def test_what_cannot_be_an_agent_is_also_a_type_error() -> None:
    """`except TypeError` around a declaration works, as with any wrong use of a decorator."""
    assert isinstance(InvalidAgent("no"), TypeError)
