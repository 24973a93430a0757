"""The floor: bare nats-py with the headers and the JSON of a call, and nothing else."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.kv import KeyValue

from tests.benchmarks.programs.load import COUNT, GO, SHORTEN, TICKS
from tests.benchmarks.programs.process import provide_or_measure


class FloorClient:
    """Calls as one `nc.request`, streams as one subscription."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._instance_id = uuid4().hex

    async def call(self, name: str, payload: dict[str, object]) -> Any:
        """Call an agent and return its answer."""
        body = json.dumps(payload).encode()
        answer = await self._nc.request(
            f"mesh.agent.{name}", body, timeout=30, headers=self._headers(uuid4().hex)
        )
        return json.loads(answer.data)

    async def stream(self, name: str, payload: dict[str, object]) -> AsyncIterator[Any]:
        """Call an agent and yield its chunks."""
        request_id = uuid4().hex
        subscription = await self._nc.subscribe(f"mesh.stream.{request_id}")
        body = json.dumps(payload).encode()
        await self._nc.publish(f"mesh.agent.{name}", body, headers=self._headers(request_id))
        async for frame in subscription.messages:
            if frame.headers and frame.headers["X-Mesh-Stream-End"] == "true":
                break
            yield json.loads(frame.data)
        await subscription.unsubscribe()

    async def subscribe(self, *, agent: str) -> AsyncIterator[Any]:
        """Yield the events of a publisher."""
        subscription = await self._nc.subscribe(f"mesh.agent.{agent}.events")
        async for frame in subscription.messages:
            if frame.headers and frame.headers["X-Mesh-Stream-End"] == "false":
                yield json.loads(frame.data)

    @property
    def kv(self) -> "FloorStore":
        """The shared state."""
        return FloorStore(self._nc)

    def _headers(self, request_id: str) -> dict[str, str]:
        return {
            "X-Mesh-Request-Id": request_id,
            "X-Mesh-Instance-Id": self._instance_id,
            "X-Mesh-Timeout-Ms": "30000",
            "X-Mesh-Accept": "ack",
        }


class FloorStore:
    """The library's own KV."""

    _opened: KeyValue | None = None

    def __init__(self, nc: Client) -> None:
        self._nc = nc

    async def _open(self) -> KeyValue:
        if FloorStore._opened is None:
            FloorStore._opened = await self._nc.jetstream().create_key_value(bucket="mesh-context")
        return FloorStore._opened

    async def put(self, key: str, value: str) -> object:
        """Set a key."""
        return await (await self._open()).put(key, value.encode())

    async def get(self, key: str) -> str:
        """Get a key."""
        return ((await (await self._open()).get(key)).value or b"").decode()


class FloorProvider:
    """Answers from the subscription's callback."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._instance_id = uuid4().hex

    async def shorten(self, message: Msg) -> None:
        """Answer one call."""
        request = json.loads(message.data)
        headers = {
            "X-Mesh-Request-Id": (message.headers or {})["X-Mesh-Request-Id"],
            "X-Mesh-Instance-Id": self._instance_id,
            "X-Mesh-Status": "ok",
            "X-Mesh-Source": SHORTEN,
        }
        body = json.dumps({"short": request["text"][: request["length"]]}).encode()
        await self._nc.publish(message.reply, body, headers=headers)

    async def count(self, message: Msg) -> None:
        """Send one stream."""
        request_id, number = (message.headers or {})["X-Mesh-Request-Id"], 0
        for number in range(json.loads(message.data)["count"]):
            await self._frame(request_id, number, json.dumps({"number": number}).encode())
        await self._frame(request_id, number + 1, b"", end=True)

    async def go(self, message: Msg) -> None:
        """Emit events."""
        for number in range(json.loads(message.data)["count"]):
            headers = {
                "X-Mesh-Instance-Id": self._instance_id,
                "X-Mesh-Stream-Seq": str(number),
                "X-Mesh-Stream-End": "false",
            }
            body = json.dumps({"number": number}).encode()
            await self._nc.publish(f"mesh.agent.{TICKS}.events", body, headers=headers)
        await self._nc.publish(message.reply, message.data)

    async def _frame(self, request_id: str, seq: int, body: bytes, *, end: bool = False) -> None:
        headers = {
            "X-Mesh-Request-Id": request_id,
            "X-Mesh-Instance-Id": self._instance_id,
            "X-Mesh-Stream-Seq": str(seq),
            "X-Mesh-Stream-End": "true" if end else "false",
        }
        await self._nc.publish(f"mesh.stream.{request_id}", body, headers=headers)


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[None]:
    """Serve both agents."""
    async with await nats.connect(url) as nc:
        provider = FloorProvider(nc)
        await nc.subscribe(f"mesh.agent.{SHORTEN}", f"q.{SHORTEN}", provider.shorten)
        await nc.subscribe(f"mesh.agent.{COUNT}", f"q.{COUNT}", provider.count)
        await nc.subscribe(f"mesh.agent.{GO}", f"q.{GO}", provider.go)
        await nc.flush()
        yield


@asynccontextmanager
async def calling(url: str) -> AsyncIterator[FloorClient]:
    """A connected caller."""
    async with await nats.connect(url) as nc:
        yield FloorClient(nc)


if __name__ == "__main__":
    provide_or_measure(serving, calling)
