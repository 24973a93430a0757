"""Encode header blocks, payloads and errors; decode requests, replies and frames."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from openagentmesh import Cancelled, InvalidInput, MeshError, NotFound
from openagentmesh.protocol import codec
from openagentmesh.protocol.headers import write_headers
from openagentmesh.protocol.messages import Usage
from pydantic import BaseModel


class Point(BaseModel):
    x: float = 1.0
    label: str | None = None


@dataclass
class Pair:
    left: int
    right: int


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no repr")

    __str__ = __repr__


def block(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in ("NATS/1.0", *lines, "")).encode()


IDS = ("X-Mesh-Request-Id: r1", "X-Mesh-Instance-Id: i1")


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (codec.request_headers("r1", "i1", timeout=None), block(*IDS)),
        (codec.request_headers("r1", "i1", timeout=1.5), block(*IDS, "X-Mesh-Timeout-Ms: 1500")),
        (codec.request_headers("r1", "i1", timeout=0), block(*IDS, "X-Mesh-Timeout-Ms: 1")),
        (
            codec.request_headers("r1", "i1", timeout=None, streaming=True, credit=8),
            block(*IDS, "X-Mesh-Stream: true", "X-Mesh-Credit: 8"),
        ),
        (
            codec.request_headers(
                "r1", "i1", timeout=None, extra={"traceparent": "00-ab", "Authorization": "B"}
            ),
            block(*IDS, "traceparent: 00-ab", "Authorization: B"),
        ),
        (
            codec.request_headers("r1", "i1", timeout=None, extra={"X-Mesh-Instance-Id": "mine"}),
            block("X-Mesh-Request-Id: r1", "X-Mesh-Instance-Id: mine"),
        ),
        (codec.reply_headers("r1", "i1", "nlp.a"), block(*IDS, "X-Mesh-Status: ok", "X-Mesh-Source: nlp.a")),
        (
            codec.reply_headers("", "i1", "a"),
            block("X-Mesh-Request-Id: ", IDS[1], "X-Mesh-Status: ok", "X-Mesh-Source: a"),
        ),
        (
            codec.frame_headers(codec.frame_prefix("r1", "i1"), 0),
            block(*IDS, "X-Mesh-Stream-Seq: 0", "X-Mesh-Stream-End: false"),
        ),
        (
            codec.end_headers(codec.frame_prefix("r1", "i1"), 7),
            block(*IDS, "X-Mesh-Stream-Seq: 7", "X-Mesh-Stream-End: true"),
        ),
        (
            codec.end_headers(codec.frame_prefix("r1", "i1"), 7, Usage(total_tokens=9)),
            block(
                *IDS, "X-Mesh-Stream-Seq: 7", "X-Mesh-Stream-End: true", 'X-Mesh-Usage: {"total_tokens": 9}'
            ),
        ),
        (
            codec.reply_headers("r1", "i1", "a", Usage(model="m\r\nX: y", input_tokens=1)),
            block(
                *IDS,
                "X-Mesh-Status: ok",
                "X-Mesh-Source: a",
                'X-Mesh-Usage: {"input_tokens": 1, "model": "m\\r\\nX: y"}',
            ),
        ),
        (
            codec.frame_headers(codec.frame_prefix("", "i1"), 3),
            block(IDS[1], "X-Mesh-Stream-Seq: 3", "X-Mesh-Stream-End: false"),
        ),
        (codec.accepted_headers("r1", "i1"), block(*IDS, "X-Mesh-Status: accepted")),
        (
            codec.error_headers("", "i1", frame=True),
            block(IDS[1], "X-Mesh-Status: error", "X-Mesh-Stream-End: true"),
        ),
        (codec.error_headers("r1", "i1"), block(*IDS, "X-Mesh-Status: error")),
        (
            codec.error_headers("r1", "i1", frame=True),
            block(*IDS, "X-Mesh-Status: error", "X-Mesh-Stream-End: true"),
        ),
        (codec.credit_headers(8), block("X-Mesh-Credit: 8")),
        (codec.cancel_headers(timed_out=False), block("X-Mesh-Credit: 0")),
        (codec.cancel_headers(timed_out=True), block("X-Mesh-Credit: 0", "X-Mesh-Status: timeout")),
        (write_headers({}), b""),
    ],
)
def test_a_header_block_has_the_bytes_of_the_protocol(built: bytes, expected: bytes) -> None:
    """Requests, replies, frames and errors carry the headers of protocol §6 and no others."""
    assert expected == built


@pytest.mark.parametrize("timeout", [math.inf, math.nan, -1.0, 1e300])
def test_any_timeout_is_encoded_or_rejected(timeout: float) -> None:
    """An infinite, negative or huge timeout and NaN are encoded or raise a MeshError, never another error."""
    try:
        head = codec.request_headers("r1", "i1", timeout=timeout)
    except MeshError:
        return
    decoded = codec.decode_request(head, b"").timeout
    assert decoded is None or decoded > 0


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (None, b""),
        (b"\x00raw", b"\x00raw"),
        (bytearray(b"raw"), b"raw"),
        (memoryview(b"raw"), b"raw"),
        ("text", b'"text"'),
        ("", b'""'),
        ("é", '"é"'.encode()),
        (Point(), b'{"x":1.0,"label":null}'),
        ({"a": [1, None, True]}, b'{"a":[1,null,true]}'),
        ([Point()], b'[{"x":1.0,"label":null}]'),
        (0, b"0"),
        (False, b"false"),
        ({}, b"{}"),
        (math.nan, b"null"),
        (Point(x=math.inf), b'{"x":null,"label":null}'),
        (datetime(2026, 1, 2, tzinfo=UTC), b'"2026-01-02T00:00:00Z"'),
        (Pair(1, 2), b'{"left":1,"right":2}'),
    ],
)
def test_a_payload_is_encoded_as_the_protocol_requires(payload: object, expected: bytes) -> None:
    """None is an empty body, bytes are unchanged, everything else is strict JSON."""
    assert expected == codec.encode(payload)


def circular() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def nested(depth: int = 2000) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "make",
    [object, Unprintable, circular, nested, lambda: {"k": object()}, lambda: {object(): 1}, lambda: "\ud800"],
)
def test_a_payload_without_a_json_form_is_invalid_input(make: Callable[[], object]) -> None:
    """A payload that has no JSON form raises `invalid_input`, which names the valid kinds of payload."""
    with pytest.raises(InvalidInput, match="pydantic model, bytes or plain values"):
        codec.encode(make())


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"", None), (b"null", None), (b'"x"', "x"), (b'{"a":[1]}', {"a": [1]}), (b" 1 ", 1)],
)
def test_a_body_is_decoded_as_json(body: bytes, expected: object) -> None:
    """A body is decoded as a JSON value, an empty one as None."""
    assert expected == codec.decode(body)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 2000, b"1" * 5000, b"text", b'"\\ud800"'])
def test_a_body_that_is_not_json_raises_a_mesh_error(body: bytes) -> None:
    """A body that is not valid JSON raises a MeshError."""
    with pytest.raises(MeshError, match="is not JSON"):
        codec.decode(body)


@pytest.mark.parametrize(
    "headers",
    [
        {"a": "b\r\nX-Mesh-Status: ok"},
        {"a": "b\n"},
        {"a": "\r"},
        {"a\r\nX-Mesh-Status": "ok"},
        {"a": "b\r\n\r\nbody"},
        {"a": "b", "c": "\n"},
    ],
)
def test_a_line_break_in_a_header_is_rejected(headers: dict[str, str]) -> None:
    """A line break in a name or a value is rejected, also in the extra headers of a request."""
    with pytest.raises(InvalidInput, match="line break"):
        write_headers(headers)
    with pytest.raises(InvalidInput, match="line break"):
        codec.request_headers("r", "i", timeout=1, extra=headers)


def test_a_header_that_is_not_unicode_raises_a_mesh_error() -> None:
    """A lone surrogate in a header raises a MeshError, not a UnicodeEncodeError."""
    with pytest.raises(MeshError):
        write_headers({"name": "\udcff"})


def request(*lines: str) -> codec.Request:
    return codec.decode_request(block(*lines), b"{}")


def test_all_parts_of_a_request_are_decoded() -> None:
    """Id, caller, kind, timeout, credit, body and all other headers are decoded."""
    decoded = request(
        *IDS,
        "X-Mesh-Stream: true",
        "X-Mesh-Timeout-Ms: 1500",
        "X-Mesh-Credit: 8",
        "Authorization: Bearer a:b",
    )
    assert ("r1", "i1", True, 1.5, 8, b"{}") == (
        decoded.request_id, decoded.caller, decoded.streaming, decoded.timeout, decoded.credit, decoded.body,
    )  # fmt: skip
    assert "Bearer a:b" == decoded.headers["Authorization"]


def test_a_request_without_headers_is_a_plain_call() -> None:
    """A request without headers has no id, no caller and no timeout."""
    assert codec.Request("", "", False, None, 0, "", "", b"x", {}) == codec.decode_request(b"", b"x")  # noqa: FBT003


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a" * 32, True),
        ("a" * 256, True),
        ("with.dots>*", True),
        ("a" * 257, False),
        ("a b", False),
        ("é", False),
        ("a\x00b", False),
        ("a\nb", False),
        ("", False),
    ],
)
def test_a_request_id_that_cannot_be_echoed_is_ignored(sent: str, *, kept: bool) -> None:
    """An id that is too long, or has characters that are not printable ASCII, is treated as absent."""
    assert (sent if kept else "") == request(f"X-Mesh-Request-Id: {sent}").request_id


@pytest.mark.parametrize(
    ("sent", "timeout"),
    [("1500", 1.5), ("1", 0.001), ("-1", None), ("1.5", None), ("", None), ("abc", None)]
    + [(text, None) for text in ("9" * 13, "9" * 5000, "\u0661", "\u00b2", "1e3", "+1", "0x1")],
)
def test_a_malformed_timeout_is_ignored(sent: str, timeout: float | None) -> None:
    """A timeout that is not a decimal number of at most 12 digits is treated as absent."""
    assert timeout == request(f"X-Mesh-Timeout-Ms: {sent}").timeout


@pytest.mark.parametrize(("sent", "credit"), [("8", 8), ("0", 0), ("-8", 0), ("x", 0), ("9" * 13, 0)])
def test_a_malformed_credit_is_zero(sent: str, credit: int) -> None:
    """A credit that is not a decimal number of at most 12 digits is 0, in requests and in grants."""
    assert (credit, credit) == (
        request(f"X-Mesh-Credit: {sent}").credit,
        codec.decode_credit(block(f"X-Mesh-Credit: {sent}")),
    )


@pytest.mark.parametrize(
    ("sent", "streaming"), [("true", True), ("false", False), ("True", False), ("1", False)]
)
def test_only_the_value_true_requests_a_stream(sent: str, *, streaming: bool) -> None:
    """`X-Mesh-Stream` requests a stream when its value is exactly `true`."""
    assert streaming == request(f"X-Mesh-Stream: {sent}").streaming


PREFIX = codec.frame_prefix("r", "i")


@pytest.mark.parametrize(
    ("head", "status", "no_responders", "seq", "end", "instance"),
    [
        (b"", "", False, None, False, ""),
        (codec.reply_headers("r", "i", "a"), "ok", False, None, False, "i"),
        (codec.frame_headers(PREFIX, 3), "", False, 3, False, "i"),
        (codec.end_headers(PREFIX, 4), "", False, 4, True, "i"),
        (codec.error_headers("r", "i"), "error", False, None, False, "i"),
        (codec.error_headers("r", "i", frame=True), "error", False, None, True, "i"),
        (codec.accepted_headers("r", "i"), "accepted", False, None, False, "i"),
        (b"NATS/1.0 503\r\n\r\n", "", True, None, False, ""),
        (b"NATS/1.0 503 No Responders\r\nA: b\r\n\r\n", "", True, None, False, ""),
        (b"NATS/1.0 404\r\n\r\n", "", False, None, False, ""),
        (block("X-Mesh-Stream-Seq: x"), "", False, None, False, ""),
    ],
)
def test_each_kind_of_reply_is_decoded(  # noqa: PLR0913 - one parameter per header
    head: bytes, status: str, *, no_responders: bool, seq: int | None, end: bool, instance: str
) -> None:
    """Replies, chunks, end frames, errors, acknowledgements and NATS' 503 are decoded by their headers."""
    reply = codec.decode_reply(head, b"x")
    assert (b"x", no_responders, seq, end, instance) == (
        reply.body, reply.no_responders, reply.seq, reply.end, reply.instance,
    )  # fmt: skip
    assert (status == "error", status == "accepted") == (reply.error, reply.accepted)


@pytest.mark.parametrize(
    "error", [NotFound("not_found", "m", "a", "r", {"k": [1]}), MeshError("own", "m"), Cancelled("c")]
)
def test_an_error_round_trips(error: MeshError) -> None:
    """Class, code, message, agent, request id and details are decoded as they were encoded."""
    decoded = codec.decode_error(codec.encode_error(error))
    assert (type(error), error.to_dict()) == (type(decoded), decoded.to_dict())


@pytest.mark.parametrize("body", [b"", b"oops", b"[]", b"null", b"\xff\xfe", b"{", b"[" * 2000])
def test_a_malformed_error_envelope_is_quoted(body: bytes) -> None:
    """A malformed error envelope is decoded as a MeshError that quotes its beginning."""
    error = codec.decode_error(body)
    assert "mesh_error" == error.code
    assert body[:200].decode("utf-8", "replace") in error.message.replace("'", "")
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "make",
    [
        object,
        Unprintable,
        circular,
        nested,
        lambda: "\udcff",
        lambda: math.nan,
        lambda: b"\xff",
        lambda: {1: {2}},
        lambda: {None: 1},
        lambda: {(1, 2): 3},
        lambda: ValueError("v"),
        lambda: [Unprintable(), "\udcff"],
    ],
)
def test_an_error_with_any_details_is_encoded(make: Callable[[], object]) -> None:
    """An error body is strict JSON whatever its details are, else the caller would get no reply."""
    envelope = strict_json(codec.encode_error(InvalidInput("m", agent="a", details={"value": make()})))
    assert ("invalid_input", "m", "a") == (envelope["code"], envelope["message"], envelope["agent"])


def test_an_error_message_that_is_not_unicode_is_encoded() -> None:
    """A lone surrogate in a message, from a file name that is not UTF-8, is replaced."""
    body = codec.encode_error(NotFound("No such file: '\udcff.txt'", agent="a", request_id="r"))
    decoded = codec.decode_error(body)
    assert (NotFound, "not_found", "a", "r") == (
        type(decoded), decoded.code, decoded.agent, decoded.request_id,
    )  # fmt: skip
    assert all("No such file" in message for message in (decoded.message, strict_json(body)["message"]))


def test_a_huge_error_is_truncated() -> None:
    """An envelope that is too large is sent without its details and with the beginning of its message."""
    body = codec.encode_error(MeshError("own", "m" * 10**6, "a", "r", {"k": "v" * 10**6}))
    envelope = strict_json(body)
    assert len(body) < codec.MAX_ERROR_BODY
    assert ("own", "a", "r", {"truncated": True}) == (
        envelope["code"], envelope["agent"], envelope["request_id"], envelope["details"],
    )  # fmt: skip
    assert envelope["message"].startswith("mmm")


def strict_json(body: bytes) -> dict[str, Any]:
    """A JSON object, decoded without the constants that JSON lacks, such as NaN."""

    def reject(constant: str) -> object:
        raise ValueError(constant)

    value = json.loads(body, parse_constant=reject)
    assert isinstance(value, dict)
    return value


def test_ids_are_unique_32_digit_hexadecimal_numbers() -> None:
    """Request and instance ids have the form of those of other implementations: the hex form of a uuid4."""
    ids = {codec.new_id() for _ in range(100)}
    assert 100 == len(ids)
    assert all(len(new) == 32 and int(new, 16) >= 0 for new in ids)
