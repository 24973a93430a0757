"""Publishers and watchers: agents that run by themselves, and are started again when they fail."""

import asyncio
import logging
import random
from contextlib import aclosing, suppress
from contextvars import Context
from datetime import UTC, datetime
from typing import Any, Final, Literal

from openagentmesh.agent.agent import Agent
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import HandlerError, MeshError, error_text
from openagentmesh.serving.resources import Shared
from openagentmesh.serving.streams import EventWriter
from openagentmesh.transport.tasks import cancel_within

log = logging.getLogger(__name__)

# How long it may take to clean up after it was cancelled, in seconds.
_CANCEL_GRACE: Final = 5.0


class Background:
    """Runs one publisher or watcher: exactly once at a time, until it returns or is stopped.

    Args:
        agent: the publisher or watcher.
        shared: what all routes of the node share.
        seq: the number of the first frame; not 0 where it goes on for a version before it.

    Attributes:
        name: of its agent.
        state: `waiting` is the pause before it is started again, `done` that it returned.
        restarts: how often it was started again.
        error: why it failed last; empty when it never did.
        next_start: when it is started again, while it waits.
        seq: the number of the next frame of a run that nobody was told has ended.

    """

    def __init__(self, agent: Agent, shared: Shared, seq: int = 0) -> None:
        self.name = agent.name
        self.state: Literal["running", "waiting", "done", "stopped"] = "stopped"
        self.restarts = 0
        self.error = ""
        self.next_start: datetime | None = None
        self.seq = seq
        self._agent = agent
        self._shared = shared
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._for_good = False
        self._has_failed = asyncio.Event()

    def description(self) -> dict[str, Any]:
        """How it fares, for `oam status`; JSON."""
        return {
            "state": self.state,
            "restarts": self.restarts,
            "error": self.error,
            "next_start": self.next_start and self.next_start.isoformat(),
        }

    def start(self) -> None:
        """Start it, once."""
        if self._task is None:
            # An empty context: it outlives the request, or the span, in which it was declared.
            self._task = asyncio.create_task(self._keep_running(), context=Context())

    async def stop(self, *, for_good: bool = True) -> None:
        """Cancel it and wait until it has ended; one that does not end is left, and named.

        A publisher's subscribers are told when it is `for_good`, else somebody goes on for it.
        """
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping, self._for_good = True, for_good
        if await cancel_within(_CANCEL_GRACE, [task]):
            log.error("%s does not stop within %gs and is left", self._agent.name, _CANCEL_GRACE)
        if self.state != "done":
            self.state = "stopped"

    async def failed_within(self, seconds: float) -> str:
        """Why it failed within `seconds`; empty when it did not."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_failed.wait()
        return self.error

    async def _keep_running(self) -> None:
        loop, limits = asyncio.get_running_loop(), self._agent.limits
        pause = limits.restart_pause
        while True:
            started, self.state = loop.time(), "running"
            # In a task of its own: a function may cancel the task that it runs in.
            failure = await asyncio.create_task(self._outcome())
            if _is_cancelled():
                self._tell_of_stop(failure)
                return
            if failure is None:
                self.state = "done"
                return
            await self._failed(failure)
            if loop.time() - started > limits.restart_pause_max:
                pause = limits.restart_pause  # it ran for long, so this is a new failure
            # Many hosts whose publishers fail of one cause must not come back all at once.
            wait = pause * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it
            self.state = "waiting"
            self.next_start = datetime.fromtimestamp(datetime.now(UTC).timestamp() + wait, UTC)
            await asyncio.sleep(wait)
            pause = min(pause * 2, limits.restart_pause_max)
            self.restarts, self.next_start = self.restarts + 1, None

    async def _outcome(self) -> BaseException | None:
        """One run, and what ended it, which may be anything: a SystemExit would end the loop."""
        try:
            await self._run()
        except BaseException as exc:  # noqa: BLE001 - its run ends here, and is told
            return exc
        return None

    async def _run(self) -> None:
        function = self._agent.handler.function
        if self._agent.handler.shape == "watcher":
            await function()
        else:
            await self._publish(function())

    async def _publish(self, events: Any) -> None:  # noqa: ANN401 - the author's generator
        """One run of a publisher: its events, then the end frame."""
        shared, connection = self._shared, self._shared.connection
        subject = subjects.events(self._agent.name)
        start = codec.frame_prefix("", shared.instance_id)
        writer = EventWriter(connection, subject, start, self._agent.dump, shared.border)
        writer.seq = self.seq
        try:
            async with aclosing(events):
                async for event in events:
                    if self._stopping:  # it swallowed its cancellation, and another one may run already
                        raise asyncio.CancelledError  # noqa: TRY301 - it ends as if it had not
                    await connection.wait_connected()
                    await writer.send(event)
        except BaseException as exc:
            stopped = isinstance(exc, asyncio.CancelledError) and self._stopping
            self.seq = writer.seq if stopped and not self._for_good else 0
            if stopped and self._for_good and connection.connected:
                await writer.end()
            raise
        self.seq = 0
        await writer.end()

    def _tell_of_stop(self, exc: BaseException | None) -> None:
        if exc is not None and not isinstance(exc, asyncio.CancelledError):
            log.warning("%s failed while it was stopped: %s", self._agent.name, error_text(exc), exc_info=exc)

    async def _failed(self, exc: BaseException) -> None:
        """Tell everybody: subscribers, `mesh.errors`, the log."""
        name, shared = self._agent.name, self._shared
        self.error = f"{type(exc).__name__}: {error_text(exc)}"
        self._has_failed.set()
        log.error("%s failed and will be started again: %s", name, self.error, exc_info=exc)
        error = exc if isinstance(exc, MeshError) else HandlerError(error_text(exc))
        body = codec.encode_error(error.for_request(agent=name, request_id=""))
        try:
            if self._agent.contract.streaming:
                frame = codec.error_headers("", shared.instance_id, frame=True)
                await shared.connection.publish(subjects.events(name), body, frame)
            await shared.connection.publish(
                subjects.errors(name), body, codec.error_headers("", shared.instance_id)
            )
        except MeshError as failed:
            log.warning("%s: nobody could be told of its failure: %s", name, failed)
        await shared.events.emit("error", name, "agent_failed", message=self.error, data={"code": error.code})


def _is_cancelled() -> bool:
    """Whether somebody cancelled the running task."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
