"""Both SDKs as processes: callers that run a test's commands, and programs that serve agents."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Self

from tests.support.commands import OAM, TIMEOUT_S, environment, until

OURS: Final = Path(sys.executable)
PROGRAMS: Final = Path(__file__).parents[1] / "interop" / "programs"


class CommandFailed(Exception):
    """The error that a command ended with.

    Attributes:
        type: the name of the exception's class.
        code: a mesh error's code; empty for any other exception.
        message: its text.
        agent: the agent of a mesh error.
        details: a mesh error's details.
    """

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error))
        self.type: str = error["type"]
        self.code: str = error.get("code", "")
        self.message: str = error["message"]
        self.agent: str = error.get("agent", "")
        self.details: dict[str, Any] = error.get("details", {})


class Running:
    """A process, killed at the end of its `with` block."""

    # Whether its output is read by the test; otherwise it is part of the log.
    _has_output = False

    def __init__(self, *command: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `__exit__`
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self._has_output else self._log,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()

    @property
    def has_exited(self) -> bool:
        """Whether it has exited."""
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        """What it logged."""
        # Not `seek` and `read`, which would move the position at which the process writes.
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def wait_for_log(self, text: str) -> None:
        """Wait until its log contains a text."""
        assert until(lambda: text in self.log or self.has_exited), f"no {text!r} in:\n{self.log}"
        assert text in self.log, self.log

    def interrupt(self) -> int:
        """Stop it as Ctrl-C does; returns its exit code.

        The published SDK sometimes loses a signal, so it gets a second one; ours would exit with an error.
        """
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(TIMEOUT_S / 2)
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(TIMEOUT_S / 2)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait(TIMEOUT_S)


class Command:
    """One command that a caller runs: its items while it runs, and its result."""

    def __init__(self, peer: "Peer", number: int) -> None:
        self._peer = peer
        self._number = number
        self.messages: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def item(self) -> Any:
        """The next item.

        Raises:
            CommandFailed: it failed instead.
        """
        message = self._message()
        assert "item" in message, f"the command has ended: {message}"
        return message["item"]

    def items(self) -> list[Any]:
        """All items until the end."""
        found = []
        while "item" in (message := self._message()):
            found.append(message["item"])
        return found

    def result(self) -> Any:
        """Its result.

        Raises:
            CommandFailed: it failed.
        """
        message = self._message()
        assert "result" in message, f"the command has not ended: {message}"
        return message["result"]

    def stop(self) -> None:
        """Cancel it."""
        self._peer.write({"number": self._number})

    def _message(self) -> dict[str, Any]:
        try:
            message = self.messages.get(timeout=TIMEOUT_S)
        except Empty:
            raise AssertionError(f"no message within {TIMEOUT_S:g} s; {self._peer.log}") from None
        if "error" in message:
            raise CommandFailed(message["error"])
        assert "exited" not in message, f"the process has exited: {self._peer.log}"
        return message


class Peer(Running):
    """`programs/caller.py` with one of the SDKs."""

    _has_output = True

    def __init__(self, python: Path, url: str, env: Mapping[str, str]) -> None:
        super().__init__(python, PROGRAMS / "caller.py", url, env=env)
        self._numbers = count(1)
        self._commands = {0: (ready := Command(self, 0))}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready = ready

    def connected(self) -> Self:
        """Wait until it is connected."""
        self._ready.result()
        return self

    def start(self, verb: str, *args: object, **kwargs: object) -> Command:
        """Start a command."""
        number = next(self._numbers)
        command = self._commands[number] = Command(self, number)
        self.write({"number": number, "verb": verb, "args": args, "kwargs": kwargs})
        return command

    def run(self, verb: str, *args: object, **kwargs: object) -> Any:
        """Run a command; returns its result.

        Raises:
            CommandFailed: it failed.
        """
        return self.start(verb, *args, **kwargs).result()

    def close(self) -> int:
        """Close its mesh and wait until it exits; returns its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(TIMEOUT_S)

    def write(self, command: dict[str, object]) -> None:
        """Send it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._commands[message["number"]].messages.put(message)
        for command in list(self._commands.values()):
            command.messages.put({"exited": True})

    def __exit__(self, *exc: object) -> None:
        if not self.has_exited:
            self.kill()
        self._reader.join()
        super().__exit__(*exc)


class Script(Running):
    """A program that serves agents until it is stopped."""

    def __init__(self, python: Path, program: str, env: Mapping[str, str]) -> None:
        super().__init__(python, PROGRAMS / program, env=env)


class HostedPrograms(Running):
    """The same programs, unchanged, served by one `oam up`."""

    def __init__(self, folder: Path, url: str, *programs: str, env: Mapping[str, str]) -> None:
        paths = json.dumps([str(PROGRAMS / program) for program in programs])
        (folder / "mesh.toml").write_text(
            # Some handlers of these programs never end.
            f"[host]\nagents = {paths}\nentry_points = false\ndrain_timeout = 0.1\n"
        )
        super().__init__(OAM, "up", "--url", url, cwd=folder, env=env)


def interop_environment(url: str, channel: str, replica: str = "") -> dict[str, str]:
    """The environment of programs that serve agents."""
    return environment({"INTEROP_URL": url, "INTEROP_CHANNEL": channel, "INTEROP_REPLICA": replica})


def wait_listed(peer: Peer, name: str, *serving: Running) -> None:
    """Wait until a peer's catalog has an agent that these processes serve."""

    def is_listed() -> bool:
        return name in [entry["name"] for entry in peer.run("catalog", channel=name)]

    def has_failed() -> bool:
        return any(process.has_exited for process in serving)

    assert until(lambda: is_listed() or has_failed()), f"'{name}' is not listed"
    assert is_listed(), "\n".join(process.log for process in serving)


def repeat_until_received(feed: Command, publish: Callable[[], object]) -> None:
    """Publish repeatedly until a subscription, which starts at an unknown time, has received a message."""

    def has_received() -> bool:
        publish()
        return not feed.messages.empty()

    assert until(has_received), "nothing was received"


@dataclass(frozen=True)
class Pair:
    """A caller of one SDK, and agents that the other SDK serves in `channel`."""

    caller: Peer
    channel: str
    processes: list[Running]

    def agent(self, name: str) -> str:
        """The full name of one of the provider's agents."""
        return f"{self.channel}.{name}"


@dataclass(frozen=True)
class Sides:
    """A writer and a reader, of different SDKs."""

    writer: Peer
    reader: Peer
