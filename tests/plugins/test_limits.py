"""Limits: nobody gets more than their part, and everybody else gets theirs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import oam_limits
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oam_limits import Limits, Settings, caller_of
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Call,
    Caller,
    Host,
    KVEntry,
    MeshMessage,
    Middleware,
    Overloaded,
    hookimpl,
)
from openagentmesh.runtime.config import ConfigError, load_config

from tests.support.meshes import node_of
from tests.support.modules import MESH, agent, write

Limited = Callable[..., AgentMesh]
Serve = Callable[..., AbstractAsyncContextManager[Host]]


class Clock:
    """Time that passes when a test says so, but for a microsecond a look; begins far from 0."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of everything that limits."""
    clock = Clock()
    monkeypatch.setattr("throttled.utils.now_mono_f", clock)
    monkeypatch.setattr(oam_limits, "monotonic", clock)
    return clock


@pytest.fixture
def limited(url: str) -> Limited:
    """Makes meshes that serve within limits."""
    return lambda *plugins, **settings: AgentMesh(url, plugins=[*plugins, Limits(Settings(**settings))])


@pytest.fixture
def configure(tmp_path: Path, url: str) -> Callable[[str], None]:
    """Write mesh.toml."""

    def configure_(toml: str) -> None:
        text = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.drain_timeout = 1\n{toml}"
        (tmp_path / "mesh.toml").write_text(text)

    return configure_


@pytest.fixture
def serve(tmp_path: Path, configure: Callable[[str], None]) -> Serve:
    """A host that serves `agents/` within the limits of its mesh.toml."""

    @asynccontextmanager
    async def serve_(files: dict[str, str], toml: str) -> AsyncIterator[Host]:
        write(tmp_path / "agents", files)
        configure(toml)
        read = partial(load_config, tmp_path / "mesh.toml")
        host = Host(
            read(), config_file=tmp_path / "mesh.toml", read_config=read, plugins=[Identity(), Limits()]
        )
        async with host:
            yield host

    return serve_


class Identity:
    """Takes a header's word for who asks."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(endpoint: Callable[[Call], Awaitable[Any]]) -> Callable[[Call], Awaitable[Any]]:
            async def proven(call: Call) -> Any:
                if "X-Subject" in call.headers:
                    call.identity = Caller(call.caller.instance_id, call.headers["X-Subject"])
                return await endpoint(call)

            return proven

        return middleware


async def outcomes(mesh: AgentMesh, name: str, times: int, **more: Any) -> list[Any]:
    """What becomes of so many calls at once: answers and refusals."""
    return await asyncio.gather(*[mesh.call(name, **more) for _ in range(times)], return_exceptions=True)


def refused(outcomes: list[Any]) -> list[Overloaded]:
    return [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]


def call_of(instance: str = "", subject: str = "") -> Call:
    return Call("a", instance_id=instance, identity=Caller(instance, subject) if subject else None)


def serve_echo(mesh: AgentMesh, name: str) -> None:
    @mesh.agent(AgentSpec(name=name))
    async def echo() -> str:
        return "ok"


async def test_a_greedy_caller_does_not_starve_a_modest_one(
    serve: Serve, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """While one caller sends far more than there is room for, all requests of another one are answered."""
    source = "import asyncio\n" + MESH + agent(name, "await asyncio.sleep(0.005) or 'done'")
    limits = "limits = {concurrency = 4, queue = 2}"
    async with serve({"a.py": source}, limits), new_mesh() as greedy, new_mesh() as modest:
        stop = asyncio.Event()

        async def grab() -> list[Any]:
            found = []
            while not stop.is_set():
                found += await outcomes(greedy, name, 200, payload={})
            return found

        grabbing = asyncio.create_task(grab())
        answers = [await modest.call(name, {}) for _ in range(50)]
        stop.set()
        grabbed = await grabbing
    assert ["done"] * 50 == answers
    assert refused(grabbed)
    assert "done" in grabbed  # it has its own part all the same
    assert len(refused(grabbed)) + grabbed.count("done") == len(grabbed)


async def test_a_share_counts_who_runs_and_who_waits(
    limited: Limited, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Of 128 places a share of 0.02 is two: the third is refused, and is let in when one is free."""
    mesh, go = limited(share=0.02), asyncio.Event()
    both = asyncio.Semaphore(0)

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        both.release()
        await go.wait()
        return "done"

    async with mesh, new_mesh() as caller, new_mesh() as other:
        held = [asyncio.create_task(caller.call(name)) for _ in range(2)]
        await both.acquire()
        await both.acquire()
        with pytest.raises(Overloaded, match="has 2 requests at agent"):
            await caller.call(name)
        there = asyncio.create_task(other.call(name))
        await both.acquire()
        go.set()
        assert ["done"] * 3 == await asyncio.gather(*held, there)
        assert "done" == await caller.call(name)


async def test_what_is_cancelled_gives_its_share_back(limited: Limited, name: str) -> None:
    """A caller whose only place was taken by a request it gave up is let in again."""
    mesh, began, ended = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def hold(patience: int) -> str:
        began.set()
        try:
            if patience:
                await asyncio.Event().wait()
        finally:
            ended.set()
        return "done"

    async with mesh:
        giving_up = asyncio.create_task(mesh.call(name, 1))
        await began.wait()
        giving_up.cancel()
        await asyncio.wait_for(ended.wait(), 10)
        assert "done" == await mesh.call(name, 0, retry=3)


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"rate": 2.5}, 3), ({"rate": 0.1}, 1), ({"rate": 50, "burst": 7}, 7), ({"rate": 3, "burst": 1}, 1)],
)
async def test_the_time_to_try_again_is_true(
    limited: Limited, clock: Clock, name: str, settings: dict[str, float], most: int
) -> None:
    """After the burst a caller is refused; not before the time it is told, but then, it is let in."""
    mesh = limited(**settings)
    serve_echo(mesh, name)
    async with mesh:
        found = await outcomes(mesh, name, most + 2)
        assert ["ok"] * most == found[:most]
        assert 2 == len(refused(found))
        for _ in range(5):
            [refusal] = refused(await outcomes(mesh, name, 1))
            asked = refusal.details["retry_after_ms"]
            assert asked == pytest.approx(1000 / settings["rate"], abs=2)
            clock.now += (asked - 2) / 1000
            assert refused(await outcomes(mesh, name, 1))
            clock.now += 2 / 1000
            assert "ok" == await mesh.call(name)


async def test_the_time_of_a_share_is_when_the_oldest_should_end(
    limited: Limited, clock: Clock, name: str
) -> None:
    """An agent that takes three seconds, asked a second ago, tells its caller to come back in two."""
    mesh, began, go = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        began.set()
        await go.wait()
        return "done"

    async with mesh:
        for _ in range(60):  # until it knows how long that takes
            go.clear()
            calling = asyncio.create_task(mesh.call(name))
            await began.wait()
            began.clear()
            clock.now += 3
            go.set()
            await calling
        go.clear()
        calling = asyncio.create_task(mesh.call(name))
        await began.wait()
        clock.now += 1
        [refusal] = refused(await outcomes(mesh, name, 1))
        go.set()
        await calling
    assert refusal.details["retry_after_ms"] == pytest.approx(2000, abs=10)


async def test_callers_that_try_again_all_get_through(limited: Limited, name: str) -> None:
    """With `retry` a caller that is refused waits as long as it is told, and is answered."""
    mesh = limited(rate=100, burst=2)

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def echo() -> str:
        return "ok"

    async with mesh:
        await mesh.contract(name)
        assert ["ok"] * 6 == await outcomes(mesh, name, 6, retry=9, timeout=20)


async def test_each_caller_has_its_own_rate(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """What one caller has used up is still there for the next one, and for other agents."""
    mesh = limited(rate=2)
    serve_echo(mesh, name)
    serve_echo(mesh, f"{name}.other")
    async with mesh, new_mesh() as first, new_mesh() as second:
        assert 3 == len(refused(await outcomes(first, name, 5)))
        assert ["ok", "ok"] == await outcomes(second, name, 2)
        assert ["ok", "ok"] == await outcomes(first, f"{name}.other", 2)


async def test_all_callers_share_the_total(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """No more than `total_rate` reaches the agent, and what is refused costs no caller anything."""
    mesh = limited(rate=1, burst=2, total_rate=10, total_burst=3)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as first, new_mesh() as second:
        assert ["ok", "ok"] == await outcomes(first, name, 2)
        assert 1 == len(refused(await outcomes(second, name, 2)))
        [refusal] = refused(await outcomes(first, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(1000, abs=2)  # its own is used up too
        [refusal] = refused(await outcomes(second, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(100, abs=2)
        clock.now += 0.101
        assert "ok" == await second.call(name)


async def test_without_a_rate_one_caller_has_its_share_of_the_total(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """Who asks all the time leaves something to those who come back when they are told."""
    mesh = limited(total_rate=10, total_burst=4, share=0.5)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as greedy, new_mesh() as modest:
        assert 2 == len(refused(await outcomes(greedy, name, 4)))
        assert ["ok", "ok"] == await outcomes(modest, name, 2)
        for _ in range(3):
            clock.now += 0.201  # two of the total came back
            assert 1 == len(refused(await outcomes(greedy, name, 2)))
            assert "ok" == await modest.call(name)


async def test_a_rate_that_is_mended_holds_at_once(
    serve: Serve, mesh: AgentMesh, configure: Callable[[str], None], clock: Clock, name: str
) -> None:
    """Who has used up a day's burst of one rate does not wait for that day at another."""
    async with serve({"a.py": MESH + agent(name)}, "plugins.limits = {rate = 0.001, burst = 3}") as host:
        assert 1 == len(refused(await outcomes(mesh, name, 4, payload={})))
        configure("plugins.limits = {rate = 100, burst = 3}")
        assert (await host.reload()) is not None
        assert not refused(await outcomes(mesh, name, 3, payload={}))
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        clock.now += 0.011
        assert not refused(await outcomes(mesh, name, 1, payload={}))


def test_a_share_is_of_whole_requests() -> None:
    """Of 100 at once a share of 0.29 is 29, not what comes of adding binary fractions."""
    shares = {0.29: 29, 0.57: 57, 0.07: 7, 0.001: 1, 1: 100}
    assert list(shares.values()) == [oam_limits._share(share, 100) for share in shares]


async def test_streams_and_sends_count(limited: Limited, clock: Clock, name: str) -> None:
    """A stream that is refused ends with the error, and a send that is refused is not handled."""
    mesh, runs = limited(rate=1, burst=2), 0

    @mesh.agent(AgentSpec(name=name))
    async def count(to: int) -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        for number in range(to):
            yield number

    async with mesh:
        assert [0, 1] == [number async for number in mesh.stream(name, 2)]
        assert [0] == [number async for number in mesh.stream(name, 1)]
        with pytest.raises(Overloaded):
            [number async for number in mesh.stream(name, 1)]
        await mesh.send(name, 1)
        clock.now += 1
        assert [0] == [number async for number in mesh.stream(name, 1)]
    assert 3 == runs


async def test_an_agents_own_settings_come_first(
    serve: Serve, mesh: AgentMesh, clock: Clock, name: str
) -> None:
    """What an agent's table says holds for it, what it leaves out is as for all; `inf` is no limit."""
    toml = f"""
        [plugins.limits]
        rate = 1
        burst = 3
        [agents."{name}.slow".plugins.limits]
        burst = 1
        [agents."{name}.free".plugins.limits]
        rate = inf
    """
    agents = [f"{name}.{kind}" for kind in ("plain", "slow", "free")]
    async with serve({"a.py": MESH + "".join(map(agent, agents))}, toml):
        passed = [5 - len(refused(await outcomes(mesh, each, 5, payload={}))) for each in agents]
    assert [3, 1, 5] == passed


async def test_new_settings_are_followed_and_nothing_is_forgotten(
    serve: Serve, mesh: AgentMesh, configure: Callable[[str], None], clock: Clock, name: str
) -> None:
    """A change of mesh.toml holds from the next request on; what was used up stays used up."""
    async with serve({"a.py": MESH + agent(name)}, "plugins.limits = {rate = 0.1, burst = 2}") as host:
        assert 1 == len(refused(await outcomes(mesh, name, 3, payload={})))
        configure("plugins.limits = {rate = 0.1, burst = 3}")
        assert (await host.reload()) is not None
        assert 2 == len(refused(await outcomes(mesh, name, 3, payload={})))
        write(host.config.folder / "agents", {"a.py": MESH + agent(name, "'new'")})
        assert (await host.reload()) is not None
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        clock.now += 10.01
        assert "new" == await mesh.call(name, {})
        configure("plugins.limits = {rate = 0}")
        outcome = await host.reload()
        assert outcome is not None
        assert "plugins.limits.rate" in outcome.error
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        configure("")
        assert (await host.reload()) is not None
        assert not refused(await outcomes(mesh, name, 9, payload={}))


@pytest.mark.parametrize(
    "wrong", ["rate = 0", "burst = 0", "share = 2", "share = 0", "callers = 0", "rates = 1", "rate = nan"]
)
async def test_settings_that_do_not_fit_stop_the_start(serve: Serve, name: str, wrong: str) -> None:
    """The message names the key."""
    with pytest.raises(ConfigError, match=r"plugins\.limits\." + wrong.partition(" ")[0]):
        async with serve({"a.py": MESH + agent(name)}, f"[plugins.limits]\n{wrong}"):
            pass


async def test_the_least_recently_used_callers_are_forgotten(
    serve: Serve, mesh: AgentMesh, clock: Clock, name: str
) -> None:
    """However many ask, so many as `callers` says are remembered; who asks often is among them."""
    toml = "plugins.limits = {rate = 0.1, burst = 1, callers = 5}"

    async def ask(who: str) -> bool:
        return not refused(await outcomes(mesh, name, 1, payload={}, headers={"X-Subject": who}))

    async with serve({"a.py": MESH + agent(name)}, toml) as host:
        assert await ask("regular")
        for number in range(50):
            assert await ask(f"guest-{number}")
            assert not await ask("regular")
        assert await ask("guest-0")  # forgotten
        limits = host.plugins.all[-1].implementation
        assert isinstance(limits, Limits)
        assert 5 == len(limits._callers._backend.get_client())
        assert {} == limits._running[name]._started


async def test_a_proven_subject_is_one_caller_from_everywhere(
    serve: Serve, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """Two instances of one subject share its rate; who only calls itself so has another one."""
    limits = "plugins.limits = {rate = 1, burst = 2}"
    async with serve({"a.py": MESH + agent(name)}, limits), new_mesh() as first, new_mesh() as second:
        alice: dict[str, Any] = {"payload": {}, "headers": {"X-Subject": "alice"}}
        assert [["ok"], ["ok"]] == [await outcomes(each, name, 1, **alice) for each in (first, second)]
        assert 1 == len(refused(await outcomes(first, name, 1, **alice)))
        assert "ok" == await first.call(name, {})


@given(st.text(), st.text())
def test_names_that_strangers_choose_are_short_and_never_somebody_proven(named: str, subject: str) -> None:
    """Whatever an instance calls itself, its limit is no subject's, and its name takes little memory."""
    stranger = Call("a", identity=Caller(named))
    assert len(caller_of(stranger)) < 200
    if subject:
        assert caller_of(stranger) != caller_of(call_of(named, subject))


def test_who_says_nothing_is_anonymous() -> None:
    """All requests without a name are one caller, messages of a source another one."""
    nobody = call_of()
    assert "anonymous" == caller_of(nobody)
    nobody.verb = "source"
    assert "source" == caller_of(nobody)
    assert "instance me" == caller_of(call_of("me"))


async def test_messages_of_a_source_count_and_changes_of_keys_do_not(
    limited: Limited, clock: Clock, name: str
) -> None:
    """A flood on a subject is cut to the rate; of the shared state no change is lost."""
    mesh, heard, seen = limited(rate=1, burst=2, share=0.001), [], []
    last = asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.hears"), sources=[mesh.subject_source(f"{name}.in")])
    async def hears(message: MeshMessage[int]) -> None:
        heard.append(message.data)

    @mesh.agent(AgentSpec(name=f"{name}.sees"), sources=[mesh.kv_source(f"{name}.*")])
    async def sees(entry: KVEntry[int]) -> None:
        seen.append(entry.value)
        if entry.value == 9:
            last.set()

    async with mesh:
        await mesh.catalog()
        for number in range(10):
            await node_of(mesh).connection.publish(f"{name}.in", str(number).encode())
            await mesh.kv.put(f"{name}.key", str(number))
        await asyncio.wait_for(last.wait(), 10)
    assert [0, 1] == heard
    assert 9 == seen[-1]
