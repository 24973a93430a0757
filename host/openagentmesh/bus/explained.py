"""The library's errors in words for people."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError

from openagentmesh.bus.connection import Bus
from openagentmesh.protocol.errors import ConnectionFailed, PayloadTooLarge, text_of

# The server's own error codes: limits of the account, of the server, of the bucket.
_NO_ROOM: Final = frozenset({10002, 10023, 10047, 10054, 10077})


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
        raise ConnectionFailed(
            f"{what} failed: {text_of(exc)}. Is JetStream enabled on the server (`nats-server -js`)?"
        ) from exc
