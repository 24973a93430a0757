"""Settings of limits: those of an agent, their changes while a host runs, and invalid ones."""

from collections.abc import Callable

import pytest
from openagentmesh import AgentMesh
from openagentmesh.runtime.config import ConfigError

from tests.support.limits import Clock, Serve, outcomes, refused
from tests.support.modules import MESH, agent, write


async def test_a_changed_rate_applies_immediately(
    serve_limited: Serve, mesh: AgentMesh, configure_limits: Callable[[str], None], clock: Clock, name: str
) -> None:
    """A caller that has used up the burst of a low rate does not wait for it after the rate is raised."""
    async with serve_limited(
        {"a.py": MESH + agent(name)}, "plugins.limits = {rate = 0.001, burst = 3}"
    ) as host:
        assert 1 == len(refused(await outcomes(mesh, name, 4, payload={})))
        configure_limits("plugins.limits = {rate = 100, burst = 3}")
        assert (await host.reload()) is not None
        assert not refused(await outcomes(mesh, name, 3, payload={}))
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        clock.now += 0.011
        assert not refused(await outcomes(mesh, name, 1, payload={}))


async def test_the_settings_of_an_agent_take_precedence(
    serve_limited: Serve, mesh: AgentMesh, clock: Clock, name: str
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
    async with serve_limited({"a.py": MESH + "".join(map(agent, agents))}, toml):
        permitted = [5 - len(refused(await outcomes(mesh, each, 5, payload={}))) for each in agents]
    assert [3, 1, 5] == permitted


async def test_new_settings_apply_to_the_counts_so_far(
    serve_limited: Serve, mesh: AgentMesh, configure_limits: Callable[[str], None], clock: Clock, name: str
) -> None:
    """A change of mesh.toml applies from the next request on; previous requests still count."""
    async with serve_limited(
        {"a.py": MESH + agent(name)}, "plugins.limits = {rate = 0.1, burst = 2}"
    ) as host:
        assert 1 == len(refused(await outcomes(mesh, name, 3, payload={})))
        configure_limits("plugins.limits = {rate = 0.1, burst = 3}")
        assert (await host.reload()) is not None
        assert 2 == len(refused(await outcomes(mesh, name, 3, payload={})))
        write(host.config.folder / "agents", {"a.py": MESH + agent(name, "'new'")})
        assert (await host.reload()) is not None
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        clock.now += 10.01
        assert "new" == await mesh.call(name, {})
        configure_limits("plugins.limits = {rate = 0}")
        outcome = await host.reload()
        assert outcome is not None
        assert "plugins.limits.rate" in outcome.error
        assert 1 == len(refused(await outcomes(mesh, name, 1, payload={})))
        configure_limits("")
        assert (await host.reload()) is not None
        assert not refused(await outcomes(mesh, name, 9, payload={}))


@pytest.mark.parametrize(
    "wrong", ["rate = 0", "burst = 0", "share = 2", "share = 0", "callers = 0", "rates = 1", "rate = nan"]
)
async def test_invalid_settings_fail_the_start(serve_limited: Serve, name: str, wrong: str) -> None:
    """The error names the key."""
    with pytest.raises(ConfigError, match=r"plugins\.limits\." + wrong.partition(" ")[0]):
        async with serve_limited({"a.py": MESH + agent(name)}, f"[plugins.limits]\n{wrong}"):
            pass
