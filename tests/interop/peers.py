"""Both SDKs as processes: one that does what a test tells it, and scripts that serve."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Self

from tests.cli.processes import OAM, PATIENCE, environment, until

OURS: Final = Path(sys.executable)
PROGRAMS: Final = Path(__file__).parent / "programs"


class Refused(Exception):
    """What a command ended with instead of a result.

    Attributes:
        type: the name of the exception's class.
        code: a mesh error's code; empty for any other exception.
        message: its text.
        agent: the agent a mesh error concerns.
        details: a mesh error's facts.
    """

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error))
        self.type: str = error["type"]
        self.code: str = error.get("code", "")
        self.message: str = error["message"]
        self.agent: str = error.get("agent", "")
        self.details: dict[str, Any] = error.get("details", {})


class Running:
    """A process of this test; whoever leaves its block ends it."""

    # Whether its output is for the test; else it goes into the log.
    _speaks = False

    def __init__(self, *command: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `__exit__`
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self._speaks else self._log,
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
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        """What it wrote for people."""
        # Not `seek` and `read`: the process writes at the same position.
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def said(self, text: str) -> None:
        """Wait until it has written a text."""
        assert until(lambda: text in self.log or self.ended), f"no {text!r} in:\n{self.log}"
        assert text in self.log, self.log

    def interrupt(self) -> int:
        """Stop it as Ctrl-C does; returns its exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)


class Conversation:
    """One command: what comes of it while it runs, and how it ends."""

    def __init__(self, peer: "Peer", number: int) -> None:
        self._peer = peer
        self._number = number
        self.arrived: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def item(self) -> Any:
        """The next thing that comes.

        Raises:
            Refused: it failed instead.
        """
        message = self._message()
        assert "item" in message, f"it is over: {message}"
        return message["item"]

    def items(self) -> list[Any]:
        """All that comes until the end, which is a good one."""
        found = []
        while "item" in (message := self._message()):
            found.append(message["item"])
        return found

    def result(self) -> Any:
        """What it ends with.

        Raises:
            Refused: it failed.
        """
        message = self._message()
        assert "result" in message, f"it is not over: {message}"
        return message["result"]

    def stop(self) -> None:
        """Break it off."""
        self._peer.write({"number": self._number})

    def _message(self) -> dict[str, Any]:
        try:
            message = self.arrived.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError(f"nothing came for {PATIENCE:g} s; {self._peer.log}") from None
        if "error" in message:
            raise Refused(message["error"])
        assert "gone" not in message, f"the process has ended: {self._peer.log}"
        return message


class Peer(Running):
    """`programs/caller.py` on one of the SDKs."""

    _speaks = True

    def __init__(self, python: Path, url: str, env: Mapping[str, str]) -> None:
        super().__init__(python, PROGRAMS / "caller.py", url, env=env)
        self._numbers = count(1)
        self._conversations = {0: (ready := Conversation(self, 0))}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready = ready

    def connected(self) -> Self:
        """Wait until it is on the mesh."""
        self._ready.result()
        return self

    def begin(self, verb: str, *args: object, **kwargs: object) -> Conversation:
        """Let it begin something."""
        number = next(self._numbers)
        conversation = self._conversations[number] = Conversation(self, number)
        self.write({"number": number, "verb": verb, "args": args, "kwargs": kwargs})
        return conversation

    def ask(self, verb: str, *args: object, **kwargs: object) -> Any:
        """Let it do something, to the end.

        Raises:
            Refused: it ended with an exception.
        """
        return self.begin(verb, *args, **kwargs).result()

    def leave(self) -> int:
        """Let it leave the mesh; returns its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE)

    def write(self, command: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._conversations[message["number"]].arrived.put(message)
        for conversation in list(self._conversations.values()):
            conversation.arrived.put({"gone": True})

    def __exit__(self, *exc: object) -> None:
        if not self.ended:
            self.kill()
        self._reader.join()
        super().__exit__(*exc)


class Script(Running):
    """A program that serves agents until it is stopped, run by an interpreter."""

    def __init__(self, python: Path, program: str, env: Mapping[str, str]) -> None:
        super().__init__(python, PROGRAMS / program, env=env)


class Hosted(Running):
    """The same programs, unchanged, in one `oam up`."""

    def __init__(self, folder: Path, url: str, *programs: str, env: Mapping[str, str]) -> None:
        paths = json.dumps([str(PROGRAMS / program) for program in programs])
        (folder / "mesh.toml").write_text(
            # Some of their handlers never end.
            f"[host]\nagents = {paths}\nentry_points = false\ndrain_timeout = 0.1\n"
        )
        super().__init__(OAM, "up", "--url", url, cwd=folder, env=env)


def interop_environment(url: str, channel: str, who: str = "") -> dict[str, str]:
    """What the programs that serve find."""
    return environment({"INTEROP_URL": url, "INTEROP_CHANNEL": channel, "INTEROP_WHO": who})


def listed(peer: Peer, name: str, *serving: Running) -> None:
    """Wait until a peer's catalog has an agent that these processes are to serve."""

    def there() -> bool:
        return name in [entry["name"] for entry in peer.ask("catalog", channel=name)]

    def stuck() -> bool:
        return any(process.ended for process in serving)

    assert until(lambda: there() or stuck()), f"'{name}' is not listed"
    assert there(), "\n".join(process.log for process in serving)


def repeat_until_heard(feed: Conversation, again: Callable[[], object]) -> None:
    """Do something until a subscription, of which nobody knows when it is there, has heard it."""

    def heard() -> bool:
        again()
        return not feed.arrived.empty()

    assert until(heard), "nothing was heard"
