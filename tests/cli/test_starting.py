"""`oam up` at its start: its output, and errors that end the start or leave agents out."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.support.commands import BROKEN, UNREACHABLE, Process, Up, oam, write_project

TYPED = """from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="narrow", description="Takes one type."))
async def narrow(req: {type}) -> str:
    return "x"
"""


def test_log_lines_in_a_pipe_are_plain_text(hosted: Up) -> None:
    """In a pipe each line has time, level, logger and message, without colors, and stdout is empty."""
    line = hosted.wait_for_line("serving ")
    pattern = (
        r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 INFO openagentmesh\.up serving 7 agents on nats://127\.0\.0\.1:\d+"
    )
    assert re.fullmatch(pattern, line)
    assert "\x1b" not in "".join(hosted.err)
    assert [] == hosted.out


def test_log_lines_as_json(tmp_path: Path) -> None:
    """With `--log-format json` each record, also that of a failed module, is a JSON object on one line."""
    with Up(write_project(tmp_path / "p", "echo", broken=True), "--log-format", "json") as host:
        host.signal(signal.SIGTERM)
        result = host.finish()
    records = [json.loads(line) for line in result.err.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*[set(record) for record in records])
    assert ["error", "info", "info", "info"] == [record["level"] for record in records]
    assert "broken.py" in records[0]["message"]
    assert "stopped" == records[-1]["message"]
    assert (0, "") == (result.code, result.out)


def test_a_failed_module_is_logged_and_the_others_are_served(hosted: Up) -> None:
    """A module that fails to load is logged once, with its file and line alone in the traceback."""
    line = f'  File "{hosted.folder}/agents/broken.py", line 3, in <module>\n'
    assert 1 == hosted.err.count(line)
    assert "agents/broken.py failed to load: ValueError: not today" in hosted.err[0]
    served = hosted.err.index(hosted.wait_for_line("serving ") + "\n")
    assert 1 == "".join(hosted.err[:served]).count("  File ")  # no frame of the host
    assert '"said": 1' in hosted.run("agent", "call", "echo", "1").out


def test_a_failed_module_ends_a_strict_start(tmp_path: Path) -> None:
    """With `--strict`, a module that fails to load ends the start; the error has its file and line."""
    result = oam("up", "--strict", cwd=write_project(tmp_path / "p", "echo", broken=True))
    assert 1 == result.code
    [error] = [line for line in result.err.splitlines() if line.startswith("Error [")]
    assert "Error [start_failed] 1 of 2 modules failed to load:" == error
    assert "agents/broken.py: ValueError: not today (agents/broken.py:3)" in result.err
    assert "serving" not in result.err


@pytest.mark.parametrize(
    ("toml", "error"),
    [
        pytest.param("[server", "mesh.toml is not TOML", id="invalid TOML"),
        pytest.param(
            '[server]\nstre = ""\n', "server.stre: unknown key; did you mean 'store'?", id="unknown key"
        ),
    ],
)
def test_an_invalid_mesh_toml_ends_the_start(tmp_path: Path, toml: str, error: str) -> None:
    """`oam up` prints one error for an invalid mesh.toml, without a traceback."""
    (tmp_path / "mesh.toml").write_text(toml)
    result = oam("up", cwd=tmp_path)
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith("Error [invalid_config] ")
    assert error in result.err
    assert "Traceback" not in result.err


def test_a_port_in_use_ends_the_start(hosted: Up, tmp_path: Path) -> None:
    """The error names the port, and the commands to inspect or use its server or to choose another port."""
    port = hosted.url.rpartition(":")[2]
    result = oam("up", "--port", port, cwd=write_project(tmp_path / "p", "echo"))
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith(f"Error [connection_failed] Port {port} of 127.0.0.1 is in use")
    for advice in (f"oam status --url {hosted.url}", f"oam up --url {hosted.url}", "oam up --port 0"):
        assert advice in result.err
    assert "Traceback" not in result.err


def test_an_unreachable_server_ends_the_start(tmp_path: Path) -> None:
    """With a `--url` on which no server listens, the error has that address and the reason."""
    result = oam("up", "--url", UNREACHABLE, cwd=write_project(tmp_path / "p", "echo"))
    assert (1, "") == (result.code, result.out)
    error = f"Error [connection_failed] No NATS server is reachable at {UNREACHABLE}: Connection refused."
    assert error in result.err
    assert "Traceback" not in result.err


def test_ctrl_c_ends_a_start_while_an_import_blocks(tmp_path: Path) -> None:
    """SIGINT during a module's import that does not return exits with code 130."""
    folder = write_project(tmp_path / "p")
    source = 'import sys, time\nprint("importing", file=sys.stderr, flush=True)\ntime.sleep(600)\n'
    (folder / "agents" / "blocking.py").write_text(source)
    with Process("up", cwd=folder) as host:
        host.wait_for_line("importing")
        host.signal(signal.SIGINT)
        assert 130 == host.finish(5).code


@pytest.mark.parametrize(
    ("toml", "source", "advice"),
    [
        pytest.param("", None, "Put a Python file with an agent into agents/, then restart.", id="no module"),
        pytest.param(
            "",
            "x = 1\n",
            "The modules declare no agent: put @mesh.agent(…) above a function, then restart.",
            id="module without agents",
        ),
        pytest.param("", BROKEN, "Fix the errors above, then restart.", id="failed module"),
        pytest.param(
            "[agents.narrow]\nenabled = false\n",
            TYPED.format(type="int"),
            "mesh.toml disables every agent;",
            id="disabled agent",
        ),
    ],
)
def test_the_banner_advises_how_to_serve_agents(
    tmp_path: Path, toml: str, source: str | None, advice: str
) -> None:
    """The banner of a host without agents has the advice that fits the reason."""
    folder = write_project(tmp_path / "p", toml=toml)
    if source is not None:
        (folder / "agents" / "one.py").write_text(source)
    with Process("up", "--log-format", "pretty", cwd=folder) as host:
        assert advice in host.wait_for_line(advice)


def test_the_banner_advises_about_refused_agents(tmp_path: Path) -> None:
    """When the contract policy refuses all agents, the banner has advice for that, and none to add files."""
    first = write_project(tmp_path / "first")
    second = write_project(tmp_path / "second", toml='contract = "refuse"\n')
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


def test_settings_without_a_module_are_logged(tmp_path: Path) -> None:
    """A table of `[settings]` that matches no module is a warning that suggests a similar name."""
    with Process("up", cwd=write_project(tmp_path / "p", "echo", toml="[settings.ecko]\nx = 1\n")) as host:
        line = host.wait_for_line("[settings.ecko]")
    assert "WARNING" in line
    assert "there is no module 'ecko'; did you mean 'echo'?" in line
