"""Replay on save: the last real requests of an agent, run against its next version before that serves."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Call, Caller, set_current_call
from openagentmesh.agent.handler import Handler
from openagentmesh.hooks.specs import Redactor
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.errors import MeshError, error_text
from openagentmesh.transport.tasks import cancel_within

log = logging.getLogger(__name__)

# Larger requests and replies are not kept, in bytes.
_LARGEST: Final = 64 * 1024
# How long all that is kept of one agent may take when it is run again, in seconds.
_PATIENCE: Final = 5.0
_CANCEL_GRACE: Final = 0.5
# What takes longer than before is only told from this difference and this factor on.
_SLOWER_BY: Final = 0.02
_SLOWER: Final = 2.0
_MOST_SHOWN: Final = 80


@dataclass(slots=True, frozen=True)
class _Run:
    """What one version made of a request: its reply, or its error's code and message; in seconds."""

    reply: bytes
    error: str
    seconds: float


@dataclass(slots=True, frozen=True)
class _Asked:
    """A request that was let in, and who was proven to ask; without what proved it."""

    request: Request
    proven: Caller | None

    @classmethod
    def of(cls, call: Call, body: bytes) -> "_Asked":
        headers = {name: value for name, value in call.headers.items() if name.lower() != "authorization"}
        return cls(replace(call.request, body=body, headers=headers), call.proven)


@dataclass(slots=True, frozen=True)
class Difference:
    """One kept request on which two versions do not agree."""

    text: str
    is_new_error: bool


class Replays:
    """Keeps the last requests of agents that say `replayable=True`, and runs them again.

    Args:
        keep: how many requests of each agent; 0 for none.
        redactor: gives what takes secrets out of an agent's requests; then no reply is kept either.

    """

    def __init__(self, keep: int, redactor: Callable[[Agent], Redactor | None] = lambda _: None) -> None:
        self._keep = keep
        self._redactor = redactor
        # None: what the serving version makes of it is found out when another one is compared with it.
        self._kept: dict[str, deque[tuple[_Asked, _Run | None]]] = {}
        # The handlers that serve, since the first reload.
        self._serving: dict[str, Handler] = {}
        # What candidates have made of requests, by the requests' ids in memory, which they keep.
        self._fresh: dict[str, dict[int, tuple[_Asked, _Run]]] = {}

    def kept(self, agent: str) -> int:
        """How many requests of an agent are kept."""
        return len(self._kept.get(agent, ()))

    def recorded(self, agent: Agent) -> Agent:
        """The same agent, its requests kept when it allows that."""
        can = agent.replayable and agent.contract.invocable and not agent.contract.streaming
        if not self._keep or not can or agent.sources:
            return agent
        kept = self._kept.setdefault(agent.name, deque(maxlen=self._keep))
        inner, redact = agent.endpoint, self._redactor(agent)

        def keep(call: Call, reply: bytes, error: str, began: float) -> None:
            if call.abandoned or len(call.request.body) + len(reply) > _LARGEST:
                return
            if redact is None:
                # What a version makes of it that serves no more is not what the next one is compared with.
                serves = self._serving.get(agent.name, agent.handler) is agent.handler
                run = _Run(reply, error, perf_counter() - began) if serves else None
                kept.append((_Asked.of(call, call.request.body), run))
                return
            try:
                body = redact(call.request.body)
            # A plugin's failure ends here: what it would have hidden is not kept.
            except Exception:
                log.exception("a request of %s is not kept for replays: its redactor failed", agent.name)
                return
            if body is not None:
                kept.append((_Asked.of(call, body), None))

        async def endpoint(call: Call) -> object:
            began = perf_counter()
            try:
                result = await inner(call)
            except Exception as exc:
                keep(call, b"", _told(exc), began)
                raise
            keep(call, agent.dump(result), "", began)
            return result

        return replace(agent, endpoint=endpoint)

    async def differences(self, agent: Agent, serving: Agent | None) -> list[Difference]:
        """Run what is kept against a version that does not serve yet; what it does differently."""
        if not agent.replayable:
            return []
        found: list[Difference] = []
        fresh = self._fresh[agent.name] = {}
        kept, until = list(self._kept.get(agent.name, ())), asyncio.get_running_loop().time() + _PATIENCE
        for number, (asked, known) in enumerate(kept):
            if asyncio.get_running_loop().time() >= until:
                left = f"{len(kept) - number} of {len(kept)} requests are not replayed"
                return [*found, Difference(f"{left}: there are {_PATIENCE:g}s for all", is_new_error=False)]
            before = known
            if before is None and serving is not None:
                before = await _run(serving, asked, until)
            if before is None:
                continue
            now = await _run(agent, asked, until)
            fresh[id(asked)] = asked, now
            if (difference := _compared(asked.request, before, now)) is not None:
                found.append(difference)
        return found

    def accept(self, agents: Iterable[Agent], gone: Iterable[str]) -> None:
        """Compare the next versions with these, which serve now; forget what is `gone`."""
        for agent in agents:
            self._serving[agent.name] = agent.handler
            fresh, kept = self._fresh.pop(agent.name, {}), self._kept.get(agent.name, deque())
            for number, (asked, before) in enumerate(kept):
                kept[number] = asked, before and fresh.get(id(asked), (asked, before))[1]
        for name in gone:
            self._kept.pop(name, None)
            self._serving.pop(name, None)


async def _run(agent: Agent, asked: _Asked, until: float) -> _Run:
    """One request, run in a task of its own: its handler may ask for the current call, and may not end."""
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(_answer(agent, asked, until))
    try:
        await asyncio.wait([running], timeout=until - loop.time())
    finally:
        deaf = await cancel_within(_CANCEL_GRACE, [running])
    if deaf or running.cancelled():
        return _Run(b"", f"no answer within {_PATIENCE:g}s", _PATIENCE)
    return running.result()


async def _answer(agent: Agent, asked: _Asked, until: float) -> _Run:
    started = asyncio.get_running_loop().time()
    call = Call(agent.name, asked.request, until, started=started, patience=until - started)
    call.proven = asked.proven
    set_current_call(call)
    began = perf_counter()
    try:
        agent.accept(call)
        return _Run(agent.dump(await agent.handler.endpoint()(call)), "", perf_counter() - began)
    # A handler may raise anything, and that is what is compared; a SystemExit would end the loop.
    except BaseException as exc:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        return _Run(b"", _told(exc), perf_counter() - began)


def _told(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return f"[{exc.code}] {exc.message}"
    return f"{type(exc).__name__}: {error_text(exc)}"


def _compared(request: Request, before: _Run, now: _Run) -> Difference | None:
    asked = _short(request.body)
    if now.error != before.error:
        text = f"{asked} → {now.error or _short(now.reply)} (was {before.error or _short(before.reply)})"
        return Difference(text, is_new_error=bool(now.error and not before.error))
    if not _same(now.reply, before.reply):
        return Difference(f"{asked} → {_short(now.reply)} (was {_short(before.reply)})", is_new_error=False)
    if now.seconds > max(before.seconds * _SLOWER, before.seconds + _SLOWER_BY):
        took = f"{now.seconds * 1000:.0f} ms (was {before.seconds * 1000:.0f} ms)"
        return Difference(f"{asked} takes {took}", is_new_error=False)
    return None


def _same(one: bytes, other: bytes) -> bool:
    """Whether two replies are the same JSON, in whatever order; 1 is neither true nor 1.0."""
    return one == other or (bool(one and other) and _sorted(one) == _sorted(other))


def _sorted(body: bytes) -> str:
    return json.dumps(json.loads(body), sort_keys=True)


def _short(body: bytes) -> str:
    text = body.decode("utf-8", "replace") or "nothing"
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"
