"""Processes of a benchmark: started, listened to, stopped by their pid."""

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
_LONGEST: Final = 120.0
_STOP: Final = 15.0


class ProgramFailed(Exception):
    """A program ended or said nothing for too long; the message is what it wrote last."""


class Program:
    """A running process that says JSON lines."""

    def __init__(
        self, process: asyncio.subprocess.Process, errors: IO[bytes], *, foreign: bool = False
    ) -> None:
        self.pid = process.pid
        self._foreign = foreign
        self._process = process
        self._errors = errors

    async def said(self) -> dict[str, Any]:
        """The next thing it says.

        Raises:
            ProgramFailed: it ended, or took too long.
        """
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), _LONGEST)
        except TimeoutError:
            raise ProgramFailed(f"it said nothing for {_LONGEST:g} s") from None
        if not line:
            raise ProgramFailed(self.wrote().strip() or "it ended")
        values: dict[str, Any] = json.loads(line)
        return values

    def wrote(self) -> str:
        """What it has written to its standard error so far."""
        number = self._errors.fileno()
        # It shares our place in the file: a seek would make it write over what is there.
        return os.pread(number, os.fstat(number).st_size, 0).decode("utf-8", "replace")

    async def go(self) -> None:
        """Tell it to go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        await self._process.stdin.drain()

    async def stop(self) -> None:
        """End it, and wait until it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP)
        except TimeoutError:
            self._kill()
            await self._process.wait()

    def _kill(self) -> None:
        if self._foreign:
            os.killpg(self.pid, signal.SIGKILL)
        else:
            self._process.kill()


@asynccontextmanager
async def started(
    command: Sequence[str | Path],
    folder: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    *,
    foreign: bool = False,
) -> AsyncIterator[Program]:
    """A process, from its start to its end; `environ` is added to our own environment.

    A `foreign` one is none of our programs: nobody reads what it says, and what it started ends with it.
    """
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env=os.environ | (environ or {}),
            stdin=asyncio.subprocess.PIPE,
            # A pipe that nobody reads fills, and then its writer waits for ever.
            stdout=asyncio.subprocess.DEVNULL if foreign else asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=foreign,
        )
        program = Program(process, errors, foreign=foreign)
        try:
            yield program
        finally:
            await program.stop()


def program(name: str, *arguments: object, python: Path = Path(sys.executable)) -> list[str | Path]:
    """The command of one of our programs."""
    return [python, "-m", f"tests.benchmarks.programs.{name}", *map(str, arguments)]


@asynccontextmanager
async def nats_server() -> AsyncIterator[EmbeddedServer]:
    """A fresh nats-server: nothing of the one before is left."""
    server = EmbeddedServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
