"""The library's errors: tried again, and in words for people."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from openagentmesh.protocol.errors import ConnectionFailed, PayloadTooLarge, error_text
from openagentmesh.transport.connection import Bus

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


def retrying(bus: Bus, patience: float, *what: type[Exception]) -> AsyncRetrying:
    """Try again for `patience` seconds what fails by these errors, unless the connection is closed.

    Full jitter: those who collide once do not collide again.
    """
    return AsyncRetrying(
        retry=retry_if_exception(lambda exc: isinstance(exc, what) and not bus.is_closed),
        wait=wait_random_exponential(multiplier=0.02, max=1.0),
        stop=stop_after_delay(patience),
        reraise=True,
    )


def _why(exc: Exception) -> str:
    if isinstance(exc, ServiceUnavailableError) and exc.err_code in _NO_JETSTREAM:
        return "JetStream is off; start the server with `nats-server -js`, or enable it for this account"
    if isinstance(exc, APIError):
        return f"the server says '{exc.description}' (code {exc.err_code or exc.code})"
    if isinstance(exc, NoStreamResponseError):
        return "nobody stores it; the bucket has been deleted, or JetStream has been turned off"
    if isinstance(exc, TimeoutError):
        return "no answer in time; the server is too busy, or does not let this user use JetStream"
    return error_text(exc)
