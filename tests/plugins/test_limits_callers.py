"""Callers of limits: which requests count for one caller, and how many callers are remembered."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from oam_limits import Limits, caller_of
from openagentmesh import AgentMesh, Call, Caller

from tests.support.limits import Clock, Limited, Serve, outcomes, refused, serve_echo
from tests.support.modules import MESH, agent


def call_of(instance: str = "", subject: str = "") -> Call:
    return Call("a", instance_id=instance, identity=Caller(instance, subject) if subject else None)


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


async def test_the_least_recently_used_callers_are_dropped(
    serve_limited: Serve, mesh: AgentMesh, clock: Clock, name: str
) -> None:
    """As many callers as `callers` are remembered: those with the latest requests."""
    toml = "plugins.limits = {rate = 0.1, burst = 1, callers = 5}"

    async def is_permitted(subject: str) -> bool:
        return not refused(await outcomes(mesh, name, 1, payload={}, headers={"X-Subject": subject}))

    async with serve_limited({"a.py": MESH + agent(name)}, toml) as host:
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
    serve_limited: Serve, new_mesh: Callable[[], AgentMesh], clock: Clock, name: str
) -> None:
    """Two instances of a verified subject share its rate; an instance without it has another rate."""
    limits = "plugins.limits = {rate = 1, burst = 2}"
    async with serve_limited({"a.py": MESH + agent(name)}, limits), new_mesh() as first, new_mesh() as second:
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
