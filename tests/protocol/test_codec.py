"""Headers byte for byte, payloads, and requests and answers taken apart."""

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


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError("no repr")

    __str__ = __repr__


def block(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in ("NATS/1.0", *lines, "")).encode()


WHO = ("X-Mesh-Request-Id: r1", "X-Mesh-Instance-Id: i1")


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (codec.request_headers("r1", "i1", timeout=None), block(*WHO)),
        (codec.request_headers("r1", "i1", timeout=1.5), block(*WHO, "X-Mesh-Timeout-Ms: 1500")),
        (codec.request_headers("r1", "i1", timeout=0), block(*WHO, "X-Mesh-Timeout-Ms: 1")),
        (
            codec.request_headers("r1", "i1", timeout=None, streaming=True, credit=8),
            block(*WHO, "X-Mesh-Stream: true", "X-Mesh-Credit: 8"),
        ),
        (
            codec.request_headers(
                "r1", "i1", timeout=None, extra={"traceparent": "00-ab", "Authorization": "B"}
            ),
            block(*WHO, "traceparent: 00-ab", "Authorization: B"),
        ),
        (
            codec.request_headers("r1", "i1", timeout=None, extra={"X-Mesh-Instance-Id": "mine"}),
            block("X-Mesh-Request-Id: r1", "X-Mesh-Instance-Id: mine"),
        ),
        (codec.reply_headers("r1", "i1", "nlp.a"), block(*WHO, "X-Mesh-Status: ok", "X-Mesh-Source: nlp.a")),
        (
            codec.reply_headers("", "i1", "a"),
            block("X-Mesh-Request-Id: ", WHO[1], "X-Mesh-Status: ok", "X-Mesh-Source: a"),
        ),
        (
            codec.frame_headers(codec.frame_prefix("r1", "i1"), 0),
            block(*WHO, "X-Mesh-Stream-Seq: 0", "X-Mesh-Stream-End: false"),
        ),
        (
            codec.end_headers(codec.frame_prefix("r1", "i1"), 7),
            block(*WHO, "X-Mesh-Stream-Seq: 7", "X-Mesh-Stream-End: true"),
        ),
        (
            codec.end_headers(codec.frame_prefix("r1", "i1"), 7, Usage(total_tokens=9)),
            block(
                *WHO, "X-Mesh-Stream-Seq: 7", "X-Mesh-Stream-End: true", 'X-Mesh-Usage: {"total_tokens": 9}'
            ),
        ),
        (
            codec.reply_headers("r1", "i1", "a", Usage(model="m\r\nX: y", input_tokens=1)),
            block(
                *WHO,
                "X-Mesh-Status: ok",
                "X-Mesh-Source: a",
                'X-Mesh-Usage: {"input_tokens": 1, "model": "m\\r\\nX: y"}',
            ),
        ),
        (
            codec.frame_headers(codec.frame_prefix("", "i1"), 3),
            block(WHO[1], "X-Mesh-Stream-Seq: 3", "X-Mesh-Stream-End: false"),
        ),
        (codec.accepted_headers("r1", "i1"), block(*WHO, "X-Mesh-Status: accepted")),
        (
            codec.error_headers("", "i1", frame=True),
            block(WHO[1], "X-Mesh-Status: error", "X-Mesh-Stream-End: true"),
        ),
        (codec.error_headers("r1", "i1"), block(*WHO, "X-Mesh-Status: error")),
        (
            codec.error_headers("r1", "i1", frame=True),
            block(*WHO, "X-Mesh-Status: error", "X-Mesh-Stream-End: true"),
        ),
        (codec.credit_headers(8), block("X-Mesh-Credit: 8")),
        (codec.cancel_headers(timed_out=False), block("X-Mesh-Credit: 0")),
        (codec.cancel_headers(timed_out=True), block("X-Mesh-Credit: 0", "X-Mesh-Status: timeout")),
        (write_headers({}), b""),
    ],
)
def test_header_blocks_are_the_protocols_byte_for_byte(built: bytes, expected: bytes) -> None:
    """Requests, replies, frames and errors carry the headers of protocol §6 and no others."""
    assert expected == built


@pytest.mark.parametrize("timeout", [math.inf, math.nan, -1.0, 1e300])
def test_any_timeout_makes_a_header_or_a_mesh_error(timeout: float) -> None:
    """A caller that waits for ever, or nonsensically, learns nothing of integers and overflows."""
    try:
        head = codec.request_headers("r1", "i1", timeout=timeout)
    except MeshError:
        return
    waits = codec.decode_request(head, b"").timeout
    assert waits is None or waits > 0


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
def test_payloads_go_out_as_the_protocol_says(payload: object, expected: bytes) -> None:
    """None is empty, bytes are themselves, everything else is JSON that any reader takes."""
    assert expected == codec.encode(payload)


def circle() -> list[object]:
    found: list[object] = []
    found.append(found)
    return found


def well(depth: int = 2000) -> list[object]:
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    "make",
    [object, Unspeakable, circle, well, lambda: {"k": object()}, lambda: {object(): 1}, lambda: "\ud800"],
)
def test_a_payload_that_is_no_json_is_the_callers_fault(make: Callable[[], object]) -> None:
    """What cannot be sent is `invalid_input` that says what can."""
    with pytest.raises(InvalidInput, match="pydantic model, bytes or plain values"):
        codec.encode(make())


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"", None), (b"null", None), (b'"x"', "x"), (b'{"a":[1]}', {"a": [1]}), (b" 1 ", 1)],
)
def test_bodies_are_read_as_json(body: bytes, expected: object) -> None:
    """A body is the JSON value it holds; an empty one is None."""
    assert expected == codec.decode(body)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 2000, b"1" * 5000, b"text", b'"\\ud800"'])
def test_a_body_that_is_no_json_is_a_mesh_error(body: bytes) -> None:
    """Nothing but a MeshError comes of a body that cannot be read."""
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
def test_a_header_cannot_smuggle_in_another(headers: dict[str, str]) -> None:
    """A line break in a name or a value is refused, also among the headers of a call."""
    with pytest.raises(InvalidInput, match="line break"):
        write_headers(headers)
    with pytest.raises(InvalidInput, match="line break"):
        codec.request_headers("r", "i", timeout=1, extra=headers)


def test_a_header_that_is_no_utf8_is_a_mesh_error() -> None:
    """A lone surrogate cannot be sent; the caller gets a MeshError, not a codec's error."""
    with pytest.raises(MeshError):
        write_headers({"who": "\udcff"})


def request(*lines: str) -> codec.Request:
    return codec.decode_request(block(*lines), b"{}")


def test_a_request_is_read_whole() -> None:
    """Id, caller, verb, patience, window, body and all other headers are found."""
    found = request(
        *WHO,
        "X-Mesh-Stream: true",
        "X-Mesh-Timeout-Ms: 1500",
        "X-Mesh-Credit: 8",
        "Authorization: Bearer a:b",
    )
    assert ("r1", "i1", True, 1.5, 8, b"{}") == (
        found.request_id, found.caller, found.streaming, found.timeout, found.credit, found.body,
    )  # fmt: skip
    assert "Bearer a:b" == found.headers["Authorization"]


def test_a_request_without_headers_is_a_plain_call() -> None:
    """A peer that sends only a body is served: no id, no caller, no limit."""
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
def test_only_a_harmless_request_id_is_echoed(sent: str, *, kept: bool) -> None:
    """An id that is too long, or could break a header, counts as none."""
    assert (sent if kept else "") == request(f"X-Mesh-Request-Id: {sent}").request_id


@pytest.mark.parametrize(
    ("sent", "timeout"),
    [("1500", 1.5), ("1", 0.001), ("-1", None), ("1.5", None), ("", None), ("abc", None)]
    + [(text, None) for text in ("9" * 13, "9" * 5000, "\u0661", "\u00b2", "1e3", "+1", "0x1")],
)
def test_a_timeout_is_a_whole_number_of_milliseconds_or_not_there(sent: str, timeout: float | None) -> None:
    """What is no sane decimal number counts as not sent."""
    assert timeout == request(f"X-Mesh-Timeout-Ms: {sent}").timeout


@pytest.mark.parametrize(("sent", "credit"), [("8", 8), ("0", 0), ("-8", 0), ("x", 0), ("9" * 13, 0)])
def test_a_window_is_a_whole_number_or_not_there(sent: str, credit: int) -> None:
    """A broken credit header is as good as none, on requests and on grants alike."""
    assert (credit, credit) == (
        request(f"X-Mesh-Credit: {sent}").credit,
        codec.decode_credit(block(f"X-Mesh-Credit: {sent}")),
    )


@pytest.mark.parametrize(
    ("sent", "streaming"), [("true", True), ("false", False), ("True", False), ("1", False)]
)
def test_only_true_asks_for_a_stream(sent: str, *, streaming: bool) -> None:
    """`X-Mesh-Stream: true`, in these letters, is what makes a stream request."""
    assert streaming == request(f"X-Mesh-Stream: {sent}").streaming


START = codec.frame_prefix("r", "i")


@pytest.mark.parametrize(
    ("head", "status", "nobody", "seq", "end", "instance"),
    [
        (b"", "", False, None, False, ""),
        (codec.reply_headers("r", "i", "a"), "ok", False, None, False, "i"),
        (codec.frame_headers(START, 3), "", False, 3, False, "i"),
        (codec.end_headers(START, 4), "", False, 4, True, "i"),
        (codec.error_headers("r", "i"), "error", False, None, False, "i"),
        (codec.error_headers("r", "i", frame=True), "error", False, None, True, "i"),
        (codec.accepted_headers("r", "i"), "accepted", False, None, False, "i"),
        (b"NATS/1.0 503\r\n\r\n", "", True, None, False, ""),
        (b"NATS/1.0 503 No Responders\r\nA: b\r\n\r\n", "", True, None, False, ""),
        (b"NATS/1.0 404\r\n\r\n", "", False, None, False, ""),
        (block("X-Mesh-Stream-Seq: x"), "", False, None, False, ""),
    ],
)
def test_answers_are_told_apart(  # noqa: PLR0913 - what an answer has
    head: bytes, status: str, *, nobody: bool, seq: int | None, end: bool, instance: str
) -> None:
    """Reply, chunk, end, error, acceptance and NATS' own 503 are what their headers say."""
    found = codec.decode_reply(head, b"x")
    assert (b"x", nobody, seq, end, instance) == (
        found.body, found.no_responders, found.seq, found.end, found.instance,
    )  # fmt: skip
    assert (status == "error", status == "accepted") == (found.error, found.accepted)


@pytest.mark.parametrize(
    "error", [NotFound("not_found", "m", "a", "r", {"k": [1]}), MeshError("own", "m"), Cancelled("c")]
)
def test_an_error_arrives_as_it_left(error: MeshError) -> None:
    """Class, code, message, agent, request and details survive the wire."""
    read = codec.decode_error(codec.encode_error(error))
    assert (type(error), error.to_dict()) == (type(read), read.to_dict())


@pytest.mark.parametrize("body", [b"", b"oops", b"[]", b"null", b"\xff\xfe", b"{", b"[" * 2000])
def test_a_broken_envelope_is_a_mesh_error_that_shows_it(body: bytes) -> None:
    """An error that is no envelope is still an error for the caller, with what was sent."""
    error = codec.decode_error(body)
    assert "mesh_error" == error.code
    assert body[:200].decode("utf-8", "replace") in error.message.replace("'", "")
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "make",
    [
        object,
        Unspeakable,
        circle,
        well,
        lambda: "\udcff",
        lambda: math.nan,
        lambda: b"\xff",
        lambda: {1: {2}},
        lambda: {None: 1},
        lambda: {(1, 2): 3},
        lambda: ValueError("v"),
        lambda: [Unspeakable(), "\udcff"],
    ],
)
def test_an_error_body_is_json_whatever_its_details_are(make: Callable[[], object]) -> None:
    """No detail keeps an error from being sent: fault 5 left the caller waiting."""
    envelope = strict_json(codec.encode_error(InvalidInput("m", agent="a", details={"what": make()})))
    assert ("invalid_input", "m", "a") == (envelope["code"], envelope["message"], envelope["agent"])


def test_an_error_body_is_json_whatever_its_message_is() -> None:
    """A file name that is no UTF-8, in an exception's text, still reaches the caller as an error."""
    body = codec.encode_error(NotFound("No such file: '\udcff.txt'", agent="a", request_id="r"))
    read = codec.decode_error(body)
    assert (NotFound, "not_found", "a", "r") == (type(read), read.code, read.agent, read.request_id)
    assert all("No such file" in message for message in (read.message, strict_json(body)["message"]))


def test_a_huge_error_fits_and_keeps_what_matters() -> None:
    """An envelope too large to send loses its details and the end of its message only."""
    body = codec.encode_error(MeshError("own", "m" * 10**6, "a", "r", {"k": "v" * 10**6}))
    envelope = strict_json(body)
    assert len(body) < codec.MAX_ERROR_BODY
    assert ("own", "a", "r", {"truncated": True}) == (
        envelope["code"], envelope["agent"], envelope["request_id"], envelope["details"],
    )  # fmt: skip
    assert envelope["message"].startswith("mmm")


def strict_json(body: bytes) -> dict[str, Any]:
    """JSON as other languages read it: without NaN."""

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    found = json.loads(body, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_ids_are_32_hexadecimal_digits_and_fresh() -> None:
    """Request and instance ids are uuid4 hex, as stock peers make them."""
    ids = {codec.new_id() for _ in range(100)}
    assert 100 == len(ids)
    assert all(len(found) == 32 and int(found, 16) >= 0 for found in ids)
