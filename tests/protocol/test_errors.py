"""Error classes: their constructor, their codes on the wire, and copies."""

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

SENT_ERRORS = [
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


@pytest.mark.parametrize(("code", "kind"), SENT_ERRORS)
def test_each_code_belongs_to_one_class(code: str, kind: type[MeshError]) -> None:
    """An error of a class has its code, and an error with that code is decoded as that class."""
    assert code == kind("it broke").code
    decoded = MeshError.from_code(code, "it broke", "a", "r", {"k": 1})
    assert (kind, code, "it broke", "a", "r", {"k": 1}) == (type(decoded), *decoded.to_dict().values())


@pytest.mark.parametrize("code", ["quota_used_up", "invalid_agent", "", "Not_Found"])
def test_an_unknown_code_is_kept(code: str) -> None:
    """An unknown code, or one that is never sent, is decoded as a MeshError with that code."""
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
    """The constructor takes a message, or a code and a message; `str` returns the message."""
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
def test_copies_and_pickles_keep_all_attributes(error: MeshError) -> None:
    """A copied or pickled error has the same class, attributes and text."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - our own
        assert (type(error), error.to_dict(), str(error)) == (type(other), other.to_dict(), str(other))


def test_the_envelope_has_exactly_the_keys_of_the_protocol() -> None:
    """An error envelope always has the same five keys, and no other key."""
    expected: dict[str, Any] = {
        "code": "not_found", "message": "m", "agent": "", "request_id": "", "details": {},
    }  # fmt: skip
    assert expected == NotFound("m").to_dict()


def test_an_error_is_copied_for_a_request() -> None:
    """`for_request` sets the request id and a missing agent in a copy, and does not change the error."""
    sent = MeshError("m").for_request(agent="a", request_id="r")
    assert ("a", "r") == (sent.agent, sent.request_id)
    inner = MeshError("m", agent="inner", request_id="ri")
    sent = inner.for_request(agent="a", request_id="r")
    assert ("inner", "r") == (sent.agent, sent.request_id)
    assert ("inner", "ri") == (inner.agent, inner.request_id)


def test_errors_do_not_share_their_default_details() -> None:
    """Two errors without details have two separate dicts."""
    first, second = MeshError("a"), MeshError("b")
    first.details["k"] = 1
    assert {} == second.details


def test_invalid_agent_is_a_type_error() -> None:
    """`except TypeError` around a declaration catches `InvalidAgent`, as with any decorator."""
    assert isinstance(InvalidAgent("no"), TypeError)
