"""Publishers and watchers: agents that run in the background and are restarted when they fail."""

import asyncio
import logging
from contextlib import aclosing, suppress
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import HandlerError, MeshError, error_text
from openagentmesh.protocol.status import BackgroundStatus
from openagentmesh.serving.resources import Resources
from openagentmesh.serving.streams import EventWriter
from openagentmesh.transport.backoff import Backoff
from openagentmesh.transport.tasks import cancel_within

log = logging.getLogger(__name__)

# How long a cancelled function may take to clean up.
_CANCEL_GRACE_S: Final = 5.0
# The part of a restart pause that is always waited.
_MIN_PAUSE_PART: Final = 0.5


class Background:
    """Runs one publisher or watcher, once at a time, until it returns or is stopped.

    Attributes:
        state, restarts, error, next_start: as in `BackgroundStatus`.
        seq: the number of the next frame; not 0 where a new version continues the run of an older one.
    """

    def __init__(self, agent: AgentVersion, resources: Resources, seq: int = 0) -> None:
        self.state: Literal["running", "waiting", "done", "stopped"] = "stopped"
        self.restarts = 0
        self.error = ""
        self.next_start: datetime | None = None
        self.seq = seq
        self.name = agent.name
        self._agent = agent
        self._resources = resources
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._is_final = False
        self._failure = asyncio.Event()

    def status(self) -> BackgroundStatus:
        """Its state, for `oam status`."""
        return BackgroundStatus(
            state=self.state, restarts=self.restarts, error=self.error, next_start=self.next_start
        )

    def start(self) -> None:
        """Start it, unless that is done already."""
        if self._task is None:
            # An empty context: it outlives the request, or the span, in which it was declared.
            self._task = asyncio.create_task(self._supervise(), context=Context())

    async def stop(self, *, is_final: bool = True) -> None:
        """Cancel it and wait until it ends; one that does not end is left running, and logged.

        A publisher's subscribers get an end frame when it `is_final`; otherwise a new version continues.
        """
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping, self._is_final = True, is_final
        if await cancel_within(_CANCEL_GRACE_S, [task]):
            log.error("%s did not stop within %gs and is left running", self.name, _CANCEL_GRACE_S)
        if self.state != "done":
            self.state = "stopped"

    async def failed_within(self, seconds: float) -> str:
        """Its failure within `seconds`; empty when there was none."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._failure.wait()
        return self.error

    async def _supervise(self) -> None:
        loop, limits = asyncio.get_running_loop(), self._agent.limits
        # Jitter: publishers of many hosts that fail of one cause must not restart at once.
        backoff = Backoff(limits.restart_pause, limits.restart_pause_max, at_least=_MIN_PAUSE_PART)
        while True:
            started, self.state = loop.time(), "running"
            # In a task of its own: the function may cancel the task that it runs in.
            failure = await asyncio.create_task(self._run())
            if (task := asyncio.current_task()) and task.cancelling():
                if failure is not None and not isinstance(failure, asyncio.CancelledError):
                    text = error_text(failure)
                    log.warning("%s failed while it was stopped: %s", self.name, text, exc_info=failure)
                return
            if failure is None:
                self.state = "done"
                return
            await self._on_failure(failure)
            if loop.time() - started > limits.restart_pause_max:
                backoff.reset()  # it ran for long, so this failure is a new one
            pause = backoff.next()
            self.state, self.next_start = "waiting", datetime.now(UTC) + timedelta(seconds=pause)
            await asyncio.sleep(pause)
            self.restarts, self.next_start = self.restarts + 1, None

    async def _run(self) -> BaseException | None:
        """One run; returns its exception, which may be any: a SystemExit would end the event loop."""
        try:
            run = self._agent.handler.function()
            await (run if self._agent.kind == "watcher" else self._publish(run))
        except BaseException as exc:  # noqa: BLE001 - the run ends here, and is reported
            return exc
        return None

    async def _publish(self, events: Any) -> None:  # noqa: ANN401 - the author's generator
        """One run of a publisher: its events, then the end frame."""
        connection = self._resources.connection
        writer = EventWriter(self._resources, subjects.events(self.name), self._agent.encode, self.seq)
        try:
            async with aclosing(events):
                async for event in events:
                    if self._stopping:  # it swallowed its cancellation, and a new version may run already
                        raise asyncio.CancelledError  # noqa: TRY301 - it ends as if it had not
                    await connection.wait_connected()
                    await writer.send(event)
        except BaseException as exc:
            is_stopped = isinstance(exc, asyncio.CancelledError) and self._stopping
            self.seq = writer.seq if is_stopped and not self._is_final else 0
            if is_stopped and self._is_final and connection.connected:
                await writer.end()
            raise
        self.seq = 0
        await writer.end()

    async def _on_failure(self, exc: BaseException) -> None:
        """Log a failure, and publish it to subscribers and `mesh.errors`."""
        name, resources = self.name, self._resources
        publish, instance_id = resources.connection.publish, resources.instance_id
        self.error = f"{type(exc).__name__}: {error_text(exc)}"
        self._failure.set()
        log.error("%s failed and will be restarted: %s", name, self.error, exc_info=exc)
        error = exc if isinstance(exc, MeshError) else HandlerError(error_text(exc))
        body = codec.encode_error(error.for_request(agent=name, request_id=""))
        try:
            if self._agent.contract.streaming:
                head = codec.error_headers("", instance_id, frame=True)
                await publish(subjects.events(name), body, head)
            await publish(subjects.errors(name), body, codec.error_headers("", instance_id))
        except MeshError as failed:
            log.warning("%s: failure not published: %s", name, failed)
        data: dict[str, object] = {"code": error.code}
        await resources.logs.publish("error", name, "agent_failed", message=self.error, data=data)
