"""The library's errors in words for people."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError

from openagentmesh.bus.connection import Bus
from openagentmesh.protocol.errors import ConnectionFailed, PayloadTooLarge, text_of

# The server's own error codes: limits of the account, of the server, of the bucket.
_NO_ROOM: Final = frozenset({10002, 10023, 10047, 10054, 10077})
# JetStream is off for the account or on the server; None when nobody answers for its API.
_NO_JETSTREAM: Final = frozenset({10039, 10076, None})


@contextmanager
def explained(bus: Bus, what: str) -> Iterator[None]:
    """Turn what the library raises in here into what we raise; `what` begins a sentence.

    Raises:
        PayloadTooLarge: the server has no room for it.
        ConnectionFailed: anything else that the library raised.

    """
    try:
        yield
    except MaxPayloadError as exc:
        raise PayloadTooLarge(f"{what} failed: it is larger than the server takes.") from exc
    except (NatsError, TimeoutError, asyncio.InvalidStateError) as exc:
        if isinstance(exc, APIError) and exc.err_code in _NO_ROOM:
            raise PayloadTooLarge(f"{what} failed: no room on the server ({exc.description}).") from exc
        if not bus.connected:
            why = "the connection is closed" if bus.is_closed else "the server is away"
            raise ConnectionFailed(f"{what} failed: {why}.") from exc
        raise ConnectionFailed(f"{what} failed: {_why(exc)}.") from exc


def _why(exc: Exception) -> str:
    if isinstance(exc, ServiceUnavailableError) and exc.err_code in _NO_JETSTREAM:
        return "JetStream is off; start the server with `nats-server -js`, or enable it for this account"
    if isinstance(exc, APIError):
        return f"the server says '{exc.description}' (code {exc.err_code or exc.code})"
    if isinstance(exc, NoStreamResponseError):
        return "nobody stores it; the bucket has been deleted, or JetStream has been turned off"
    if isinstance(exc, TimeoutError):
        return "no answer in time; the server is too busy, or does not let this user use JetStream"
    return text_of(exc)
