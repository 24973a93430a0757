"""Agents of all kinds that take requests, as a program for the published SDK.

Run alone, it serves them; our host loads the same file, in spite of its unguarded `mesh.run()`.
"""

import asyncio
import os

from openagentmesh import AgentMesh, AgentSpec, MeshError
from pydantic import BaseModel

CHANNEL = os.environ["INTEROP_CHANNEL"]

mesh = AgentMesh(os.environ["INTEROP_URL"])
texts: asyncio.Queue[str] = asyncio.Queue()
closed = asyncio.Event()


class Text(BaseModel):
    text: str
    times: int = 1


class Count(BaseModel):
    upto: int
    fail_at: int = -1


class Number(BaseModel):
    number: int


def spec(name: str, description: str, *tags: str, version: str = "0.1.0") -> AgentSpec:
    return AgentSpec(name=f"{CHANNEL}.{name}", description=description, tags=list(tags), version=version)


@mesh.agent(spec("echo", "Repeats a text.", "text", "fast", version="1.2.3"))
async def echo(req: Text) -> Text:
    return Text(text=req.text * req.times)


@mesh.agent(spec("length", "Counts characters.", "text"))
async def length(req: str) -> int:
    return len(req)


@mesh.agent(spec("nothing", "Returns nothing."))
async def nothing(req: Text) -> None:
    pass


@mesh.agent(spec("where", "Takes no input."))
async def where() -> Text:
    return Text(text="here")


@mesh.agent(spec("fail", "Fails."))
async def fail(req: Text) -> Text:
    raise ValueError(f"no {req.text} today")


@mesh.agent(spec("quota", "Fails with a code of its own."))
async def quota(req: Text) -> Text:
    raise MeshError(code="quota_used_up", message="Try again tomorrow", details={"left": 0})


@mesh.agent(spec("store", "Stores a text."))
async def store(req: Text) -> Text:
    await texts.put(req.text)
    return req


@mesh.agent(spec("stored", "Waits for a stored text, and returns it."))
async def stored() -> Text:
    return Text(text=await texts.get())


@mesh.agent(spec("hang", "Never answers."))
async def hang(req: Text) -> Text:
    await asyncio.Event().wait()
    return req


@mesh.agent(spec("count", "Counts up.", "numbers"))
async def count(req: Count) -> Number:  # type: ignore[misc] # the published SDK expects the type of a chunk
    for number in range(req.upto):
        if number == req.fail_at:
            raise ValueError(f"cannot count to {number}")
        yield Number(number=number)


@mesh.agent(spec("endless", "Streams until its reader stops.", "numbers"))
async def endless(req: Count) -> Number:  # type: ignore[misc] # as above
    try:
        while True:
            yield Number(number=req.upto)
            await asyncio.sleep(0.001)
    finally:
        closed.set()


@mesh.agent(spec("closed", "Waits until a stream of `endless` is closed."))
async def wait_closed() -> Text:
    await closed.wait()
    return Text(text="closed")


mesh.run()
