"""Commands as their users run them: processes, what they say, and what is left of them."""

import json
import os
import re
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
NOBODY = "nats://127.0.0.1:1"
PATIENCE = 20.0
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command finds: nothing that changes addresses or colours, and warnings are errors."""
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    # `mesh up` leaves its server behind on purpose.
    warnings = "error,ignore::ResourceWarning:subprocess"
    return kept | {"PYTHONWARNINGS": warnings, "COLUMNS": "400"} | dict(more or {})


@dataclass(slots=True, frozen=True)
class Result:
    """What is left of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Process:
    """A running `oam`; whoever leaves its block ends it."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        given: str = "",
        env: Mapping[str, str] | None = None,
        program: str = OAM,
    ) -> None:
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(given.encode())
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
            threading.Thread(target=self._read, args=(self._process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self._process.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _find(self, text: str) -> str:
        return next((line.rstrip() for line in (*self.out, *self.err) if text in line), "")

    def said(self, text: str) -> str:
        """Wait for a line that contains `text`."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not (found := self._find(text)) and time.monotonic() < deadline:
                if not any(reader.is_alive() for reader in self._readers):
                    break
                self._changed.wait(0.1)
        if not found:
            self.stop()
            raise AssertionError(f"no line with {text!r} in:\n{''.join(self.out + self.err)}")
        return found

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def finish(self, timeout: float = PATIENCE) -> Result:
        """Wait until it has ended."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"still running:\n{''.join(self.out + self.err)[-2000:]}") from None
        for reader in self._readers:
            reader.join()
        return Result(code, "".join(self.out), "".join(self.err))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def oam(*arguments: str, cwd: Path, given: str = "", env: Mapping[str, str] | None = None) -> Result:
    """Run a command to its end."""
    with Process(*arguments, cwd=cwd, given=given, env=env) as process:
        return process.finish()


def side_by_side(*commands: tuple[str, ...], cwd: Path, given: str = "") -> list[Result]:
    """Run several commands at once, each to its end."""
    with ExitStack() as stack:
        running = [stack.enter_context(Process(*command, cwd=cwd, given=given)) for command in commands]
        return [process.finish() for process in running]


class Up(Process):
    """An `oam up` that serves, at `url`."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        super().__init__("up", *arguments, cwd=folder, env=env)
        self.folder = folder
        found = re.search(r"nats://[\d.:]+", self.said("serving "))
        assert found is not None
        self.url = found[0]

    def ask(self, *arguments: str, given: str = "") -> Result:
        """Run a command against it."""
        return oam(*arguments, "--url", self.url, cwd=self.folder, given=given)

    def ask_all(self, *commands: tuple[str, ...]) -> list[Result]:
        """Run several commands against it at once."""
        return side_by_side(*[(*command, "--url", self.url) for command in commands], cwd=self.folder)

    @property
    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        [host] = self.ask("status", "--json").json
        assert isinstance(host, dict)
        return host


def until(condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
    """Look at a fact of the operating system until it is there; False when it never is."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended; also when its parent has not looked yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # just gone, or a system without /proc: the next look will tell
        return False


def refuses(url: str) -> bool:
    """Whether nobody listens there."""
    parts = urlsplit(url)
    with socket.socket() as client:
        return client.connect_ex((parts.hostname, parts.port)) != 0


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert isinstance(port, int)
        return port
