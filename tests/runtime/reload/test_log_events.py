"""Log events of reloads."""

from pathlib import Path

from openagentmesh import AgentMesh, Host
from openagentmesh.protocol import subjects

from tests.support.meshes import listen, next_log_event
from tests.support.modules import Configure
from tests.support.reloads import reload, replayable_agent


async def test_observers_hear_of_reloads(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A log event of the agent for a reload, and one with the reason for a refused one."""
    async with Host(configure({"a.py": replayable_agent(name, "1")})) as host:
        await host.node.connection.flush()  # its start is told already
        heard = await listen(mesh, subjects.logs(name))
        await reload(host, tmp_path, replayable_agent(name, "2"))
        await reload(host, tmp_path, "raise ValueError('not today')\n")
        found = [await next_log_event(heard) for _ in range(2)]
    assert ["agent_reloaded", "reload_failed"] == [event["event"] for event in found]
    assert ["info", "error"] == [event["level"] for event in found]
    assert "ValueError: not today" == found[1]["message"]
