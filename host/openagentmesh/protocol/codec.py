"""Encode and decode requests, replies, errors and frames (protocol §6–§8)."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, from_json, to_json

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import InvalidInput, MeshError
from openagentmesh.protocol.headers import INLINE_STATUS, VERSION_LINE, parse_int, read_headers, write_headers
from openagentmesh.protocol.messages import Usage

_NO_RESPONDERS: Final = "503"
ACK: Final = "ack"
NO_REPLY: Final = "none"
# The body of a reply without a result.
NO_RESULT: Final = b"{}"
# The validator itself: the methods of TypeAdapter take as long again.
_ANY_JSON: Final = TypeAdapter[Any](Any).validator
# An error envelope has to fit into a message, whatever its details are.
MAX_ERROR_BODY: Final = 64 * 1024
_MAX_ERROR_MESSAGE: Final = 16 * 1024
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
_CHUNK_RE: Final = re.compile(
    rb"NATS/1\.0\r\nX-Mesh-Request-Id: [!-~]*\r\nX-Mesh-Instance-Id: ([!-~]*)\r\n"
    rb"X-Mesh-Stream-Seq: ([0-9]{1,12})\r\nX-Mesh-Stream-End: false\r\n\r\n"
)
# A request id is echoed in headers, so its length and characters are bounded.
_ID_RE: Final = re.compile(r"[!-~]{1,256}")


def new_id() -> str:
    """A new request or instance id: 32 hexadecimal digits."""
    return uuid4().hex


def encode(payload: object) -> bytes:
    """A payload as a body: None is empty, bytes are unchanged, the rest is JSON; else raises InvalidInput."""
    if payload is None:
        return b""
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    try:
        if isinstance(payload, BaseModel):
            return payload.model_dump_json().encode()
        return to_json(payload, inf_nan_mode="null")
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        raise InvalidInput(
            f"The payload cannot be sent as JSON: {exc}. Send a pydantic model, bytes or plain values."
        ) from exc


def decode(body: bytes) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """A body as a JSON value, None if it is empty; raises MeshError if it is not JSON."""
    if not body:
        return None
    try:
        return _ANY_JSON.validate_json(body)
    except ValueError as exc:
        raise MeshError(f"A body of {len(body)} bytes is not JSON: {exc}") from exc


@dataclass(slots=True)  # one per request: frozen would cost a microsecond
class Request:
    """One request as received; `timeout` in seconds."""

    request_id: str
    caller: str
    streaming: bool
    timeout: float | None
    credit: int
    accept: str
    reply_to: str
    body: bytes
    headers: Mapping[str, str]


def decode_request(head: bytes, body: bytes) -> Request:
    """Decode a request. Never raises: a malformed header is treated as absent."""
    headers = read_headers(head) if head else {}
    get = headers.get
    timeout_ms = parse_int(get(subjects.TIMEOUT_MS))
    request_id = get(subjects.REQUEST_ID, "")
    return Request(
        request_id if _ID_RE.fullmatch(request_id) else "",
        get(subjects.INSTANCE_ID, ""),
        get(subjects.STREAM) == "true",
        None if timeout_ms is None else timeout_ms / 1000,
        parse_int(get(subjects.CREDIT)) or 0,
        get(subjects.ACCEPT, ""),
        get(subjects.REPLY_TO, ""),
        body,
        headers,
    )


def request_headers(  # noqa: PLR0913 - one parameter per header
    request_id: str,
    instance_id: str,
    *,
    timeout: float | None,
    streaming: bool = False,
    credit: int = 0,
    accept: str = "",
    reply_to: str = "",
    extra: Mapping[str, str] | None = None,
) -> bytes:
    """The header block of a request; `extra` are the caller's own headers.

    `timeout` is in seconds, None without a limit; `credit` is how many chunks may be unacknowledged. With
    `accept=ACK` the host acknowledges the request and listens for a cancel; with NO_REPLY it does not answer,
    and only NATS sends its 503 to the reply subject. `reply_to` is that of `send(reply_to=…)`.
    """
    headers = {subjects.REQUEST_ID: request_id, subjects.INSTANCE_ID: instance_id}
    if timeout is not None and timeout != math.inf:
        if not timeout > -math.inf:
            raise InvalidInput(f"A timeout is a number of seconds, or None for no limit; got {timeout!r}.")
        headers[subjects.TIMEOUT_MS] = str(max(1, int(timeout * 1000)))
    if streaming:
        headers[subjects.STREAM] = "true"
    if credit:
        headers[subjects.CREDIT] = str(credit)
    if accept:
        headers[subjects.ACCEPT] = accept
    if reply_to:
        headers[subjects.REPLY_TO] = reply_to
    if extra:
        headers.update(extra)
    return write_headers(headers)


def accepted_headers(request_id: str, instance_id: str) -> bytes:
    """The header block of the frame that acknowledges a request."""
    return _reply_head(request_id, instance_id, "X-Mesh-Status: accepted\r\n")


def reply_headers(request_id: str, instance_id: str, agent: str, usage: Usage | None = None) -> bytes:
    """The header block of an ok reply."""
    return _reply_head(
        request_id, instance_id, f"X-Mesh-Status: ok\r\nX-Mesh-Source: {agent}\r\n{_usage_line(usage)}"
    )


def frame_prefix(request_id: str, instance_id: str) -> bytes:
    """The first lines of all frames of one stream; a publisher's frames have no request id."""
    request = f"X-Mesh-Request-Id: {request_id}\r\n" if request_id else ""
    return f"NATS/1.0\r\n{request}X-Mesh-Instance-Id: {instance_id}\r\n".encode()


def frame_headers(prefix: bytes, seq: int, extra: Mapping[str, str] | None = None) -> bytes:
    """The header block of a chunk or an event; `prefix` is the stream's `frame_prefix`."""
    more = write_headers(extra)[len(VERSION_LINE) + 2 : -2] if extra else b""
    return b"%b%bX-Mesh-Stream-Seq: %d\r\nX-Mesh-Stream-End: false\r\n\r\n" % (prefix, more, seq)


def end_headers(prefix: bytes, count: int, usage: Usage | None = None) -> bytes:
    """The header block of the end frame, which carries the number of chunks."""
    tail = f"X-Mesh-Stream-Seq: {count}\r\nX-Mesh-Stream-End: true\r\n{_usage_line(usage)}\r\n"
    return prefix + tail.encode()


def _reply_head(request_id: str, instance_id: str, lines: str) -> bytes:
    # A third of the time of `write_headers`: no value here can contain a line break.
    return (
        f"NATS/1.0\r\nX-Mesh-Request-Id: {request_id}\r\nX-Mesh-Instance-Id: {instance_id}\r\n{lines}\r\n"
    ).encode()


def _usage_line(usage: Usage | None) -> str:
    if usage is None:
        return ""
    # JSON escapes a line break in the model's name.
    return f"X-Mesh-Usage: {json.dumps(usage.model_dump(exclude_none=True))}\r\n"


def publish_headers(instance_id: str, kind: str, extra: Mapping[str, str] | None = None) -> bytes:
    """The header block of `publish()` (protocol §6); `kind` is the content type."""
    headers = {subjects.INSTANCE_ID: instance_id, subjects.CONTENT_TYPE: kind}
    return write_headers(headers | dict(extra or {}))


def encode_message(payload: object) -> tuple[str, bytes]:
    """The content type and body of `publish()`; raises InvalidInput if it is neither text, bytes nor JSON."""
    if isinstance(payload, bytes | bytearray | memoryview):
        return "application/octet-stream", bytes(payload)
    if not isinstance(payload, str):
        return "application/json", encode(payload)
    try:
        return "text/plain", payload.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"The text cannot be encoded as UTF-8: {exc}.") from exc


def decode_message(headers: Mapping[str, str], body: bytes) -> Any:  # noqa: ANN401 - a JSON value, text or bytes
    """The payload of a published message by its content type; a body that does not match it stays bytes."""
    kind = headers.get(subjects.CONTENT_TYPE, "")
    if kind == "application/octet-stream":
        return body
    try:
        return body.decode() if kind == "text/plain" else decode(body)
    except (UnicodeDecodeError, MeshError):
        return body


def error_headers(request_id: str, instance_id: str, *, frame: bool = False) -> bytes:
    """The header block of an error reply or its copy; with `frame`, of a stream's error frame."""
    # A publisher's error belongs to no request.
    headers = {subjects.REQUEST_ID: request_id} if request_id or not frame else {}
    headers |= {subjects.INSTANCE_ID: instance_id, subjects.STATUS: "error"}
    if frame:
        headers[subjects.STREAM_END] = "true"
    return write_headers(headers)


def encode_error(error: MeshError) -> bytes:
    """An error envelope; valid JSON of bounded size, whatever the details are."""
    body = _encode_envelope(error)
    if len(body) <= MAX_ERROR_BODY:
        return body
    message = error.message[:_MAX_ERROR_MESSAGE]
    return _encode_envelope(
        MeshError(error.code, message, error.agent, error.request_id, {"truncated": True})
    )


def _encode_envelope(error: MeshError) -> bytes:
    envelope = error.to_dict()
    # A handler may put any object into its error, also one whose `__repr__` raises.
    try:
        return to_json(envelope, inf_nan_mode="null", serialize_unknown=True)
    except Exception:  # noqa: BLE001 - encoded without the details instead
        texts = {
            key: str(value).encode("utf-8", "replace").decode()
            for key, value in envelope.items()
            if key != "details"
        }
        return to_json(texts | {"details": {"unprintable": True}})


def decode_error(body: bytes) -> MeshError:
    """The error of an error envelope; a MeshError when the envelope is malformed."""
    envelope = None
    with suppress(ValueError):
        envelope = from_json(body)
    if not isinstance(envelope, dict):
        shown = body[:200].decode("utf-8", "replace")
        return MeshError(f"The peer sent a malformed error envelope: {shown!r}")
    details = envelope.get("details")
    return MeshError.from_code(
        str(envelope.get("code") or MeshError.code),
        str(envelope.get("message") or ""),
        str(envelope.get("agent") or ""),
        str(envelope.get("request_id") or ""),
        details if isinstance(details, dict) else {},
    )


@dataclass(slots=True)  # one per chunk: properties would cost more than fields
class Reply:
    """A reply or a frame as received by the caller; `accepted` if it only acknowledges the request.

    `body` is JSON, an error envelope if `error`. `seq` is the number of a chunk, on an end frame their count.
    """

    body: bytes
    error: bool = False
    accepted: bool = False
    no_responders: bool = False
    seq: int | None = None
    end: bool = False
    instance: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_error_frame(self) -> bool:
        """Whether it ends a stream or a publisher's run with an error."""
        return self.end and self.error


def decode_reply(head: bytes, body: bytes) -> Reply:
    """Decode a reply or a frame."""
    if not head:
        return Reply(body)
    headers = read_headers(head)
    get = headers.get
    status = get(subjects.STATUS)
    return Reply(
        body,
        error=status == "error",
        accepted=status == "accepted",
        no_responders=get(INLINE_STATUS) == _NO_RESPONDERS,
        seq=parse_int(get(subjects.STREAM_SEQ)),
        end=get(subjects.STREAM_END) == "true",
        instance=get(subjects.INSTANCE_ID, ""),
        headers=headers,
    )


def decode_frame(head: bytes, body: bytes) -> Reply:
    """Decode a frame of a stream; a plain chunk in a fifth of the time of `decode_reply`."""
    chunk = _CHUNK_RE.fullmatch(head)
    if chunk is None:
        return decode_reply(head, body)
    # Positional arguments, for speed.
    return Reply(body, False, False, False, int(chunk[2]), False, chunk[1].decode(), _NO_HEADERS)  # noqa: FBT003


def is_no_responders(head: bytes) -> bool:
    """Whether a header block is NATS' 503: the subject has no subscription."""
    return read_headers(head).get(INLINE_STATUS) == _NO_RESPONDERS


def credit_headers(credit: int) -> bytes:
    """The header block that grants a stream's host more credit."""
    return write_headers({subjects.CREDIT: str(credit)})


def cancel_headers(*, timed_out: bool) -> bytes:
    """The header block of a cancel: a credit of 0; `timed_out` when the caller's timeout expired."""
    status = {subjects.STATUS: "timeout"} if timed_out else {}
    return write_headers({subjects.CREDIT: "0", **status})


def is_timeout_cancel(head: bytes) -> bool:
    """Whether a cancel was sent because the caller's timeout expired."""
    return read_headers(head).get(subjects.STATUS) == "timeout"


def decode_credit(head: bytes) -> int:
    """The credit that a reader grants; 0 for a cancel and for NATS' 503."""
    return parse_int(read_headers(head).get(subjects.CREDIT)) or 0
