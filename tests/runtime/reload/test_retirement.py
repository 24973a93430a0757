"""Letting old versions go: requests finish on them, what runs by itself hands over, nothing is held."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Cancelled, Host
from openagentmesh.protocol import subjects

from tests.support.meshes import listen
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload
from tests.support.waiting import until

SHAPES = pytest.mark.parametrize("shape", ["publisher", "watcher"])
Says = Callable[[str], None]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the agents' code tells by `asyncio.heard.append`, which all versions share."""
    found: list[str] = []
    monkeypatch.setattr(asyncio, "heard", found, raising=False)
    monkeypatch.setattr(asyncio, "gate", asyncio.Event(), raising=False)
    return found


def open_gate() -> None:
    asyncio.gate.set()  # type: ignore[attr-defined]


HELD = """import asyncio
from collections.abc import AsyncIterator
{mesh}
WORD = {word!r}

@mesh.agent(AgentSpec(name="{name}.call"))
async def call(req: dict) -> list:
    before = WORD
    if req:
        asyncio.heard.append(before)
        await asyncio.gate.wait()
    from _common import LATE
    return [before, WORD, LATE]

@mesh.agent(AgentSpec(name="{name}.stream"))
async def stream(req: dict) -> AsyncIterator[str]:
    yield WORD
    if req:
        asyncio.heard.append(WORD)
        await asyncio.gate.wait()
    yield WORD
"""


def held(name: str, word: str) -> dict[str, str]:
    """A responder and a streamer that wait in their middle for as long as a test wants."""
    return {"a.py": HELD.format(mesh=MESH, word=word, name=name), "_common.py": f"LATE = {word!r}\n"}


async def test_requests_finish_on_their_version(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str]
) -> None:
    """A request and a stream under way see one version, lazy imports too, while the next ones run the new."""

    async def stream(payload: dict[str, int]) -> list[str]:
        return [chunk async for chunk in mesh.stream(f"{name}.stream", payload)]

    async with Host(configure(held(name, "old"), host={"drain_timeout": 20})) as host:
        assert ["old"] * 3 == await mesh.call(f"{name}.call", {})
        running = [asyncio.create_task(mesh.call(f"{name}.call", {"wait": 1})) for _ in range(3)]
        streaming = asyncio.create_task(stream({"wait": 1}))
        await until(lambda: 4 == len(heard))
        for number in (1, 2):  # also with two versions behind
            write(tmp_path / "agents", held(name, f"new{number}"))
            outcome = await reload(host, tmp_path)
            assert {1: 4, 2: 0}[number] == outcome.in_flight
            assert [f"new{number}"] * 3 == await mesh.call(f"{name}.call", {})
            assert [f"new{number}"] * 2 == await stream({})
        assert not any(task.done() for task in (*running, streaming))
        open_gate()
        assert [["old"] * 3] * 3 == await asyncio.gather(*running)
        assert ["old"] * 2 == await streaming
        del running, streaming
        await host.wait_retired()
        assert [] == [note for outcome in host.status().reloads for note in outcome.notes]


@pytest.mark.parametrize("gone", [False, True], ids=["replaced", "removed"])
async def test_after_the_deadline_callers_are_told(  # noqa: PLR0913 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str], *, gone: bool
) -> None:
    """What still runs on the old version after `drain_timeout` is stopped, and answered with an error."""
    async with Host(configure(held(name, "old"), host={"drain_timeout": 0.05})) as host:
        calls = [asyncio.create_task(mesh.call(f"{name}.call", {"wait": 1})) for _ in range(2)]
        await until(lambda: 2 == len(heard))
        if gone:
            (tmp_path / "agents/a.py").unlink()
        outcome = await reload(host, tmp_path, None if gone else held(name, "new")["a.py"])
        assert 2 == outcome.in_flight
        assert "2 in flight on the old version" in outcome.text
        for call in calls:
            with pytest.raises(Cancelled, match="was stopped before it answered") as caught:
                await call
            assert (f"{name}.call", True) == (caught.value.agent, bool(caught.value.request_id))
        await host.wait_retired()


def by_itself(name: str, shape: str, body: str, word: str, ends: str = "pass") -> str:
    """A publisher or a watcher that tells when it starts and ends, and meanwhile runs `body`."""
    is_publisher = shape == "publisher"
    return f"""import asyncio
from collections.abc import AsyncIterator
{MESH}
@mesh.agent(AgentSpec(name={name!r}))
async def runs() -> {"AsyncIterator[str]" if is_publisher else "None"}:
    asyncio.heard.append("+{word}")
    try:
        {"yield " + repr(word) if is_publisher else "pass"}
        {body}
    finally:
        {ends}
        asyncio.heard.append("-{word}")
"""


FOR_EVER = "await asyncio.Event().wait()"


@SHAPES
async def test_what_runs_by_itself_hands_over(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str], shape: str
) -> None:
    """The new one starts when the old one has ended, its clean-up included, and never beside it."""
    ends = "await asyncio.sleep(0.01)"
    async with Host(configure({"a.py": by_itself(name, shape, FOR_EVER, "0", ends)})) as host:
        for number in range(1, 6):
            await until(partial(heard.__contains__, f"+{number - 1}"))
            await reload(host, tmp_path, by_itself(name, shape, FOR_EVER, str(number), ends))
        await until(lambda: "+5" in heard)
    assert [f"{sign}{number}" for number in range(6) for sign in "+-"] == heard


DEAF = """
        while not asyncio.gate.is_set():
            try:
                await asyncio.gate.wait()
            except asyncio.CancelledError:
                asyncio.heard.append("deaf")
"""


@SHAPES
async def test_one_that_swallows_its_cancellation_is_named(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    name: str,
    tmp_path: Path,
    heard: list[str],
    shape: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The new one starts after the grace, not later, and the reload's notes say what is left."""
    monkeypatch.setattr("openagentmesh.serving.background._CANCEL_GRACE_S", 0.05)
    monkeypatch.setattr("openagentmesh.runtime.reload.retirement._PROBATION_S", 0.05)
    async with Host(configure({"a.py": by_itself(name, shape, DEAF.strip(), "old")})) as host:
        await until(lambda: heard)
        outcome = await reload(host, tmp_path, by_itself(name, shape, FOR_EVER, "new"))
        await until(lambda: "+new" in heard)
        assert ["+old", "deaf", "+new"] == heard
        await host.wait_retired()
        (note,) = outcome.notes
        assert note.startswith("the task ")
        assert note.endswith("(runs)")
        assert f"{name} did not stop within 0.05s and is left running" in caplog.messages
        open_gate()
        await until(lambda: "-old" in heard)


async def test_a_deaf_publisher_says_nothing_more(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str]
) -> None:
    """An old publisher that swallows its cancellation is ended at its next event, which nobody gets."""
    events = await listen(mesh, subjects.events(name))
    body = """while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                yield "late"
"""
    async with Host(configure({"a.py": by_itself(name, "publisher", body, "old")})) as host:
        await until(lambda: heard)
        await reload(host, tmp_path, by_itself(name, "publisher", FOR_EVER, "new"))
        await until(lambda: "+new" in heard)
        assert ["+old", "-old", "+new"] == heard
        assert [b'"old"', b'"new"'] == [(await events.get()).body for _ in range(2)]


@SHAPES
async def test_one_that_fails_at_once_makes_way_for_the_old_one(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str], shape: str
) -> None:
    """The old version runs again, all of it, as if the reload had been refused, and that is told."""
    spec, newer = f"name={name!r}", f"name={name!r}, version='9.0.0'"
    async with Host(configure({"a.py": by_itself(name, shape, FOR_EVER, "old")})) as host:
        await until(lambda: heard)
        broken = by_itself(name, shape, "raise ValueError('not today')", "new").replace(spec, newer)
        await reload(host, tmp_path, broken)
        await until(lambda: 5 == len(heard))
        await host.wait_retired()
        assert ["+old", "-old", "+new", "-new", "+old"] == heard
        why = f"{name} failed at once (ValueError: not today), so the old version runs again"
        assert [("outdated", why)] == [(module.state, module.error) for module in host.modules]
        assert why == host.status().reloads[-1].error
        assert "0.1.0" == (await mesh.contract(name)).version
        write(tmp_path / "agents", {"other.py": MESH + agent(f"{name}.other")})
        outcome = await host.reload()
        assert outcome is not None
        assert [f"{name}.other 0.1.0 new"] == outcome.agents
        assert 5 == len(heard)
        mended = by_itself(name, shape, FOR_EVER, "mended").replace(spec, newer)
        assert f"{name} 0.1.0 → 9.0.0" in (await reload(host, tmp_path, mended)).text
        await until(lambda: "+mended" in heard)
        assert "9.0.0" == (await mesh.contract(name)).version
    assert ["-old", "+mended", "-mended"] == heard[5:]


LEAVES = """import asyncio, logging, threading
{mesh}
class Handler(logging.Handler):
    pass

def work() -> None:
    asyncio.stop.wait()

async def later() -> None:
    await asyncio.gate.wait()

class Thing:
    def do(self) -> None:
        pass

@mesh.agent(AgentSpec(name={name!r}))
async def leave(what: str) -> None:
    if what == "task":
        asyncio.get_running_loop().create_task(later(), name="forgotten")
    elif what == "thread":
        threading.Thread(target=work, name="forgotten").start()
    elif what == "handler":
        logging.getLogger("forgotten").addHandler(Handler())
    elif what == "held":
        logging.forgotten = [Thing()]
"""


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("task", "the task forgotten (later)"),
        ("thread", "the thread forgotten"),
        ("handler", "the logging handler Handler of 'forgotten'"),
        ("held", "oam_agents.a in memory, referenced by logging.forgotten"),
        ("nothing", ""),
    ],
)
async def test_what_old_code_leaves_behind_is_named(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    heard: list[str],
    what: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tasks, threads, logging handlers, and who else holds it: in the reload's notes and in the log."""
    monkeypatch.setattr(asyncio, "stop", threading.Event(), raising=False)
    monkeypatch.setattr(logging, "forgotten", None, raising=False)
    monkeypatch.setattr("openagentmesh.runtime.reload.leftovers._MAX_SEARCH_S", 10.0)
    monkeypatch.setattr(logging.getLogger("forgotten"), "handlers", [])
    source = LEAVES.format(mesh=MESH, name=name)
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, what)
        write(tmp_path / "agents", {"a.py": source + "#\n"})
        outcome = await host.reload(finds_references=what == "held")
        await host.wait_retired()
        assert outcome is not None
        assert ([note] if note else []) == outcome.notes
        logged = [message for message in caplog.messages if "left behind" in message]
        assert ([f"the old version of {name} left behind: {note}"] if note else []) == logged
        open_gate()
        asyncio.stop.set()  # type: ignore[attr-defined]


class Mark:
    """Dies with the namespace that it lies in."""


MANY = """from typing import Optional
from pydantic import BaseModel
import asyncio
{mesh}
asyncio.marks.append(asyncio.weakref.ref(mark := asyncio.Mark()))

class Tally(BaseModel):
    count: int = 0
    inner: Optional["Tally"] = None

    def add(self) -> "Tally":
        self.count += 1
        return self

@mesh.keep
def tally() -> Tally:
    return Tally()

@mesh.agent(AgentSpec(name={name!r}, version="0.0.{version}"))
async def count(req: dict) -> Tally:
    return tally.add()

@mesh.agent(AgentSpec(name="{name}.watch"))
async def watch() -> None:
    await asyncio.Event().wait()
# {number}
"""


@pytest.mark.parametrize("new_contract", [False, True])
async def test_fifty_reloads_leave_no_old_version_in_memory(  # noqa: PLR0913 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    new_contract: bool,
) -> None:
    """Of served and of refused versions only the last one is alive, and the last answers and counts."""
    marks: list[weakref.ref[Mark]] = []
    for key, value in {"marks": marks, "weakref": weakref, "Mark": Mark}.items():
        monkeypatch.setattr(asyncio, key, value, raising=False)
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:

        def source(number: int) -> str:
            version = number if new_contract else 0
            return MANY.format(mesh=MESH, name=name, number=number, version=version)

        async with Host(configure({"a.py": source(0)})) as host:
            for number in range(1, 51):
                assert {"count": number, "inner": None} == await mesh.call(name, {})
                assert not (await reload(host, tmp_path, source(number))).error
                if not number % 10:
                    assert "nothing" in (await reload(host, tmp_path, source(-1) + "1 / nothing\n")).error
            await host.wait_retired()
            gc.collect()
            assert [] == [note for outcome in host.status().reloads for note in outcome.notes]
            assert 56 == len(marks)
            assert 1 == sum(mark() is not None for mark in marks)
    finally:
        if not frozen:
            gc.unfreeze()
