"""Limits: requests above a caller's rate or share are refused, and those of other callers are not."""

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

from tests.support.modules import MESH, agent, write

Limited = Callable[..., AgentMesh]
Serve = Callable[..., AbstractAsyncContextManager[Host]]


class Clock:
    """A clock that a test advances; each reading adds a microsecond, and it starts far from 0."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the plugin and of its rate limiter."""
    clock = Clock()
    monkeypatch.setattr("throttled.utils.now_mono_f", clock)
    monkeypatch.setattr(oam_limits, "monotonic", clock)
    return clock


@pytest.fixture
def limited(url: str) -> Limited:
    """Creates meshes with the plugin."""
    return lambda *plugins, **settings: AgentMesh(url, plugins=[*plugins, Limits(Settings(**settings))])


@pytest.fixture
def configure(tmp_path: Path, url: str) -> Callable[[str], None]:
    """Writes mesh.toml."""

    def configure_(toml: str) -> None:
        text = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.drain_timeout = 1\n{toml}"
        (tmp_path / "mesh.toml").write_text(text)

    return configure_


@pytest.fixture
def serve(tmp_path: Path, configure: Callable[[str], None]) -> Serve:
    """A host with the plugin, that serves `agents/` with the settings of its mesh.toml."""

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
    """Verifies callers by a header with their subject."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(endpoint: Callable[[Call], Awaitable[Any]]) -> Callable[[Call], Awaitable[Any]]:
            async def with_identity(call: Call) -> Any:
                if "X-Subject" in call.headers:
                    call.identity = Caller(call.caller.instance_id, call.headers["X-Subject"])
                return await endpoint(call)

            return with_identity

        return middleware


async def outcomes(mesh: AgentMesh, name: str, count: int, **more: Any) -> list[Any]:
    """The results of concurrent calls: answers and errors."""
    return await asyncio.gather(*[mesh.call(name, **more) for _ in range(count)], return_exceptions=True)


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
    """While one caller sends far more requests than an agent can run, those of another are all answered."""
    source = "import asyncio\n" + MESH + agent(name, "await asyncio.sleep(0.005) or 'done'")
    limits = "limits = {concurrency = 4, queue = 2}"
    async with serve({"a.py": source}, limits), new_mesh() as greedy, new_mesh() as modest:
        stopping = asyncio.Event()

        async def send_many() -> list[Any]:
            found = []
            while not stopping.is_set():
                found += await outcomes(greedy, name, 200, payload={})
            return found

        sending = asyncio.create_task(send_many())
        answers = [await modest.call(name, {}) for _ in range(50)]
        stopping.set()
        of_greedy = await sending
    assert ["done"] * 50 == answers
    assert refused(of_greedy)
    assert "done" in of_greedy
    assert len(refused(of_greedy)) + of_greedy.count("done") == len(of_greedy)


async def test_a_share_limits_the_concurrent_requests_of_a_caller(
    limited: Limited, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """With a concurrency of 128, a share of 0.02 is two: a third request is refused until one has ended."""
    mesh, release = limited(share=0.02), asyncio.Event()
    running = asyncio.Semaphore(0)

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        running.release()
        await release.wait()
        return "done"

    async with mesh, new_mesh() as caller, new_mesh() as other:
        held = [asyncio.create_task(caller.call(name)) for _ in range(2)]
        await running.acquire()
        await running.acquire()
        with pytest.raises(Overloaded, match="has 2 requests at agent"):
            await caller.call(name)
        of_other = asyncio.create_task(other.call(name))
        await running.acquire()
        release.set()
        assert ["done"] * 3 == await asyncio.gather(*held, of_other)
        assert "done" == await caller.call(name)


async def test_a_cancelled_request_releases_its_share(limited: Limited, name: str) -> None:
    """After a caller with a share of one request has cancelled it, its next request is permitted."""
    mesh, began, ended = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name, idempotent=True))
    async def hold(forever: bool) -> str:
        began.set()
        try:
            if forever:
                await asyncio.Event().wait()
        finally:
            ended.set()
        return "done"

    async with mesh:
        calling = asyncio.create_task(mesh.call(name, payload=True))
        await began.wait()
        calling.cancel()
        await asyncio.wait_for(ended.wait(), 10)
        assert "done" == await mesh.call(name, payload=False, retry=3)


@pytest.mark.parametrize(
    ("settings", "burst"),
    [({"rate": 2.5}, 3), ({"rate": 0.1}, 1), ({"rate": 50, "burst": 7}, 7), ({"rate": 3, "burst": 1}, 1)],
)
async def test_a_rate_permits_a_request_after_the_retry_time(
    limited: Limited, clock: Clock, name: str, settings: dict[str, float], burst: int
) -> None:
    """After the burst, a request is refused before `retry_after_ms` has passed, and permitted then."""
    mesh = limited(**settings)
    serve_echo(mesh, name)
    async with mesh:
        found = await outcomes(mesh, name, burst + 2)
        assert ["ok"] * burst == found[:burst]
        assert 2 == len(refused(found))
        for _ in range(5):
            [refusal] = refused(await outcomes(mesh, name, 1))
            retry_after_ms = refusal.details["retry_after_ms"]
            assert retry_after_ms == pytest.approx(1000 / settings["rate"], abs=2)
            clock.now += (retry_after_ms - 2) / 1000
            assert refused(await outcomes(mesh, name, 1))
            clock.now += 2 / 1000
            assert "ok" == await mesh.call(name)


async def test_the_retry_time_of_a_share_is_the_expected_end_of_the_oldest_request(
    limited: Limited, clock: Clock, name: str
) -> None:
    """For an agent that takes three seconds, and a request of a second ago, the retry time is two seconds."""
    mesh, began, release = limited(share=0.001), asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hold() -> str:
        began.set()
        await release.wait()
        return "done"

    async with mesh:
        for _ in range(60):  # until the average duration is three seconds
            release.clear()
            calling = asyncio.create_task(mesh.call(name))
            await began.wait()
            began.clear()
            clock.now += 3
            release.set()
            await calling
        release.clear()
        calling = asyncio.create_task(mesh.call(name))
        await began.wait()
        clock.now += 1
        [refusal] = refused(await outcomes(mesh, name, 1))
        release.set()
        await calling
    assert refusal.details["retry_after_ms"] == pytest.approx(2000, abs=10)


async def test_refused_calls_with_retry_are_answered(limited: Limited, name: str) -> None:
    """A refused call with `retry` waits for `retry_after_ms`, and is answered then."""
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
    """The rate of one caller at one agent limits neither other callers nor other agents."""
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
    """No more than `total_rate` reaches the agent, and a refused request does not count for any rate."""
    mesh = limited(rate=1, burst=2, total_rate=10, total_burst=3)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as first, new_mesh() as second:
        assert ["ok", "ok"] == await outcomes(first, name, 2)
        assert 1 == len(refused(await outcomes(second, name, 2)))
        [refusal] = refused(await outcomes(first, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(1000, abs=2)  # of its own rate
        [refusal] = refused(await outcomes(second, name, 1))
        assert refusal.details["retry_after_ms"] == pytest.approx(100, abs=2)
        clock.now += 0.101
        assert "ok" == await second.call(name)


async def test_without_a_rate_one_caller_has_its_share_of_the_total(
    limited: Limited, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """A caller that sends requests all the time leaves the rest of the total to other callers."""
    mesh = limited(total_rate=10, total_burst=4, share=0.5)
    serve_echo(mesh, name)
    async with mesh, new_mesh() as greedy, new_mesh() as modest:
        assert 2 == len(refused(await outcomes(greedy, name, 4)))
        assert ["ok", "ok"] == await outcomes(modest, name, 2)
        for _ in range(3):
            clock.now += 0.201  # two more of the total are permitted
            assert 1 == len(refused(await outcomes(greedy, name, 2)))
            assert "ok" == await modest.call(name)


async def test_a_changed_rate_applies_immediately(
    serve: Serve, mesh: AgentMesh, configure: Callable[[str], None], clock: Clock, name: str
) -> None:
    """A caller that has used up the burst of a low rate does not wait for it after the rate is raised."""
    async with serve({"a.py": MESH + agent(name)}, "plugins.limits = {rate = 0.001, burst = 3}") as host:
        assert 1 == len(refused(await outcomes(mesh, name, 4, payload={})))
        configure("plugins.limits = {rate = 100, burst = 3}")
        assert (await host.reload()) is not None
        assert not refused(await outcomes(mesh, name, 3, payload={}))
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        clock.now += 0.011
        assert not refused(await outcomes(mesh, name, 1, payload={}))


def test_a_share_is_a_number_of_whole_requests() -> None:
    """With a concurrency of 100, a share of 0.29 is 29, in spite of the rounding of binary fractions."""
    shares = {0.29: 29, 0.57: 57, 0.07: 7, 0.001: 1, 1: 100}
    assert list(shares.values()) == [oam_limits._share(share, 100) for share in shares]


async def test_streams_and_sends_count(limited: Limited, clock: Clock, name: str) -> None:
    """A refused stream ends with the error, and a refused send is not handled."""
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


async def test_the_settings_of_an_agent_take_precedence(
    serve: Serve, mesh: AgentMesh, clock: Clock, name: str
) -> None:
    """An agent's table overrides that of all agents, key by key; `inf` is no limit."""
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
        permitted = [5 - len(refused(await outcomes(mesh, each, 5, payload={}))) for each in agents]
    assert [3, 1, 5] == permitted


async def test_new_settings_apply_to_the_counts_so_far(
    serve: Serve, mesh: AgentMesh, configure: Callable[[str], None], clock: Clock, name: str
) -> None:
    """A change of mesh.toml applies from the next request on; previous requests still count."""
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
async def test_invalid_settings_fail_the_start(serve: Serve, name: str, wrong: str) -> None:
    """The error names the key."""
    with pytest.raises(ConfigError, match=r"plugins\.limits\." + wrong.partition(" ")[0]):
        async with serve({"a.py": MESH + agent(name)}, f"[plugins.limits]\n{wrong}"):
            pass


async def test_the_least_recently_used_callers_are_dropped(
    serve: Serve, mesh: AgentMesh, clock: Clock, name: str
) -> None:
    """As many callers as `callers` are remembered: those with the latest requests."""
    toml = "plugins.limits = {rate = 0.1, burst = 1, callers = 5}"

    async def is_permitted(subject: str) -> bool:
        return not refused(await outcomes(mesh, name, 1, payload={}, headers={"X-Subject": subject}))

    async with serve({"a.py": MESH + agent(name)}, toml) as host:
        assert await is_permitted("regular")
        for number in range(50):
            assert await is_permitted(f"guest-{number}")
            assert not await is_permitted("regular")
        assert await is_permitted("guest-0")  # dropped
        limits = host.plugins.all[-1].implementation
        assert isinstance(limits, Limits)
        assert 5 == len(limits._callers._backend.get_client())
        assert {} == limits._running[name]._started


async def test_all_instances_of_a_verified_subject_are_one_caller(
    serve: Serve, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """Two instances of a verified subject share its rate; an instance without it has another rate."""
    limits = "plugins.limits = {rate = 1, burst = 2}"
    async with serve({"a.py": MESH + agent(name)}, limits), new_mesh() as first, new_mesh() as second:
        alice: dict[str, Any] = {"payload": {}, "headers": {"X-Subject": "alice"}}
        assert [["ok"], ["ok"]] == [await outcomes(each, name, 1, **alice) for each in (first, second)]
        assert 1 == len(refused(await outcomes(first, name, 1, **alice)))
        assert "ok" == await first.call(name, {})


@given(st.text(), st.text())
def test_instance_ids_are_truncated_and_never_equal_a_subject(instance_id: str, subject: str) -> None:
    """An unverified caller never shares the limit of a verified subject, and a long id is truncated."""
    unverified = Call("a", identity=Caller(instance_id))
    assert len(caller_of(unverified)) < 200
    if subject:
        assert caller_of(unverified) != caller_of(call_of(instance_id, subject))


def test_requests_without_an_instance_id_are_one_caller() -> None:
    """All requests without an instance id are one anonymous caller, messages of sources another one."""
    anonymous = call_of()
    assert "anonymous" == caller_of(anonymous)
    anonymous.verb = "source"
    assert "source" == caller_of(anonymous)
    assert "instance me" == caller_of(call_of("me"))


async def test_messages_of_a_source_count_and_changes_of_keys_do_not(
    limited: Limited, clock: Clock, name: str
) -> None:
    """Messages of a subject are limited to the rate, changes of keys are not."""
    mesh, messages, values = limited(rate=1, burst=2, share=0.001), [], []
    last = asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.in")])
    async def on_message(message: MeshMessage[int]) -> None:
        messages.append(message.data)

    @mesh.agent(AgentSpec(name=f"{name}.changes"), sources=[mesh.kv_source(f"{name}.*")])
    async def on_change(entry: KVEntry[int]) -> None:
        values.append(entry.value)
        if entry.value == 9:
            last.set()

    async with mesh:
        await mesh.catalog()
        for number in range(10):
            await mesh.publish(f"{name}.in", str(number))
            await mesh.kv.put(f"{name}.key", str(number))
        await asyncio.wait_for(last.wait(), 10)
    assert [0, 1] == messages
    assert 9 == values[-1]
