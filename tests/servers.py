"""A real nats-server for tests."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from openagentmesh.transport.server import find_binary


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """A server on any free port of 127.0.0.1; gives its url."""
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
