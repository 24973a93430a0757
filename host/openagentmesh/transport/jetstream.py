"""JetStream without the library: acknowledgements, and the last message in two thirds of its time."""

from typing import Any, Final

from nats.js.errors import APIError, NoStreamResponseError
from pydantic_core import from_json, to_json

from openagentmesh.protocol import codec
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

_REQUEST_TIMEOUT_S: Final = 5.0
# The server's error code; its other 404s mean that the stream does not exist.
NO_MESSAGE: Final = 10037


async def last_message(inbox: Inbox, stream: str, subject: str) -> dict[str, Any] | None:
    """The stream's last message on a subject or a pattern, as the server's API describes it; None for none.

    Raises the library's errors, and MeshTimeout if the server does not answer.
    """
    body = to_json({"last_by_subj": subject})
    reply = await inbox.request(f"$JS.API.STREAM.MSG.GET.{stream}", body, timeout=_REQUEST_TIMEOUT_S)
    if codec.is_no_responders(reply.head):
        raise NoStreamResponseError
    response = from_json(reply.body)
    if error := response.get("error"):
        if error.get("err_code") == NO_MESSAGE:
            return None
        APIError.from_error(error)
    message: dict[str, Any] = response["message"]
    return message


async def last_revision(inbox: Inbox, stream: str, subject: str) -> int:
    """The sequence of the stream's last message on a subject or a pattern; 0 for none."""
    message = await last_message(inbox, stream, subject)
    return message["seq"] if message else 0


def check_ack(ack: Message) -> None:
    """Raise NoStreamResponseError or APIError unless a stream has stored the message."""
    if not ack.body:
        raise NoStreamResponseError
    if error := from_json(ack.body).get("error"):
        APIError.from_error(error)
