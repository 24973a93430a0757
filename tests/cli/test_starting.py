"""`oam up` starts what can be started, and says in words what cannot."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.support.commands import BROKEN, UNREACHABLE, Process, Result, Up, oam, write_project

TYPED = """from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="narrow", description="Takes one type."))
async def narrow(req: {type}) -> str:
    return "x"
"""


def test_a_call_is_answered(hosted: Up) -> None:
    """The reply of a hosted agent is on stdout, and nothing else is said anywhere."""
    result = hosted.run("agent", "call", "nlp.summarizer", '{"text": "hello world", "max_length": 5}')
    assert Result(0, '{"summary": "hello"}\n', "") == result


def test_a_pipe_gets_plain_lines(hosted: Up) -> None:
    """In a pipe, each event is a line with time, level, logger and text, without colours."""
    line = hosted.wait_for_line("serving ")
    pattern = (
        r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 INFO openagentmesh\.up serving 7 agents on nats://127\.0\.0\.1:\d+"
    )
    assert re.fullmatch(pattern, line)
    assert "\x1b" not in "".join(hosted.err)
    assert [] == hosted.out


def test_json_log_lines(tmp_path: Path) -> None:
    """With `--log-format json` every event, a failed module's too, is one JSON object on a line."""
    with Up(write_project(tmp_path / "p", "echo", broken=True), "--log-format", "json") as host:
        host.signal(signal.SIGTERM)
        result = host.finish()
    events = [json.loads(line) for line in result.err.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*[set(event) for event in events])
    assert ["error", "info", "info", "info"] == [event["level"] for event in events]
    assert "broken.py" in events[0]["message"]
    assert "stopped" == events[-1]["message"]
    assert (0, "") == (result.code, result.out)


def test_a_broken_module_is_told_in_the_log(hosted: Up) -> None:
    """A module that fails to load is logged with its own file and line, and the rest serves."""
    line = f'  File "{hosted.folder}/agents/broken.py", line 3, in <module>\n'
    assert 1 == hosted.err.count(line)
    assert "agents/broken.py failed to load: ValueError: not today" in hosted.err[0]
    served = hosted.err.index(hosted.wait_for_line("serving ") + "\n")
    assert 1 == "".join(hosted.err[:served]).count("  File ")  # no frame of ours
    assert '"said": 1' in hosted.run("agent", "call", "echo", "1").out


def test_status_names_what_failed(hosted: Up) -> None:
    """`oam status` shows the host, the failed module with its traceback, and the agents that serve."""
    result = hosted.run("status")
    assert (0, "") == (result.code, result.err)
    assert f"dev  pid {hosted.pid}" in result.out
    assert "agents/broken.py: ValueError: not today" in result.out
    assert f'File "{hosted.folder}/agents/broken.py", line 3' in result.out
    assert "nlp.summarizer" in result.out


def test_status_for_programs(hosted: Up) -> None:
    """`oam status --json` has the same facts: pid, modules with state and line, agents, the server."""
    status = hosted.status
    failed = [module for module in status["modules"] if module["state"] == "failed"]
    assert [("agents/broken.py", "ValueError: not today", f"{hosted.folder}/agents/broken.py:3")] == [
        (module["origin"], module["error"], module["line"]) for module in failed
    ]
    assert 'raise ValueError("not today")' in failed[0]["traceback"]
    assert (hosted.pid, "dev", hosted.url) == (
        status["pid"],
        status["host"],
        status["embedded_server"]["url"],
    )
    expected = {"echo", "fail", "hold", "narrow", "nlp.summarizer", "quota", "time.ticker"}
    assert expected == {agent["name"] for agent in status["agents"]}


def test_strict(tmp_path: Path) -> None:
    """With `--strict` a module that fails to load ends the start, named with its line."""
    result = oam("up", "--strict", cwd=write_project(tmp_path / "p", "echo", broken=True))
    assert 1 == result.code
    [told] = [line for line in result.err.splitlines() if line.startswith("Error [")]
    assert "Error [start_failed] 1 of 2 modules failed to load:" == told
    assert "agents/broken.py: ValueError: not today (agents/broken.py:3)" in result.err
    assert "serving" not in result.err


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[server", "mesh.toml is not TOML"),
        ('[server]\nstre = ""\n', "server.stre: unknown key; did you mean 'store'?"),
    ],
)
def test_a_broken_mesh_toml(tmp_path: Path, toml: str, told: str) -> None:
    """A mesh.toml that cannot be used ends the start with one message, without a traceback."""
    (tmp_path / "mesh.toml").write_text(toml)
    result = oam("up", cwd=tmp_path)
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith("Error [invalid_config] ")
    assert told in result.err
    assert "Traceback" not in result.err


def test_a_port_in_use(hosted: Up, tmp_path: Path) -> None:
    """A port in use ends the start; the message says whom to ask and what to try."""
    port = hosted.url.rpartition(":")[2]
    result = oam("up", "--port", port, cwd=write_project(tmp_path / "p", "echo"))
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith(f"Error [connection_failed] Port {port} of 127.0.0.1 is in use")
    for advice in (f"oam status --url {hosted.url}", f"oam up --url {hosted.url}", "oam up --port 0"):
        assert advice in result.err
    assert "Traceback" not in result.err


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """An `--url` that nobody answers at ends the start with a message that names it."""
    result = oam("up", "--url", UNREACHABLE, cwd=write_project(tmp_path / "p", "echo"))
    assert (1, "") == (result.code, result.out)
    told = f"Error [connection_failed] No NATS server is reachable at {UNREACHABLE}: Connection refused."
    assert told in result.err
    assert "Traceback" not in result.err


def test_a_module_that_hangs_can_be_left(tmp_path: Path) -> None:
    """Ctrl-C while a module hangs in its import ends the start."""
    folder = write_project(tmp_path / "p")
    source = 'import sys, time\nprint("hanging", file=sys.stderr, flush=True)\ntime.sleep(600)\n'
    (folder / "agents" / "hanging.py").write_text(source)
    with Process("up", cwd=folder) as host:
        host.wait_for_line("hanging")
        host.signal(signal.SIGINT)
        assert 130 == host.finish(5).code


@pytest.mark.parametrize(
    ("toml", "source", "advice"),
    [
        ("", None, "Put a Python file with an agent into agents/, then restart."),
        ("", "x = 1\n", "The modules declare no agent: put @mesh.agent(…) above a function, then restart."),
        ("", BROKEN, "Fix the errors above, then restart."),
        ("[agents.narrow]\nenabled = false\n", TYPED.format(type="int"), "mesh.toml disables every agent;"),
    ],
)
def test_why_nothing_is_served(tmp_path: Path, toml: str, source: str | None, advice: str) -> None:
    """A host without agents says what keeps it from having some."""
    folder = write_project(tmp_path / "p", toml=toml)
    if source is not None:
        (folder / "agents" / "one.py").write_text(source)
    with Process("up", "--log-format", "pretty", cwd=folder) as host:
        assert advice in host.wait_for_line(advice)


def test_refused_agents_are_told(tmp_path: Path) -> None:
    """When the contract policy refuses all agents, the banner says so, and not to add files."""
    first, second = (
        write_project(tmp_path / "first"),
        write_project(tmp_path / "second", toml='contract = "refuse"\n'),
    )
    (first / "agents" / "one.py").write_text(TYPED.format(type="int"))
    (second / "agents" / "one.py").write_text(TYPED.format(type="dict"))
    with (
        Up(first) as running,
        Process("up", "--url", running.url, "--log-format", "pretty", cwd=second) as host,
    ):
        host.wait_for_line("narrow not served: contract incompatible")
        host.wait_for_line('or set [host] contract = "warn"')
        host.wait_for_line("Ctrl-C finishes")
        assert "Put a Python file" not in "".join(host.err)


def test_settings_of_no_module_are_told(tmp_path: Path) -> None:
    """A table of `[settings]` that no module reads is a warning with the name that was meant."""
    with Process("up", cwd=write_project(tmp_path / "p", "echo", toml="[settings.ecko]\nx = 1\n")) as host:
        told = host.wait_for_line("[settings.ecko]")
    assert "WARNING" in told
    assert "there is no module 'ecko'; did you mean 'echo'?" in told
