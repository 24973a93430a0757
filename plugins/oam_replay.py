"""Replay: run an agent's latest requests against its next version before that version serves.

Requests of agents with `replayable=True` are recorded in memory. During a reload the new version handles
them as well, and the result of the reload names the differences. Streams and sources are not recorded.
"""

import asyncio
import json
import logging
import traceback
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Annotated, Any, Final

from openagentmesh import (
    Agent,
    AgentContract,
    Call,
    Endpoint,
    MeshError,
    Middleware,
    RecordedRequest,
    ReloadResult,
    hookimpl,
)
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

# Larger requests, reply included, are not recorded, in bytes.
_MAX_SIZE: Final = 64 * 1024
# How long the replay of all requests of one agent may take.
_TIMEOUT_S: Final = 5.0
_CANCEL_TIMEOUT_S: Final = 0.5
# Longer durations are reported from this difference and this factor on.
_SLOWER_BY_S: Final = 0.02
_SLOWER_FACTOR: Final = 2.0
_MAX_SHOWN: Final = 80


class Settings(BaseModel):
    """`[plugins.replay]`.

    Attributes:
        keep: how many requests of each agent are recorded.
        strict: refuse a reload when a request fails that did not fail before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[int, Field(ge=1, le=1000)] = 20
    strict: bool = False


class Regression(MeshError):
    """A recorded request fails with the new version, and did not fail before."""

    code = "reload_refused"


@dataclass(slots=True, frozen=True)
class Outcome:
    """What a version returned for a request: the reply, or the error's code and message."""

    reply: bytes
    error: str
    seconds: float


@dataclass(slots=True, frozen=True, eq=False)
class Recording:
    """A recorded request, and what the version with this `contract` returned for it.

    Unless that version serves, the one that does handles the request once more for the comparison; also
    without an `outcome`, which may contain secrets.
    """

    request: RecordedRequest
    outcome: Outcome | None
    contract: AgentContract


class Replay:
    """The plugin.

    Args:
        settings: for `AgentMesh(plugins=[Replay(Settings(...))])`; a host passes those of mesh.toml.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._recordings: dict[str, deque[Recording]] = {}
        # How candidates answered during a reload.
        self._checked: dict[str, tuple[Agent, dict[Recording, Outcome]]] = {}

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """The table of mesh.toml."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = settings

    @hookimpl(trylast=True)  # innermost: requests that other plugins refuse are not recorded
    def mesh_middleware(self, agent: Agent) -> Middleware | None:
        """The middleware that records the requests of one agent."""
        if not agent.replayable or not agent.contract.invocable or agent.contract.streaming or agent.sources:
            return None

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def recorded(call: Call) -> Any:  # noqa: ANN401 - the handler's result
                try:
                    result = await endpoint(call)
                except Exception as exc:
                    self._record(agent, call, b"", _error_text(exc))
                    raise
                self._record(agent, call, agent.encode(result))
                return result

            return recorded

        return middleware

    def _record(self, agent: Agent, call: Call, reply: bytes, error: str = "") -> None:
        started = call.handler_started
        if started is None or call.is_abandoned or len(call.body) + len(reply) > _MAX_SIZE:
            return
        body = _redacted(agent, call.body)
        if body is None:
            return
        headers = {name: value for name, value in call.headers.items() if name.lower() != "authorization"}
        # A reply may contain secrets, too.
        outcome = Outcome(reply, error, monotonic() - started) if agent.redactor is None else None
        request = RecordedRequest(body, headers, call.request_id, call.identity, call.instance_id)
        recordings = self._recordings.get(agent.name)
        if recordings is None or recordings.maxlen != self._settings.keep:
            recordings = self._recordings[agent.name] = deque(recordings or (), self._settings.keep)
        recordings.append(Recording(request, outcome, agent.contract))

    @hookimpl
    def mesh_check_candidate(self, agent: Agent, serving: Agent | None) -> Awaitable[Sequence[str]] | None:
        """Replay the recorded requests of an agent, if it has some."""
        is_replayable = agent.replayable and self._recordings.get(agent.name)
        return self._check(agent, serving) if is_replayable else None

    async def _check(self, agent: Agent, serving: Agent | None) -> list[str]:
        """The differences between two versions, as notes.

        Raises:
            Regression: a request fails that did not fail before, and the settings are strict.
        """
        recordings = list(self._recordings.get(agent.name, ()))
        notes: list[str] = []
        outcomes: dict[Recording, Outcome] = {}
        self._checked[agent.name] = agent, outcomes
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _TIMEOUT_S
        for i, recording in enumerate(recordings):
            if loop.time() >= deadline:
                skipped = f"{len(recordings) - i} of {len(recordings)} requests are not replayed"
                return [*notes, f"{agent.name}: {skipped}, the limit is {_TIMEOUT_S:g}s for all"]
            before = recording.outcome
            if serving is not None and (before is None or recording.contract is not serving.contract):
                before = await _run(serving, recording.request, deadline)
            if before is None:
                continue
            outcomes[recording] = after = await _run(agent, recording.request, deadline)
            if difference := _difference(recording.request, before, after):
                notes.append(f"{agent.name}: {difference}")
            if self._settings.strict and after.error and not before.error:
                raise Regression(f"{notes[-1]} ([plugins.replay] strict)")
        return notes

    @hookimpl
    def mesh_reloaded(self, result: ReloadResult) -> None:
        """Compare the next versions with those that serve now."""
        for name in self._checked.keys() & result.names:
            agent, outcomes = self._checked[name]
            recordings = self._recordings.get(name, deque())
            for i, recording in enumerate(recordings):
                if recording.outcome is not None and recording in outcomes:
                    recordings[i] = Recording(recording.request, outcomes[recording], agent.contract)
        self._checked.clear()

    @hookimpl
    def mesh_reload_failed(self) -> None:
        """The old versions still serve."""
        self._checked.clear()

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Forget an agent."""
        self._recordings.pop(name, None)


def _redacted(agent: Agent, body: bytes) -> bytes | None:
    """A request's body without secrets; None if the request must not be recorded."""
    if agent.redactor is None:
        return body
    try:
        return agent.redactor(body)
    # Another plugin's failure ends here: what should have been redacted is not stored.
    except Exception:
        log.exception("%s: request not recorded for replay, its redactor failed", agent.name)
        return None


async def _run(agent: Agent, request: RecordedRequest, deadline: float) -> Outcome:
    """One request in a task of its own: it has a current call, and it may ignore its cancellation."""
    timeout = deadline - asyncio.get_running_loop().time()
    task = asyncio.create_task(_answer(agent, request, timeout))
    try:
        await asyncio.wait([task], timeout=timeout)
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_TIMEOUT_S)
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
        return task.result()
    return Outcome(b"", f"no answer within {_TIMEOUT_S:g}s", _TIMEOUT_S)


async def _answer(agent: Agent, request: RecordedRequest, timeout: float) -> Outcome:
    started = monotonic()
    try:
        return Outcome(await agent.answer(request, timeout), "", monotonic() - started)
    # A handler may raise anything, and that is compared; a SystemExit would end the event loop.
    except BaseException as exc:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        return Outcome(b"", _error_text(exc), monotonic() - started)


def _error_text(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return f"[{exc.code}] {exc.message}"
    return "".join(traceback.format_exception_only(exc)).strip()  # also when its `__str__` raises


def _difference(request: RecordedRequest, before: Outcome, after: Outcome) -> str:
    """How two versions differ on a request; empty when they do not."""
    body = _shortened(request.body)
    if after.error != before.error:
        old, new = (each.error or _shortened(each.reply) for each in (before, after))
        return f"{body} → {new} (was {old})"
    if _normalized(after.reply) != _normalized(before.reply):
        return f"{body} → {_shortened(after.reply)} (was {_shortened(before.reply)})"
    if after.seconds > max(before.seconds * _SLOWER_FACTOR, before.seconds + _SLOWER_BY_S):
        return f"{body} takes {after.seconds * 1000:.0f} ms (was {before.seconds * 1000:.0f} ms)"
    return ""


def _normalized(reply: bytes) -> str:
    """A reply with sorted keys, to compare it; unlike in Python, 1 equals neither true nor 1.0."""
    return json.dumps(json.loads(reply), sort_keys=True) if reply else ""


def _shortened(body: bytes) -> str:
    text = body.decode("utf-8", "replace") or "nothing"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
