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

    Args:
        agent: the publisher or watcher.
        resources: what all routes use.
        seq: the number of the first frame; not 0 where it continues the run of an older version.

    Attributes:
        name: the agent's name.
        state: `waiting` for its restart, `done` when it returned.
        restarts: how often it was restarted.
        error: the last failure; empty when it never failed.
        next_start: when it is restarted, while it waits.
        seq: the number of the next frame, where a new version continues the run.
    """

    def __init__(self, agent: AgentVersion, resources: Resources, seq: int = 0) -> None:
        self.name = agent.name
        self.state: Literal["running", "waiting", "done", "stopped"] = "stopped"
        self.restarts = 0
        self.error = ""
        self.next_start: datetime | None = None
        self.seq = seq
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
        """Start it, once."""
        if self._task is None:
            # An empty context: it outlives the request, or the span, in which it was declared.
            self._task = asyncio.create_task(self._supervise(), context=Context())

    async def stop(self, *, is_final: bool = True) -> None:
        """Cancel it and wait until it ends; one that does not end is left, and named in the log.

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
            failure = await asyncio.create_task(self._run_and_catch())
            if _is_cancelled():
                self._log_failure_of_stop(failure)
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

    async def _run_and_catch(self) -> BaseException | None:
        """One run; returns its exception, which may be any: a SystemExit would end the event loop."""
        try:
            await self._run()
        except BaseException as exc:  # noqa: BLE001 - the run ends here, and is reported
            return exc
        return None

    async def _run(self) -> None:
        function = self._agent.handler.function
        if self._agent.kind == "watcher":
            await function()
        else:
            await self._publish(function())

    async def _publish(self, events: Any) -> None:  # noqa: ANN401 - the author's generator
        """One run of a publisher: its events, then the end frame."""
        resources, connection = self._resources, self._resources.connection
        prefix = codec.frame_prefix("", resources.instance_id)
        writer = EventWriter(
            connection, subjects.events(self.name), prefix, self._agent.encode, resources.middlewares
        )
        writer.seq = self.seq
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

    def _log_failure_of_stop(self, exc: BaseException | None) -> None:
        if exc is not None and not isinstance(exc, asyncio.CancelledError):
            log.warning("%s failed while it was stopped: %s", self.name, error_text(exc), exc_info=exc)

    async def _on_failure(self, exc: BaseException) -> None:
        """Log a failure, and publish it to subscribers and `mesh.errors`."""
        name, resources = self.name, self._resources
        self.error = f"{type(exc).__name__}: {error_text(exc)}"
        self._failure.set()
        log.error("%s failed and will be restarted: %s", name, self.error, exc_info=exc)
        error = exc if isinstance(exc, MeshError) else HandlerError(error_text(exc))
        body, publish = (
            codec.encode_error(error.for_request(agent=name, request_id="")),
            resources.connection.publish,
        )
        try:
            if self._agent.contract.streaming:
                frame = codec.error_headers("", resources.instance_id, frame=True)
                await publish(subjects.events(name), body, frame)
            await publish(subjects.errors(name), body, codec.error_headers("", resources.instance_id))
        except MeshError as failed:
            log.warning("%s: failure not published: %s", name, failed)
        data: dict[str, object] = {"code": error.code}
        await resources.logs.publish("error", name, "agent_failed", message=self.error, data=data)


def _is_cancelled() -> bool:
    """Whether the running task was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
