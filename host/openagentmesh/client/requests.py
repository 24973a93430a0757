"""Requests to agents: call, stream and send (protocol §7)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Final, Literal

from openagentmesh.agent.call import within_deadline
from openagentmesh.agent.client_middleware import ClientMiddlewares, ClientOperation
from openagentmesh.client.pending import PendingRequests
from openagentmesh.client.replies import Callback, ReplyCallbacks
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import InvalidInput, MeshError, MeshTimeout
from openagentmesh.serving.router import Router
from openagentmesh.serving.streams import WINDOW, ChunkReader
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import RECOVERY_RETRY_S, Inbox, set_exception, set_result
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_within

log = logging.getLogger(__name__)

# How long the callbacks of `send` may take when the mesh is closed.
_CALLBACK_GRACE_S: Final = 1.0

Headers = Mapping[str, str] | None
Decode = Callable[[bytes], Any]


class RequestClient:
    """Calls, streams and sends, each within the client middlewares.

    While the node drains, agents of its own `router` receive requests directly.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that a request uses
        self,
        connection: Connection,
        inbox: Inbox,
        pending: PendingRequests,
        instance_id: str,
        middlewares: ClientMiddlewares,
        router: Router,
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._pending = pending
        self._instance_id = instance_id
        self._middlewares = middlewares
        self._router = router
        self._sending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Fail all pending requests; running callbacks may finish within a second."""
        self._pending.fail_all()
        if self._sending:
            await asyncio.wait(self._sending, timeout=_CALLBACK_GRACE_S)
        if still_running := await cancel_within(_CALLBACK_GRACE_S, self._sending):
            log.error("%d callbacks of send do not stop", len(still_running))

    async def call(
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Headers,
        decode: Decode = codec.decode,
    ) -> Any:  # noqa: ANN401 - as `decode` returns
        """Send one request and return the first answer, or raise the error that came instead."""
        timeout, began = within_deadline(timeout), asyncio.get_running_loop().time()
        request = _operation("call", name, payload, headers)
        if not self._middlewares:
            return await self._call(request, timeout, decode)
        async with self._middlewares.around(request, timeout):
            return await self._call(request, time_left(timeout, began), decode)

    async def _call(self, request: ClientOperation, timeout: float | None, decode: Decode) -> Any:  # noqa: ANN401 - as `decode` returns
        self._pending.check(request.target, "call")
        head = codec.request_headers(
            request.request_id, self._instance_id, timeout=timeout, accept=codec.ACK, extra=request.headers
        )
        try:
            async with asyncio.timeout(timeout) as limit:
                reply = await self._exchange(request, head, limit)
                while reply.no_responders and self._connection.is_recovering:
                    await asyncio.sleep(RECOVERY_RETRY_S)
                    reply = await self._exchange(request, head, limit)
                return decode(await self._ok_body(reply, request.target, "call"))
        except TimeoutError:
            raise _timeout(request.subject, timeout, request) from None
        except MeshError as exc:
            raise _located(exc, request) from exc.__cause__

    async def _exchange(self, request: ClientOperation, head: bytes, limit: asyncio.Timeout) -> codec.Reply:
        """One request out, the first answer in; a cancelled exchange cancels the handler."""
        name, found = request.target, asyncio.get_running_loop().create_future()
        with self._pending.watch(name, "call", partial(set_exception, found)) as pending:

            def receive(message: Message) -> None:
                reply = codec.decode_reply(message.head, message.body)
                if reply.accepted:
                    self._pending.accepted(pending, reply.instance, message.reply)
                else:
                    set_result(found, reply)

            inbox = self._inbox.register(receive)
            try:
                await self._publish(name, request.body, head, inbox)
                reply: codec.Reply = await found
            except BaseException:
                await self._pending.cancel(pending, inbox, timed_out=limit.expired())
                raise
            self._inbox.unregister(inbox)
            if not reply.no_responders:
                self._pending.mark_known(name)
            return reply

    def stream(  # noqa: PLR0913, PLR0917 - what `stream` takes
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Headers,
        total: float | None = None,
        decode: Decode = codec.decode,
    ) -> AsyncGenerator[Any, None]:
        """Send one request and yield its chunks: `timeout` seconds for each, `total` for all."""
        request = _operation("stream", name, payload, headers)
        stream = self._stream_within_middlewares if self._middlewares else self._stream
        return stream(request, timeout, total, decode)

    async def _stream_within_middlewares(
        self, request: ClientOperation, timeout: float | None, total: float | None, decode: Decode
    ) -> AsyncGenerator[Any, None]:
        began = asyncio.get_running_loop().time()
        async with (
            self._middlewares.around(request, timeout),
            aclosing(self._stream(request, timeout, time_left(total, began), decode)) as chunks,
        ):
            async for chunk in chunks:
                request.chunks += 1
                yield chunk

    async def _stream(
        self, request: ClientOperation, timeout: float | None, total: float | None, decode: Decode
    ) -> AsyncGenerator[Any, None]:
        name, request_id = request.target, request.request_id
        self._pending.check(name, "stream")
        _check_token(request_id)
        timeout, subject = within_deadline(timeout, streaming=True), subjects.stream(request_id)
        head = codec.request_headers(
            request_id,
            self._instance_id,
            timeout=timeout,
            streaming=True,
            credit=WINDOW,
            accept=codec.ACK,
            extra=request.headers,
        )
        reader = ChunkReader(self._inbox.deliver, name, request_id, timeout, total)
        # Not the chunks' own subject: a subscription on all of the mesh would hide NATS' 503.
        inbox = self._inbox.register(reader.receive)
        sid = await self._connection.subscribe(subject, reader.receive)
        timed_out = False
        with self._pending.watch(name, "stream", reader.fail) as pending:
            reader.on_instance = partial(self._pending.accepted, pending)
            try:
                await self._publish(name, request.body, head, inbox)
                while not reader.ended:
                    frame = await reader.next()
                    if frame.no_responders and self._connection.is_recovering:
                        await asyncio.sleep(RECOVERY_RETRY_S)
                        await self._publish(name, request.body, head, inbox)
                    elif frame.error or frame.no_responders:
                        await self._ok_body(frame, name, "stream")
                    elif not frame.end:
                        yield decode(frame.body)
                        if reader.acknowledge():
                            await reader.grant()
            except TimeoutError:
                timed_out, waited = True, total if reader.is_overdue else timeout
                raise _timeout(subject, waited, request) from None
            except MeshError as exc:
                raise _located(exc, request) from exc.__cause__
            finally:
                if reader.ended:
                    self._inbox.unregister(inbox)
                else:
                    await self._pending.cancel(pending, inbox, timed_out=timed_out)
                await self._unsubscribe(sid)

    async def send(  # noqa: PLR0913 - what `send` takes
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Headers,
        *,
        on_reply: Callback | None = None,
        on_error: Callback | None = None,
        reply_to: str = "",
    ) -> None:
        """Send one request without waiting; replies go to `on_reply`, to `reply_to`, or nowhere."""
        replies = None if on_reply is None else ReplyCallbacks(name, on_reply, on_error)
        request = _operation("send", name, payload, headers)
        if not self._middlewares:
            await self._send(request, timeout, replies, reply_to)
            return
        async with self._middlewares.around(request, timeout):
            await self._send(request, timeout, replies, reply_to)

    async def _send(
        self, request: ClientOperation, timeout: float | None, replies: ReplyCallbacks | None, reply_to: str
    ) -> None:
        name, body = request.target, request.body
        self._pending.check(name, "send")
        head = codec.request_headers(
            request.request_id,
            self._instance_id,
            timeout=timeout if replies else None,
            credit=WINDOW if replies else 0,
            accept="" if replies or reply_to else codec.NO_REPLY,
            reply_to=reply_to,
            extra=request.headers,
        )
        try:
            if replies is not None:
                await self._send_for_replies(replies, request, head, timeout)
            elif reply_to:
                await self._send_with_reply_to(name, body, head, reply_to)
            else:
                while not await self._has_responders(name, body, head):
                    await self._wait_for_recovery(name)
                await self._pending.check_delivered(name, "send")
        except MeshError as exc:
            raise _located(exc, request) from exc.__cause__

    async def _send_with_reply_to(self, name: str, body: bytes, head: bytes, reply_to: str) -> None:
        """Send with a reply subject of the caller's, on which a 503 is received, too."""
        if subjects.invalid_subject(reply_to):
            raise InvalidInput(f"{reply_to!r} is not a subject to reply to: no wildcards, no blanks.")
        if await self._pending.is_registered(name, "send"):
            await self._publish(name, body, head, reply_to)
            return
        no_responders = asyncio.Event()

        def receive(message: Message) -> None:
            if codec.is_no_responders(message.head):
                no_responders.set()

        sid = await self._connection.subscribe(reply_to, receive)
        try:
            while True:
                await self._publish(name, body, head, reply_to)
                if self._connection.connected:
                    await self._connection.flush()  # a 503 arrives before its PONG
                if not no_responders.is_set():
                    break
                await self._wait_for_recovery(name)
                no_responders.clear()
        finally:
            await self._unsubscribe(sid)
        await self._pending.check_delivered(name, "send")

    async def _has_responders(self, name: str, body: bytes, head: bytes) -> bool:
        if self._router.is_draining and self._router.receive_local(name, _message(name, "", head, body)):
            return True
        return await self._inbox.has_responders(subjects.agent(name), body, head)

    async def _wait_for_recovery(self, name: str) -> None:
        """Wait a moment while hosts reconnect to a restarted server; raise when they have had time to."""
        if not self._connection.is_recovering:
            raise await self._pending.no_responders(name, "send")
        await asyncio.sleep(RECOVERY_RETRY_S)

    async def _publish(self, name: str, body: bytes, head: bytes, reply: str) -> None:
        if self._router.is_draining and self._router.receive_local(name, _message(name, reply, head, body)):
            return
        await self._connection.publish(subjects.agent(name), body, head, reply)

    async def _send_for_replies(
        self, replies: ReplyCallbacks, request: ClientOperation, head: bytes, timeout: float | None
    ) -> None:
        name, request_id = request.target, request.request_id
        _check_token(request_id)
        subject = subjects.results(request_id)
        reader = ChunkReader(self._inbox.deliver, name, request_id, timeout)
        async with AsyncExitStack() as stack:
            sid = await self._connection.subscribe(subject, reader.receive)
            stack.push_async_callback(self._unsubscribe, sid)
            stack.enter_context(self._pending.watch(name, "send", reader.fail))
            publish = partial(self._publish, name, request.body, head, subject)
            await publish()
            # From here on the task owns the subscription.
            reading = self._read_replies(replies, request, reader, publish, stack.pop_all())
            task = asyncio.create_task(reading)
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _unsubscribe(self, sid: int) -> None:
        if not self._connection.is_closed:
            await self._connection.unsubscribe(sid)

    async def _read_replies(
        self,
        replies: ReplyCallbacks,
        request: ClientOperation,
        reader: ChunkReader,
        publish: Callable[[], Awaitable[None]],
        subscription: AsyncExitStack,
    ) -> None:
        """Pass replies, or the error that ended them, to the callbacks; `publish` repeats the request."""
        try:
            async with subscription:
                while True:
                    frame = await reader.next()
                    if frame.no_responders and self._connection.is_recovering:
                        await asyncio.sleep(RECOVERY_RETRY_S)
                        await publish()
                        continue
                    body = await self._ok_body(frame, request.target, "send")
                    if not frame.end:
                        await replies.reply(codec.decode(body))
                        if reader.acknowledge():
                            await reader.grant()
                    if frame.end or frame.seq is None:
                        return
        except TimeoutError:
            subject = subjects.results(request.request_id)
            await replies.fail(_timeout(subject, reader.timeout, request))
        except MeshError as exc:
            await replies.fail(_located(exc, request))

    async def _ok_body(self, reply: codec.Reply, name: str, verb: Verb) -> bytes:
        """The body of an ok reply; raises the error of an error reply and of NATS' 503."""
        if reply.no_responders:
            raise await self._pending.no_responders(name, verb)
        if reply.error:
            raise codec.decode_error(reply.body)
        return reply.body


def _message(name: str, reply: str, head: bytes, body: bytes) -> Message:
    return Message(subjects.agent(name), reply, head, body)


def time_left(seconds: float | None, began: float) -> float | None:
    """The rest of `seconds` that began at `began`, by the event loop's clock; None for no limit."""
    return None if seconds is None else max(0.0, began + seconds - asyncio.get_running_loop().time())


def _operation(
    verb: Literal["call", "stream", "send"], name: str, payload: object, headers: Headers
) -> ClientOperation:
    own = dict(headers or {})
    own[subjects.REQUEST_ID] = own.get(subjects.REQUEST_ID) or codec.new_id()
    return ClientOperation(verb, name, codec.encode(payload), own)


def _check_token(request_id: str) -> None:
    if not subjects.is_token(request_id):
        raise InvalidInput(f"The request id {request_id!r} cannot be part of a subject.")


def _timeout(subject: str, timeout: float | None, request: ClientOperation) -> MeshTimeout:
    return MeshTimeout(
        f"No message on {subject} within {timeout if timeout is None else round(timeout, 3)}s",
        agent=request.target,
        request_id=request.request_id,
        details={"subject": subject, "timeout": timeout},
    )


def _located(error: MeshError, request: ClientOperation) -> MeshError:
    """The error with the agent and the id of its request."""
    error.agent = error.agent or request.target
    error.request_id = request.request_id
    return error
