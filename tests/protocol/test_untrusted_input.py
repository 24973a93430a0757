"""Untrusted input: decoding any bytes succeeds or raises a MeshError."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from openagentmesh import AgentContract, InvalidInput, MeshError
from openagentmesh.protocol import codec
from openagentmesh.protocol.contract import Verb, decode_catalog
from openagentmesh.protocol.headers import read_headers, write_headers

from tests.support.headers import HEADS

DEEP = b"[" * 2000
KEYS = st.sampled_from(
    [
        "name",
        "description",
        "version",
        "tags",
        "capabilities",
        "invocable",
        "streaming",
        "skills",
        "mcp",
        "x-agentmesh",
        "subject",
        "registered_at",
        "inputSchema",
        "outputSchema",
        "chunk_schema",
        "code",
        "message",
        "agent",
        "request_id",
        "details",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
# JSON with keys that the decoders read, so that decoding gets past the first of them.
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)


@given(HEADS, st.binary(max_size=20))
@example(b"NATS/1.0\r\nX-Mesh-Timeout-Ms: " + b"9" * 10_000 + b"\r\n\r\n", b"")
@example(b"\xff\xfe:\r\n:\r\n", b"")
def test_any_request_and_any_reply_can_be_decoded(head: bytes, body: bytes) -> None:
    """Decoding headers never raises, keeps the body, and accepts only a request id that is safe to echo."""
    request = codec.decode_request(head, body)
    assert (body, body) == (request.body, codec.decode_reply(head, body).body)
    assert (True, True) == (request.timeout is None or request.timeout >= 0, request.credit >= 0)
    assert codec.decode_credit(head) >= 0
    echoed = read_headers(codec.error_headers(request.request_id, "i"))
    assert {
        "X-Mesh-Request-Id": request.request_id,
        "X-Mesh-Instance-Id": "i",
        "X-Mesh-Status": "error",
    } == echoed


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12), max_size=4))
@example({"a": "b\r\nX-Mesh-Status: ok"})
@example({"a\n": "b"})
def test_a_header_block_has_one_line_per_header(headers: dict[str, str]) -> None:
    """Any headers are rejected, or written as a block with one line for each."""
    try:
        block = write_headers(headers)
    except InvalidInput:
        assert any(c in k + v for k, v in headers.items() for c in "\r\n")
        return
    lines = block.replace(b"\r", b"\n").split(b"\n\n")
    assert len(headers) == sum(bool(line) for line in lines[1:] if not line.startswith(b"NATS/1.0"))


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z-]{1,10}", fullmatch=True),
        st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20),
        min_size=1,
    )
)
def test_printable_headers_round_trip(headers: dict[str, str]) -> None:
    """Names and values of printable text are decoded as they were encoded, colons included."""
    assert headers == read_headers(write_headers(headers))


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
@example(DEEP)
@example(b'{"details":' + DEEP)
@example(b"1" * 5000)
@example(b'{"code":"invalid_input","details":[1],"message":null}')
def test_any_error_body_is_decoded_as_a_mesh_error(body: bytes) -> None:
    """Any error body that a peer sends is decoded as a MeshError that can be encoded again."""
    error = codec.decode_error(body)
    assert (str, str, str, str, dict) == tuple(type(value) for value in error.to_dict().values())
    assert error.code


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
@example(DEEP)
def test_any_body_is_json_or_a_mesh_error(body: bytes) -> None:
    """Decoding a body returns a JSON value or raises a MeshError."""
    message = error_message(lambda: codec.decode(body))
    assert not message or "is not JSON" in message


def error_message(decode: Callable[[], object]) -> str:
    """The message of the MeshError that a call raises; empty when it raises none."""
    try:
        decode()
    except MeshError as exc:
        return exc.message
    return ""


@given(st.binary(max_size=100) | st.lists(JSON, max_size=4).map(lambda value: json.dumps(value).encode()))
@example(DEEP)
def test_any_catalog_is_decoded_as_a_list(document: bytes) -> None:
    """Decoding the catalog never fails, and returns only entries with a name."""
    assert all(isinstance(entry.name, str) for entry in decode_catalog(document))


@given(
    st.fixed_dictionaries(
        {"name": st.just("a") | JSON},
        optional={
            "skills": st.lists(JSON, max_size=2) | JSON,
            "capabilities": st.dictionaries(KEYS, st.booleans()) | JSON,
            "x-agentmesh": st.dictionaries(KEYS, JSON, max_size=5) | JSON,
            "description": JSON,
        },
    )
)
@example({"name": "a", "x-agentmesh": {"registered_at": 1e300}})
@example({"name": "a", "x-agentmesh": {"registered_at": float("nan")}})
def test_any_contract_is_usable_or_a_mesh_error(document: dict[str, Any]) -> None:
    """A contract document is decoded as a contract that can be published again, or raises a MeshError."""
    body = json.dumps(document).encode()
    if message := error_message(lambda: AgentContract.from_document(body)):
        assert "malformed" in message
        return
    contract = AgentContract.from_document(body)
    published = json.loads(contract.to_registry_json())
    assert document["name"] == published["name"] == contract.to_catalog_entry().name
    verbs: tuple[Verb, ...] = ("call", "stream", "send", "subscribe")
    messages = [error_message(partial(contract.check_verb, verb)) for verb in verbs]
    assert "" in messages or not contract.invocable


DETAILS: st.SearchStrategy[Any] = st.recursive(
    SCALARS
    | st.binary(max_size=5)
    | st.builds(object)
    | st.builds(ValueError, st.text(max_size=5))
    | st.text(st.characters(), max_size=5)
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(SCALARS | st.tuples(SCALARS), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), DETAILS, max_size=3))
def test_any_details_are_encoded_as_strict_json(details: dict[str, Any]) -> None:
    """An error body is strict JSON with the error's code, whatever its details are."""

    def reject(constant: str) -> None:
        raise AssertionError(constant)

    envelope = json.loads(codec.encode_error(InvalidInput("m", details=details)), parse_constant=reject)
    assert ("invalid_input", "m") == (envelope["code"], envelope["message"])
    assert isinstance(envelope["details"], dict)
