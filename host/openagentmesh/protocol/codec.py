"""Bytes and headers to requests, replies, errors and frames, and back (protocol §6–§8).

Nothing else in the project reads or writes a header.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, from_json, to_json

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import InvalidInput, MeshError
from openagentmesh.protocol.messages import Usage

_VERSION_LINE: Final = "NATS/1.0"
NO_RESPONDERS: Final = "503"
_INLINE_STATUS: Final = "Status"
ACK: Final = "ack"
NO_REPLY: Final = "none"
# Past the adapter, whose own methods take as long again.
_ANYTHING: Final = TypeAdapter[Any](Any).validator
# More detail than this helps nobody and may not fit into a message.
MAX_ERROR_BODY: Final = 64 * 1024
_MAX_DETAIL: Final = 16 * 1024
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
_CHUNK_RE: Final = re.compile(
    rb"NATS/1\.0\r\nX-Mesh-Request-Id: [!-~]*\r\nX-Mesh-Instance-Id: ([!-~]*)\r\n"
    rb"X-Mesh-Stream-Seq: ([0-9]{1,12})\r\nX-Mesh-Stream-End: false\r\n\r\n"
)
# An id is echoed in headers, so what a stranger sends as one is bounded.
_ID_RE: Final = re.compile(r"[!-~]{1,256}")


def new_id() -> str:
    """A fresh request or instance id: 32 hexadecimal digits."""
    return uuid4().hex


def write_headers(headers: Mapping[str, str]) -> bytes:
    """Headers as NATS puts them before a body; empty for none.

    Raises:
        InvalidInput: a name or a value would break the message apart.

    """
    if not headers:
        return b""
    block = "\r\n".join([_VERSION_LINE, *[f"{k}: {v}" for k, v in headers.items()], "", ""])
    # One comparison for the usual case: every line break must be one we put there.
    if block.count("\n") != len(headers) + 2 or block.count("\r") != len(headers) + 2:
        raise InvalidInput("A header has a line break in its name or value. Take it out.")
    try:
        return block.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"A header cannot be sent as UTF-8: {exc}.") from exc


def read_headers(head: bytes) -> dict[str, str]:
    """A header block as a dict; an inline status such as `503` is under `Status`."""
    first, *lines = head.decode("utf-8", "replace").split("\r\n")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    if len(first) > len(_VERSION_LINE):
        headers[_INLINE_STATUS] = first[len(_VERSION_LINE) :].strip()[:3]
    return headers


def dump(payload: object) -> bytes:
    """A payload as it goes out: None is empty, bytes as they are, everything else JSON.

    Raises:
        InvalidInput: the payload is not JSON.

    """
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


def load(body: bytes) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """A received body as the JSON value it is; an empty one is None.

    Raises:
        MeshError: the body is no JSON.

    """
    if not body:
        return None
    try:
        return _ANYTHING.validate_json(body)
    except ValueError as exc:
        raise MeshError(f"A body of {len(body)} bytes is no JSON: {exc}") from exc


@dataclass(slots=True)  # one is made a request: frozen would cost a microsecond
class Request:
    """One request as it came off the wire."""

    request_id: str
    caller: str
    streaming: bool
    timeout: float | None
    credit: int
    accept: str
    reply_to: str
    body: bytes
    headers: Mapping[str, str]


def read_request(head: bytes, body: bytes) -> Request:
    """Take a request apart. Never raises: what is malformed counts as not sent."""
    headers = read_headers(head) if head else {}
    get = headers.get
    timeout_ms = _whole_number(get(subjects.TIMEOUT_MS))
    request_id = get(subjects.REQUEST_ID, "")
    return Request(
        request_id if _ID_RE.fullmatch(request_id) else "",
        get(subjects.INSTANCE_ID, ""),
        get(subjects.STREAM) == "true",
        None if timeout_ms is None else timeout_ms / 1000,
        _whole_number(get(subjects.CREDIT)) or 0,
        get(subjects.ACCEPT, ""),
        get(subjects.REPLY_TO, ""),
        body,
        headers,
    )


def request_headers(  # noqa: PLR0913 - one parameter a header
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
    """The header block of a request; `timeout` in seconds, `extra` are the user's own.

    With `accept` ACK the host tells when it has the request in hand and listens for a cancel,
    with NO_REPLY it answers nothing: the reply subject is there for NATS' 503.
    """
    headers = {subjects.REQUEST_ID: request_id, subjects.INSTANCE_ID: instance_id}
    if timeout is not None and timeout != math.inf:
        if not timeout > -math.inf:
            raise InvalidInput(f"A timeout is a number of seconds, or None for ever; this is {timeout!r}.")
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
    """The header block of the frame that says who has a request in hand."""
    return _head(request_id, instance_id, "X-Mesh-Status: accepted\r\n")


def reply_headers(request_id: str, instance_id: str, agent: str, usage: Usage | None = None) -> bytes:
    """The header block of an ok reply."""
    return _head(
        request_id, instance_id, f"X-Mesh-Status: ok\r\nX-Mesh-Source: {agent}\r\n{_usage_line(usage)}"
    )


def frame_start(request_id: str, instance_id: str) -> bytes:
    """What all frames of one stream begin with; a publisher's have no request id."""
    request = f"X-Mesh-Request-Id: {request_id}\r\n" if request_id else ""
    return f"NATS/1.0\r\n{request}X-Mesh-Instance-Id: {instance_id}\r\n".encode()


def frame_headers(start: bytes, seq: int, extra: Mapping[str, str] | None = None) -> bytes:
    """The header block of a chunk or an event, after its stream's `frame_start`."""
    more = write_headers(extra)[len(_VERSION_LINE) + 2 : -2] if extra else b""
    return b"%b%bX-Mesh-Stream-Seq: %d\r\nX-Mesh-Stream-End: false\r\n\r\n" % (start, more, seq)


def end_headers(start: bytes, count: int, usage: Usage | None = None) -> bytes:
    """The header block of the end frame, which carries the count of chunks."""
    tail = f"X-Mesh-Stream-Seq: {count}\r\nX-Mesh-Stream-End: true\r\n{_usage_line(usage)}\r\n"
    return start + tail.encode()


def _head(request_id: str, instance_id: str, lines: str) -> bytes:
    # A third of the time of `write_headers`; every value here is known to be harmless.
    return (
        f"NATS/1.0\r\nX-Mesh-Request-Id: {request_id}\r\nX-Mesh-Instance-Id: {instance_id}\r\n{lines}\r\n"
    ).encode()


def _usage_line(usage: Usage | None) -> str:
    if usage is None:
        return ""
    # Escaped, a model's name with a line break stays within its header.
    return f"X-Mesh-Usage: {json.dumps(usage.model_dump(exclude_none=True))}\r\n"


def publish_headers(instance_id: str, kind: str, extra: Mapping[str, str] | None = None) -> bytes:
    """The header block of what `publish()` sends (protocol §6); `kind` is the body's content type."""
    headers = {subjects.INSTANCE_ID: instance_id, subjects.CONTENT_TYPE: kind}
    return write_headers(headers | dict(extra or {}))


def dump_message(payload: object) -> tuple[str, bytes]:
    """What `publish()` sends, as a content type and a body.

    Raises:
        InvalidInput: the payload is neither text, bytes nor JSON.

    """
    if isinstance(payload, str):
        return "text/plain", _utf8(payload)
    if isinstance(payload, bytes | bytearray | memoryview):
        return "application/octet-stream", bytes(payload)
    return "application/json", dump(payload)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"The text cannot be sent as UTF-8: {exc}.") from exc


def load_message(headers: Mapping[str, str], body: bytes) -> Any:  # noqa: ANN401 - a JSON value, text or bytes
    """The body of a message as what it was published as; what is no JSON stays bytes."""
    kind = headers.get(subjects.CONTENT_TYPE, "")
    if kind == "application/octet-stream":
        return body
    try:
        return body.decode() if kind == "text/plain" else load(body)
    except (UnicodeDecodeError, MeshError):
        return body


def error_headers(request_id: str, instance_id: str, *, frame: bool = False) -> bytes:
    """The header block of an error reply or copy; of a stream's error frame with `frame`.

    A publisher's error belongs to no request; then there is no request id.
    """
    headers = {subjects.REQUEST_ID: request_id} if request_id or not frame else {}
    headers |= {subjects.INSTANCE_ID: instance_id, subjects.STATUS: "error"}
    if frame:
        headers[subjects.STREAM_END] = "true"
    return write_headers(headers)


def error_body(error: MeshError) -> bytes:
    """An error as its envelope; always JSON of bounded size, whatever the details are."""
    body = _envelope(error)
    if len(body) <= MAX_ERROR_BODY:
        return body
    message = error.message[:_MAX_DETAIL]
    return _envelope(MeshError(error.code, message, error.agent, error.request_id, {"truncated": True}))


def _envelope(error: MeshError) -> bytes:
    envelope = error.to_dict()
    # What a handler puts into its error may refuse everything, even to be printed.
    try:
        return to_json(envelope, inf_nan_mode="null", serialize_unknown=True)
    except Exception:  # noqa: BLE001 - answered with what is left of it
        texts = {
            key: str(value).encode("utf-8", "replace").decode()
            for key, value in envelope.items()
            if key != "details"
        }
        return to_json(texts | {"details": {"unprintable": True}})


def read_error(body: bytes) -> MeshError:
    """An error envelope as the error it stands for; a broken one is a plain MeshError."""
    try:
        envelope = from_json(body)
    except ValueError:
        envelope = None
    if not isinstance(envelope, dict):
        shown = body[:200].decode("utf-8", "replace")
        return MeshError(f"The peer sent an error that is no error envelope: {shown!r}")
    details = envelope.get("details")
    return MeshError.from_code(
        str(envelope.get("code") or MeshError.code),
        str(envelope.get("message") or ""),
        str(envelope.get("agent") or ""),
        str(envelope.get("request_id") or ""),
        details if isinstance(details, dict) else {},
    )


@dataclass(slots=True)  # one is made a chunk: properties would cost more than fields
class Answer:
    """A reply or a frame, as a caller sees it.

    With `error` the body is an error envelope; `accepted` only says that `instance` has the
    request in hand; `nobody` is NATS' word that there is none.
    """

    body: bytes
    error: bool = False
    accepted: bool = False
    nobody: bool = False
    seq: int | None = None
    end: bool = False
    instance: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ends a stream or a publisher's run with an error."""
        return self.end and self.error


def read_answer(head: bytes, body: bytes) -> Answer:
    """Take a reply or a frame apart."""
    if not head:
        return Answer(body)
    headers = read_headers(head)
    get = headers.get
    status = get(subjects.STATUS)
    return Answer(
        body,
        error=status == "error",
        accepted=status == "accepted",
        nobody=get(_INLINE_STATUS) == NO_RESPONDERS,
        seq=_whole_number(get(subjects.STREAM_SEQ)),
        end=get(subjects.STREAM_END) == "true",
        instance=get(subjects.INSTANCE_ID, ""),
        headers=headers,
    )


def read_frame(head: bytes, body: bytes) -> Answer:
    """Take a frame of a stream apart; a plain chunk in a fifth of the time of `read_answer`."""
    chunk = _CHUNK_RE.fullmatch(head)
    if chunk is None:
        return read_answer(head, body)
    # No keywords, for speed.
    return Answer(body, False, False, False, int(chunk[2]), False, chunk[1].decode(), _NO_HEADERS)  # noqa: FBT003


def credit_headers(credit: int) -> bytes:
    """The header block of a grant to a stream's host."""
    return write_headers({subjects.CREDIT: str(credit)})


def cancel_headers(*, late: bool) -> bytes:
    """The header block of a cancel: a grant of 0, for nobody waits any more; `late` when time was up."""
    status = {subjects.STATUS: "timeout"} if late else {}
    return write_headers({subjects.CREDIT: "0", **status})


def is_late(head: bytes) -> bool:
    """Whether a cancel says that its sender's time was up."""
    return read_headers(head).get(subjects.STATUS) == "timeout"


def read_credit(head: bytes) -> int:
    """How many chunks more a reader takes; 0 when it is gone (also NATS' 503)."""
    return _whole_number(read_headers(head).get(subjects.CREDIT)) or 0


def _whole_number(text: str | None) -> int | None:
    # str.isdigit also accepts digits of other scripts, and int() of a huge one is slow.
    if text and len(text) <= 12 and text.isascii() and text.isdigit():  # noqa: PLR2004 - a trillion
        return int(text)
    return None
