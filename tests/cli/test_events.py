"""Events, sends and log events from the command line."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Process, Up, until, write_project

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A host of the examples that others listen to and send to."""
    folder = write_project(tmp_path_factory.mktemp("talking"), "echo")
    for name in ("publisher", "watcher", "gates", "send", "observe"):
        shutil.copy(EXAMPLES / f"{name}.py", folder / "agents")
    (folder / "agents" / "ends.py").write_text(
        "from collections.abc import AsyncIterator\n"
        "from openagentmesh import AgentMesh, AgentSpec\n"
        "mesh = AgentMesh()\n"
        "@mesh.agent(AgentSpec(name='jobs.log', description='Writes what it is sent into a file.'))\n"
        "async def log(req: dict) -> None:\n"
        "    open(req['path'], 'a').write(req['text'])\n"
    )
    with Up(folder) as host:
        yield host


def test_the_events_of_a_publisher_come_one_a_line_until_ctrl_c(talking: Up) -> None:
    """`agent subscribe` prints JSON lines on stdout as they come, and ends well on Ctrl-C."""
    with Process("agent", "subscribe", "market.gold", "--url", talking.url, cwd=talking.folder) as process:
        process.wait_for_line('"item": "gold"')
        process.signal(signal.SIGINT)
        result = process.finish()
    assert 0 == result.code
    events = [json.loads(line) for line in result.out.splitlines()]
    assert {"gold"} == {event["item"] for event in events}
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("name", "code"), [("echo", "invocation_mismatch"), ("nobody.home", "not_found")])
def test_only_a_publisher_can_be_subscribed_to(talking: Up, name: str, code: str) -> None:
    """Anything else is refused at once, in words."""
    result = talking.run("agent", "subscribe", name)
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith(f"Error [{code}]")


def test_what_is_sent_is_done_without_a_wait(talking: Up, tmp_path: Path) -> None:
    """`agent send` prints nothing and ends well; the agent does its work."""
    path = tmp_path / "written"
    result = talking.run("agent", "send", "jobs.log", json.dumps({"path": str(path), "text": "done"}))
    assert (0, "", "") == (result.code, result.out, result.err)
    assert until(lambda: path.exists() and path.read_text() == "done")


def test_what_is_sent_to_nobody_is_an_error(talking: Up) -> None:
    """A name that nobody serves is told, not swallowed."""
    result = talking.run("agent", "send", "nobody.home", "{}")
    assert 1 == result.code
    assert result.err.startswith("Error [not_found]")


def test_levels_change_live_and_events_come_one_a_line(talking: Up) -> None:
    """After `observe set`, `observe logs` prints the debug events of the next request; both as JSON."""
    assert 0 == talking.run("observe", "set", "nlp.echo", "--log-level", "debug").code
    assert {"log_level": "debug"} == talking.run("observe", "config", "nlp.echo", "--json").json
    with Process(
        "observe", "logs", "nlp.echo", "--json", "--url", talking.url, cwd=talking.folder
    ) as process:
        process.wait_for_line("stop with Ctrl-C")
        assert until(
            lambda: talking.run("agent", "call", "nlp.echo", '"hello"').code == 0 and len(process.out) >= 3
        )
        process.signal(signal.SIGINT)
        result = process.finish()
    assert 0 == result.code
    events = [json.loads(line) for line in result.out.splitlines()]
    assert {"request_received", "request_completed", "usage_reported"} <= {e["event"] for e in events}
    keys = ["timestamp", "level", "agent", "event", "request_id", "message", "data"]
    assert all(keys == list(event) for event in events)


def test_a_level_is_for_one_agent_or_for_all(talking: Up) -> None:
    """`observe set` without an agent and without `--global`, or with both, is bad usage."""
    for arguments in (["--log-level", "info"], ["nlp.echo", "--global", "--log-level", "info"]):
        result = talking.run("observe", "set", *arguments)
        assert (2, "") == (result.code, result.out)
    assert 0 == talking.run("observe", "set", "--global", "--log-level", "warn").code
    assert "warn" in talking.run("observe", "config").out


def test_status_tells_what_runs_by_itself(talking: Up) -> None:
    """Publishers and watchers with their restarts and last error, and agents that are off."""
    shown = talking.run("status").out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert "publisher  running" in lines["market.gold"]
    assert "watcher  running  1 restart" in lines["ops.janitor"]
    assert "RuntimeError: the folder is not mounted" in lines["ops.janitor"]
    assert "inactive: its condition is false" in lines["desk.trade"]


def test_sources_and_gates_are_driven_by_hand(talking: Up) -> None:
    """`mesh publish` and `kv put` are what drives them: the gated agent is on, the driven one handles."""
    assert 1 == talking.run("agent", "call", "desk.trade", '"sell"').code
    assert 0 == talking.run("kv", "put", "desk.status", "open").code
    assert "open\n" == talking.run("kv", "get", "desk.status").out
    assert until(lambda: talking.run("agent", "call", "desk.trade", '"sell"').code == 0)
    assert 0 == talking.run("kv", "delete", "desk.status").code
    missing = talking.run("kv", "get", "desk.status")
    assert (1, "") == (missing.code, missing.out)
    assert missing.err.startswith("Error [not_found]")
    with Process("mesh", "listen", "by.hand", "--json", "--url", talking.url, cwd=talking.folder) as process:
        process.wait_for_line("stop with Ctrl-C")
        assert 0 == talking.run("mesh", "publish", "by.hand", '{"item": "tea"}').code
        assert '{\\"item\\":\\"tea\\"}' in process.wait_for_line('by.hand"')
    assert 2 == talking.run("mesh", "publish", "by.*", "{}").code
