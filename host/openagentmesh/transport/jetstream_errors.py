"""JetStream's errors: retried where that helps, and translated to MeshErrors."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError, NoStreamResponseError, ServiceUnavailableError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay

from openagentmesh.protocol.errors import ConnectionFailed, MeshTimeout, PayloadTooLarge, error_text
from openagentmesh.transport.backoff import jittered_backoff
from openagentmesh.transport.connection import Connection

# How long an operation may take, its retries included.
TIMEOUT_S: Final = 30.0
# The server's error codes for limits of the account, of the server, of the bucket.
_LIMIT_CODES: Final = frozenset({10002, 10023, 10047, 10054, 10077})
# JetStream is disabled for the account or on the server; None when its API has no responders.
_NO_JETSTREAM: Final = frozenset({10039, 10076, None})
_MAX_STREAMS: Final = 10027


@contextmanager
def translated_errors(connection: Connection, action: str) -> Iterator[None]:
    """Raise the library's errors in the block as PayloadTooLarge or ConnectionFailed, naming the `action`."""
    try:
        yield
    except MaxPayloadError as exc:
        raise PayloadTooLarge(f"{action} failed: it is larger than the server's max_payload.") from exc
    except (NatsError, TimeoutError, MeshTimeout, asyncio.InvalidStateError) as exc:
        if isinstance(exc, APIError) and exc.err_code in _LIMIT_CODES:
            raise PayloadTooLarge(f"{action} failed: no space on the server ({exc.description}).") from exc
        if not connection.connected:
            reason = "the connection is closed" if connection.is_closed else "the server is unreachable"
            raise ConnectionFailed(f"{action} failed: {reason}.") from exc
        raise ConnectionFailed(f"{action} failed: {_reason(exc)}.") from exc


def retrying(connection: Connection, *errors: type[Exception]) -> AsyncRetrying:
    """Retry for TIMEOUT_S on these errors; without any, on errors of the library that may be temporary."""

    def is_retried(exc: BaseException) -> bool:
        is_listed = isinstance(exc, errors) if errors else _is_temporary(exc, connection)
        return is_listed and not connection.is_closed

    return AsyncRetrying(
        retry=retry_if_exception(is_retried),
        wait=jittered_backoff(0.02, 1.0),
        stop=stop_after_delay(TIMEOUT_S),
        reraise=True,
    )


def _is_temporary(exc: BaseException, connection: Connection) -> bool:
    """Whether a retry may succeed: not without JetStream, nor when the account may have no more streams."""
    if isinstance(exc, ServiceUnavailableError) and exc.err_code in _NO_JETSTREAM:
        # Right after a server's start its JetStream may not answer yet.
        return exc.err_code is None and bool(connection.server.get("jetstream"))
    is_refused = isinstance(exc, APIError) and exc.err_code == _MAX_STREAMS
    return isinstance(exc, NatsError | TimeoutError) and not is_refused


def _reason(exc: Exception) -> str:
    if isinstance(exc, ServiceUnavailableError) and exc.err_code in _NO_JETSTREAM:
        return "JetStream is off; start the server with `nats-server -js`, or enable it for this account"
    if isinstance(exc, APIError):
        return f"the server reported '{exc.description}' (code {exc.err_code or exc.code})"
    if isinstance(exc, NoStreamResponseError):
        return "no stream stores it; the bucket was deleted, or JetStream was turned off"
    if isinstance(exc, TimeoutError | MeshTimeout):
        return "no answer in time; the server is overloaded, or this user may not use JetStream"
    return error_text(exc)
