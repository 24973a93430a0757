"""A caller's side: call, stream and send (protocol §7)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from inspect import isawaitable
from typing import Any, Final

from openagentmesh.agent.call import within_deadline
from openagentmesh.client.pending import Waits
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import Verb
from openagentmesh.protocol.errors import InvalidInput, MeshError, MeshTimeout
from openagentmesh.serving.streams import WINDOW, ChunkReader
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import RECOVERY_RETRY_S, Inbox, set_exception, set_result
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_within

log = logging.getLogger(__name__)

# How long the callbacks of `send` may take when the mesh is left, in seconds.
_CALLBACK_GRACE: Final = 1.0

Headers = Mapping[str, str] | None
Callback = Callable[[Any], object]


class Caller:
    """Calls, streams and sends over one connection.

    Attributes:
        inside: takes a request for an agent of this very node while nobody else reaches that;
            tells whether it did.

    """

    def __init__(self, connection: Connection, inbox: Inbox, waits: Waits, instance_id: str) -> None:
        self._connection = connection
        self._inbox = inbox
        self._waits = waits
        self._instance_id = instance_id
        self._sending: set[asyncio.Task[None]] = set()
        self.inside: Callable[[str, Message], bool] = lambda _name, _message: False

    async def close(self) -> None:
        """Let nobody wait any more; callbacks that run may finish within a second."""
        self._waits.fail_all()
        if self._sending:
            await asyncio.wait(self._sending, timeout=_CALLBACK_GRACE)
        if deaf := await cancel_within(_CALLBACK_GRACE, self._sending):
            log.error("%d callbacks of send do not stop", len(deaf))

    async def call(self, name: str, payload: object, timeout: float | None, headers: Headers) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Send one request and return the first answer, or raise what came instead."""
        self._waits.check(name, "call")
        timeout = within_deadline(timeout)
        body, request_id = codec.encode(payload), _request_id(headers)
        head = codec.request_headers(
            request_id, self._instance_id, timeout=timeout, accept=codec.ACK, extra=headers
        )
        try:
            async with asyncio.timeout(timeout) as limit:
                answer = await self._ask(name, body, head, limit)
                while answer.no_responders and self._connection.is_recovering:
                    await asyncio.sleep(RECOVERY_RETRY_S)
                    answer = await self._ask(name, body, head, limit)
                return codec.decode(await self._body(answer, name, "call"))
        except TimeoutError:
            raise _timeout(subjects.agent(name), timeout, name, request_id) from None
        except MeshError as exc:
            raise _with_id(exc, name, request_id) from exc.__cause__

    async def _ask(self, name: str, body: bytes, head: bytes, limit: asyncio.Timeout) -> codec.Reply:
        """One message out, the first answer back; who stops waiting for it stops the handler."""
        found: asyncio.Future[codec.Reply] = asyncio.get_running_loop().create_future()
        with self._waits.watched(name, "call", lambda exc: set_exception(found, exc)) as waiting:

            def receive(message: Message) -> None:
                answer = codec.decode_reply(message.head, message.body)
                if answer.accepted:
                    self._waits.accepted(waiting, answer.instance, message.reply)
                else:
                    set_result(found, answer)

            reply = self._inbox.register(receive)
            try:
                await self._publish(name, body, head, reply)
                answer = await found
            except BaseException:
                await self._waits.cancel(waiting, reply, late=limit.expired())
                raise
            self._inbox.unregister(reply)
            if not answer.no_responders:
                self._waits.now_known(name)
            return answer

    async def stream(
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Headers,
        total: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send one request and yield its chunks.

        `timeout` seconds from one to the next, and `total` seconds for all.
        """
        self._waits.check(name, "stream")
        timeout = within_deadline(timeout, streaming=True)
        body, request_id = codec.encode(payload), _request_id(headers)
        _check_id(request_id)
        subject = subjects.stream(request_id)
        head = codec.request_headers(
            request_id,
            self._instance_id,
            timeout=timeout,
            streaming=True,
            credit=WINDOW,
            accept=codec.ACK,
            extra=headers,
        )
        reader = ChunkReader(self._inbox.deliver, name, request_id, timeout, total)
        # Not the chunks' own subject: whoever listens to all of the mesh would hide NATS' 503.
        reply = self._inbox.register(reader.receive)
        sid = await self._connection.subscribe(subject, reader.receive)
        late = False
        with self._waits.watched(name, "stream", reader.fail) as waiting:
            reader.on_instance = partial(self._waits.accepted, waiting)
            try:
                await self._publish(name, body, head, reply)
                while not reader.ended:
                    frame = await reader.next()
                    if frame.no_responders and self._connection.is_recovering:
                        await asyncio.sleep(RECOVERY_RETRY_S)
                        await self._publish(name, body, head, reply)
                    elif frame.error or frame.no_responders:
                        await self._body(frame, name, "stream")
                    elif not frame.end:
                        yield codec.decode(frame.body)
                        if reader.took():
                            await reader.grant()
            except TimeoutError:
                late, waited = True, total if reader.is_over else timeout
                raise _timeout(subject, waited, name, request_id) from None
            except MeshError as exc:
                raise _with_id(exc, name, request_id) from exc.__cause__
            finally:
                if reader.ended:
                    self._inbox.unregister(reply)
                else:
                    await self._waits.cancel(waiting, reply, late=late)
                await self._quit(sid)

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
        """Send one request and go on; replies go to `on_reply`, to `reply_to`, or nowhere."""
        self._waits.check(name, "send")
        body, request_id = codec.encode(payload), _request_id(headers)
        head = codec.request_headers(
            request_id,
            self._instance_id,
            timeout=timeout if on_reply else None,
            credit=WINDOW if on_reply else 0,
            accept="" if on_reply or reply_to else codec.NO_REPLY,
            reply_to=reply_to,
            extra=headers,
        )
        try:
            if on_reply is not None:
                replies = Replies(name, request_id, on_reply, on_error)
                await self._send_for_replies(replies, body, head, timeout)
            elif reply_to:
                if subjects.invalid_subject(reply_to):
                    raise InvalidInput(f"{reply_to!r} is no subject to reply to: no wildcards, no blanks.")
                if await self._waits.is_registered(name, "send"):
                    await self._publish(name, body, head, reply_to)
                else:
                    await self._send_off(name, body, head, reply_to)
            else:
                await self._send_off(name, body, head)
        except MeshError as exc:
            raise _with_id(exc, name, request_id) from exc.__cause__

    async def _send_off(self, name: str, body: bytes, head: bytes, reply_to: str = "") -> None:
        """Send, and learn from NATS whether anybody is there."""
        while await self._reaches_nobody(name, body, head, reply_to):
            if not self._connection.is_recovering:
                raise await self._waits.nobody(name, "send")
            await asyncio.sleep(RECOVERY_RETRY_S)
        await self._waits.see_whether_told(name, "send")

    async def _reaches_nobody(self, name: str, body: bytes, head: bytes, reply_to: str) -> bool:
        found: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def receive(message: Message) -> None:
            if codec.decode_reply(message.head, b"").no_responders:
                set_result(found, message)

        async with AsyncExitStack() as stack:
            if reply_to:
                reply, sid = reply_to, await self._connection.subscribe(reply_to, receive)
                stack.push_async_callback(self._quit, sid)
            else:
                reply = self._inbox.register(receive)
                stack.callback(self._inbox.unregister, reply)
            await self._publish(name, body, head, reply)
            if self._connection.connected:
                await self._connection.flush()  # the 503 comes before it
        return found.done()

    async def _publish(self, name: str, body: bytes, head: bytes, reply: str) -> None:
        """Send a request on its way."""
        subject = subjects.agent(name)
        if not self.inside(name, Message(subject, reply, head, body)):
            await self._connection.publish(subject, body, head, reply)

    async def _send_for_replies(
        self, replies: "Replies", body: bytes, head: bytes, timeout: float | None
    ) -> None:
        _check_id(replies.request_id)
        subject = subjects.results(replies.request_id)
        reader = ChunkReader(self._inbox.deliver, replies.agent, replies.request_id, timeout)
        async with AsyncExitStack() as stack:
            sid = await self._connection.subscribe(subject, reader.receive)
            stack.push_async_callback(self._quit, sid)
            stack.enter_context(self._waits.watched(replies.agent, "send", reader.fail))
            publish = partial(self._publish, replies.agent, body, head, subject)
            await publish()
            # From here on the task listens and waits.
            task = asyncio.create_task(self._pass_on(replies, reader, publish, stack.pop_all()))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _quit(self, sid: int) -> None:
        if not self._connection.is_closed:
            await self._connection.unsubscribe(sid)

    async def _pass_on(
        self,
        replies: "Replies",
        reader: ChunkReader,
        publish: Callable[[], Awaitable[None]],
        listening: AsyncExitStack,
    ) -> None:
        """Give each reply to its callback, or the error that ended them; `publish` asks again."""
        name, request_id = replies.agent, replies.request_id
        try:
            async with listening:
                while True:
                    frame = await reader.next()
                    if frame.no_responders and self._connection.is_recovering:
                        await asyncio.sleep(RECOVERY_RETRY_S)
                        await publish()
                        continue
                    body = await self._body(frame, name, "send")
                    if not frame.end:
                        await replies.give(codec.decode(body))
                        if reader.took():
                            await reader.grant()
                    if frame.end or frame.seq is None:
                        return
        except TimeoutError:
            error = _timeout(subjects.results(request_id), reader.timeout, name, request_id)
            await replies.failed(error)
        except MeshError as exc:
            await replies.failed(_with_id(exc, name, request_id))

    async def _body(self, answer: codec.Reply, name: str, verb: Verb) -> bytes:
        """The body of an ok answer; anything else is raised."""
        if answer.no_responders:
            raise await self._waits.nobody(name, verb)
        if answer.error:
            raise codec.decode_error(answer.body)
        return answer.body


class Replies:
    """Where the replies to one `send(on_reply=...)` go: functions, or coroutine functions."""

    def __init__(self, agent: str, request_id: str, on_reply: Callback, on_error: Callback | None) -> None:
        self.agent = agent
        self.request_id = request_id
        self._on_reply = on_reply
        self._on_error = on_error

    async def give(self, value: object) -> None:
        """One reply, or one chunk."""
        await self._run(self._on_reply, value)

    async def failed(self, error: MeshError) -> None:
        """The error that ended them."""
        if self._on_error is not None:
            await self._run(self._on_error, error)
        else:
            log.warning("what was sent to %s failed: [%s] %s", self.agent, error.code, error)

    async def _run(self, callback: Callback, value: object) -> None:
        try:
            result = callback(value)
            if isawaitable(result):
                await result
        # The author's callback ends here, whatever it raises; the next reply still comes.
        except BaseException as exc:
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            log.exception("a callback for replies of %s failed", self.agent)


def _request_id(headers: Headers) -> str:
    return (headers or {}).get(subjects.REQUEST_ID) or codec.new_id()


def _check_id(request_id: str) -> None:
    if not subjects.is_token(request_id):
        raise InvalidInput(f"The request id {request_id!r} cannot be part of a subject.")


def _timeout(subject: str, timeout: float | None, name: str, request_id: str) -> MeshTimeout:
    return MeshTimeout(
        f"No message on {subject} within {timeout if timeout is None else round(timeout, 3)}s",
        agent=name,
        request_id=request_id,
        details={"subject": subject, "timeout": timeout},
    )


def _with_id(error: MeshError, name: str, request_id: str) -> MeshError:
    error.agent = error.agent or name
    error.request_id = request_id
    return error
