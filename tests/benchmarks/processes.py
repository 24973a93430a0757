"""Processes of a benchmark, and their messages."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Final

from openagentmesh.transport.server import EmbeddedServer

ROOT: Final = Path(__file__).parents[2]
_MESSAGE_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 15.0


class ProgramFailed(Exception):
    """A program exited, or sent no message in time; the error contains what it logged."""


class Program:
    """A running process that writes messages, one JSON object per line."""

    def __init__(
        self, process: asyncio.subprocess.Process, errors: IO[bytes], *, is_external: bool = False
    ) -> None:
        self.pid = process.pid
        self._is_external = is_external
        self._process = process
        self._errors = errors

    async def read(self) -> dict[str, Any]:
        """Its next message.

        Raises:
            ProgramFailed: it exited, or the timeout was exceeded.
        """
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), _MESSAGE_TIMEOUT_S)
        except TimeoutError:
            raise ProgramFailed(f"no message of the program within {_MESSAGE_TIMEOUT_S:g} s") from None
        if not line:
            raise ProgramFailed(self.log().strip() or "the program exited")
        values: dict[str, Any] = json.loads(line)
        return values

    def log(self) -> str:
        """Its standard error so far."""
        number = self._errors.fileno()
        # Not `seek` and `read`, which would move the position at which the process writes.
        return os.pread(number, os.fstat(number).st_size, 0).decode("utf-8", "replace")

    async def signal(self) -> None:
        """Send it a line, for which it waits before its next step."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        await self._process.stdin.drain()

    async def stop(self) -> None:
        """Terminate it, and wait until it has exited."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            self._kill()
            await self._process.wait()

    def _kill(self) -> None:
        if self._is_external:
            os.killpg(self.pid, signal.SIGKILL)
        else:
            self._process.kill()


@asynccontextmanager
async def started(
    command: Sequence[str | Path],
    folder: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    *,
    is_external: bool = False,
) -> AsyncIterator[Program]:
    """A process, which is stopped at the end; `environ` is added to our own environment.

    An external one is not one of our programs: it sends no messages, and its children are stopped, too.
    """
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env=os.environ | (environ or {}),
            stdin=asyncio.subprocess.PIPE,
            # A pipe that is not read would fill and block its writer.
            stdout=asyncio.subprocess.DEVNULL if is_external else asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=is_external,
        )
        program = Program(process, errors, is_external=is_external)
        try:
            yield program
        finally:
            await program.stop()


def program(name: str, *arguments: object, python: Path = Path(sys.executable)) -> list[str | Path]:
    """The command of one of our programs."""
    return [python, "-m", f"tests.benchmarks.programs.{name}", *map(str, arguments)]


@asynccontextmanager
async def nats_server() -> AsyncIterator[EmbeddedServer]:
    """A new nats-server with an empty store."""
    server = EmbeddedServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
