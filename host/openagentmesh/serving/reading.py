"""Reading a request: what its caller did, and where the answer goes."""

from typing import Final

from openagentmesh.agent.handler import Handler
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import InvalidInput
from openagentmesh.transport.nats_client import Message

# Where the mesh and the server themselves are asked.
_OTHERS: Final = ("mesh.", "$")


def verb_of(request: Request, reply: str) -> Verb:
    """What the caller did: a streamer may be sent to as well, but not called."""
    if request.streaming:
        return "stream"
    is_call = reply and not request.reply_to and not reply.startswith(subjects.RESULTS)
    return "call" if is_call else "send"


def reply_subject(message: Message, request: Request, handler: Handler, *, overheard: bool) -> str:
    """Where the answer goes; empty when there is to be none.

    A source may listen where others are asked, who answer; so without an output it has nothing to say.
    """
    if overheard and (handler.output is None or message.subject.startswith(_OTHERS)):
        return ""
    return "" if request.accept == codec.NO_REPLY else message.reply


def chunk_subject(request: Request, reply: str) -> str:
    """Where a streamer's chunks go; empty when nobody wants them."""
    if not request.streaming:
        return reply
    if not subjects.is_token(request.request_id):
        raise InvalidInput(
            f"A stream needs the header {subjects.REQUEST_ID}: "
            "at most 128 letters, digits, '_' and '-', for they name the chunks' subject."
        )
    return subjects.stream(request.request_id)


def error_subject(request: Request, reply: str, *, overheard: bool) -> str:
    """Where an error goes: to the subject of a stream's chunks, or to the reply subject.

    What a source overhears is somebody else's stream, and its error nothing for that one's reader.
    """
    if request.streaming and not overheard and subjects.is_token(request.request_id):
        return subjects.stream(request.request_id)
    return reply
