"""`oam` commands as processes, and the projects they run in."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

OAM = str(Path(sys.executable).with_name("oam"))
# An address without a server.
UNREACHABLE = "nats://127.0.0.1:1"
TIMEOUT_S = 20.0
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: without settings of the developer, and warnings are errors."""
    kept = {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
    # `mesh up` leaves its server running on purpose.
    warnings = "error,ignore::ResourceWarning:subprocess"
    return kept | {"PYTHONWARNINGS": warnings, "COLUMNS": "400"} | dict(extra or {})


@dataclass(slots=True, frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output as JSON, decoded."""
        return json.loads(self.out)


class Process:
    """A running `oam`, killed at the end of its `with` block."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        stdin_text: str = "",
        env: Mapping[str, str] | None = None,
        program: str = OAM,
    ) -> None:
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(stdin_text.encode())
            stdin.seek(0)
            self._process = subprocess.Popen(
                [program, *arguments],
                cwd=cwd,
                env=environment(env),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            self._start_reader(self._process.stdout, self.out),
            self._start_reader(self._process.stderr, self.err),
        ]

    def _start_reader(self, pipe: IO[str], lines: list[str]) -> threading.Thread:
        # One after the other: two threads that start at once may both install the tracer of coverage,
        # which fails in Python 3.11.
        is_reading = threading.Event()
        reader = threading.Thread(target=self._read, args=(pipe, lines, is_reading))
        reader.start()
        is_reading.wait()
        return reader

    def _read(self, pipe: IO[str], lines: list[str], is_reading: threading.Event) -> None:
        is_reading.set()
        with pipe:
            for line in pipe:
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _find(self, text: str) -> str:
        return next((line.rstrip() for line in (*self.out, *self.err) if text in line), "")

    def wait_for_line(self, text: str) -> str:
        """Wait for a line of output that contains `text`, and return it; fail without one."""
        deadline = time.monotonic() + TIMEOUT_S
        with self._changed:
            while not (found := self._find(text)) and time.monotonic() < deadline:
                if not any(reader.is_alive() for reader in self._readers):
                    break
                self._changed.wait(0.1)
        if not found:
            self.kill()
            raise AssertionError(f"no line with {text!r} in:\n{''.join(self.out + self.err)}")
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self._process.send_signal(number)

    def finish(self, timeout: float = TIMEOUT_S) -> Result:
        """Wait until the process exits; kill it and fail when that takes longer than `timeout` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running:\n{''.join(self.out + self.err)[-2000:]}") from None
        for reader in self._readers:
            reader.join()
        return Result(code, "".join(self.out), "".join(self.err))

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def oam(*arguments: str, cwd: Path, stdin_text: str = "", env: Mapping[str, str] | None = None) -> Result:
    """Run a command until it exits."""
    with Process(*arguments, cwd=cwd, stdin_text=stdin_text, env=env) as process:
        return process.finish()


def run_parallel(*commands: tuple[str, ...], cwd: Path, stdin_text: str = "") -> list[Result]:
    """Run several commands in parallel until all have exited."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(Process(*command, cwd=cwd, stdin_text=stdin_text)) for command in commands
        ]
        return [process.finish() for process in running]


class Up(Process):
    """An `oam up` whose agents are served, at `url`."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        super().__init__("up", *arguments, cwd=folder, env=env)
        self.folder = folder
        found = re.search(r"nats://[\d.:]+", self.wait_for_line("serving "))
        assert found is not None
        self.url = found[0]

    def run(self, *arguments: str, stdin_text: str = "") -> Result:
        """Run a command that connects to this host's server."""
        return oam(*arguments, "--url", self.url, cwd=self.folder, stdin_text=stdin_text)

    def run_all(self, *commands: tuple[str, ...]) -> list[Result]:
        """Run several commands that connect to this host's server in parallel."""
        return run_parallel(*[(*command, "--url", self.url) for command in commands], cwd=self.folder)

    @property
    def status(self) -> dict[str, Any]:
        """The status of this host, by `oam status --json`."""
        [host] = self.run("status", "--json").json
        assert isinstance(host, dict)
        return host


def until(condition: Callable[[], bool], timeout: float = TIMEOUT_S) -> bool:
    """Poll a condition until it is true; False if it is still false after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def has_exited(pid: int) -> bool:
    """Whether a process has exited, also if its parent has not waited for it yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # it has exited since the check above, or this system has no /proc
        return False


def is_closed(url: str) -> bool:
    """Whether no server listens on the address of a URL."""
    parts = urlsplit(url)
    with socket.socket() as client:
        return client.connect_ex((parts.hostname, parts.port)) != 0


def free_port() -> int:
    """A port that no server uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert isinstance(port, int)
        return port


SAMPLES = Path(__file__).parents[2] / "agents"
FAILING = """
from openagentmesh import AgentMesh, AgentSpec, MeshError

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="fail", description="Fails."))
async def fail(req: dict) -> str:
    raise ValueError("something odd")

@mesh.agent(AgentSpec(name="quota", description="Fails with an application-defined code."))
async def quota(req: dict) -> str:
    raise MeshError("quota_used_up", "Try again tomorrow")
"""
HOLDING = """
import asyncio, sys
from pathlib import Path
from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()

@mesh.agent(AgentSpec(name="{name}", description="Answers when the file exists."))
async def {name}(req: dict) -> str:
    print("{name} runs", file=sys.stderr, flush=True)
    while not Path(req["until"]).exists():
        await asyncio.sleep(0.01)
    return "held"
"""
BROKEN = """from openagentmesh import AgentMesh

raise ValueError("not today")
"""


def write_project(
    folder: Path,
    *samples: str,
    holding: tuple[str, ...] = (),
    failing: bool = False,
    broken: bool = False,
    toml: str = "",
) -> Path:
    """Write mesh.toml, with a temporary server on a free port, and agents; returns the folder.

    Args:
        folder: The folder to create.
        *samples: Names of samples of this repository.
        holding: Names of agents that answer when a file exists, named by `until` in the request.
        failing: Whether to add the agents `fail` and `quota`.
        broken: Whether to add a module that cannot be imported.
        toml: More of mesh.toml; lines before its first table belong to [host].
    """
    agents = folder / "agents"
    agents.mkdir(parents=True)
    for sample in samples:
        shutil.copy(SAMPLES / f"{sample}.py", agents)
    for name in holding:
        (agents / f"{name}.py").write_text(HOLDING.format(name=name))
    if failing:
        (agents / "failing.py").write_text(FAILING)
    if broken:
        (agents / "broken.py").write_text(BROKEN)
    (folder / "mesh.toml").write_text(
        '[server]\nport = 0\nstore = ""\n'
        f'[host]\nname = "{folder.name}"\nagents = ["agents"]\nentry_points = false\n{toml}'
    )
    return folder
