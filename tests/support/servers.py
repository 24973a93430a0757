"""Real NATS servers."""

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from openagentmesh import AgentMesh
from openagentmesh.state.kv import KV
from openagentmesh.transport.server import EmbeddedServer, find_binary

from tests.support.meshes import node_of
from tests.support.waiting import until

Change = Callable[[KV], Awaitable[None]]


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """A server on a free port of 127.0.0.1; yields its URL."""
    process = subprocess.Popen(
        [find_binary(), "-a", "127.0.0.1", "-p", "-1", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    port = ""
    for line in process.stderr:
        if "Listening for client connections on" in line:
            port = line.rstrip().rpartition(":")[2]
        if "Server is ready" in line:
            break
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


@asynccontextmanager
async def restartable(store: object) -> AsyncIterator[tuple[AgentMesh, Callable[..., Awaitable[None]]]]:
    """A mesh on a server of its own, and a function that restarts the server.

    The function takes a change of the store, which it makes while the mesh is disconnected. `store` is a
    folder, or empty for a temporary one that each stop of the server removes.
    """
    server = EmbeddedServer(store=str(store))
    await server.start()

    async def restart(change: Change | None = None) -> None:
        nonlocal server
        await server.stop()
        await until(lambda: not node_of(mesh).connection.connected)
        if change is not None:
            other = EmbeddedServer(store=str(store))
            await other.start()
            async with AgentMesh(other.url) as other_mesh:
                await change(other_mesh.kv)
            await other.stop()
        server = EmbeddedServer(server.port, str(store))
        await server.start()
        await node_of(mesh).connection.wait_connected()

    try:
        async with AgentMesh(server.url) as mesh:
            yield mesh, restart
    finally:
        await server.stop()
