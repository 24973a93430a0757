"""Log events of reloads."""

from pathlib import Path

from openagentmesh import AgentMesh, Host
from openagentmesh.protocol import subjects

from tests.support.meshes import listen, next_log_event
from tests.support.modules import Configure
from tests.support.reloads import reload, replayable_agent


async def test_reloads_are_published_as_log_events(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A reload and a refused one are log events of the agent, the latter with the reason."""
    async with Host(configure({"a.py": replayable_agent(name, "1")})) as host:
        await host.node.connection.flush()  # the log event of the start was sent
        messages = await listen(mesh, subjects.logs(name))
        await reload(host, tmp_path, replayable_agent(name, "2"))
        await reload(host, tmp_path, "raise ValueError('not today')\n")
        events = [await next_log_event(messages) for _ in range(2)]
    assert ["agent_reloaded", "reload_failed"] == [event["event"] for event in events]
    assert ["info", "error"] == [event["level"] for event in events]
    assert "ValueError: not today" == events[1]["message"]
