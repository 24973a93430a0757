"""Agents of every shape that take requests, as a script for the published SDK.

Run alone it serves them; a host of ours loads this very file, in spite of its unguarded `mesh.run()`.
"""

import asyncio
import os

from openagentmesh import AgentMesh, AgentSpec, MeshError
from pydantic import BaseModel

CHANNEL = os.environ["INTEROP_CHANNEL"]

mesh = AgentMesh(os.environ["INTEROP_URL"])
noted: asyncio.Queue[str] = asyncio.Queue()
left = asyncio.Event()


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


@mesh.agent(spec("echo", "Says it again.", "text", "fast", version="1.2.3"))
async def echo(req: Text) -> Text:
    return Text(text=req.text * req.times)


@mesh.agent(spec("length", "Counts characters.", "text"))
async def length(req: str) -> int:
    return len(req)


@mesh.agent(spec("nothing", "Has nothing to say."))
async def nothing(req: Text) -> None:
    pass


@mesh.agent(spec("where", "Needs nothing."))
async def where() -> Text:
    return Text(text="here")


@mesh.agent(spec("fail", "Fails."))
async def fail(req: Text) -> Text:
    raise ValueError(f"no {req.text} today")


@mesh.agent(spec("quota", "Fails with a code of its own."))
async def quota(req: Text) -> Text:
    raise MeshError(code="quota_used_up", message="Try again tomorrow", details={"left": 0})


@mesh.agent(spec("note", "Notes what it is told."))
async def note(req: Text) -> Text:
    await noted.put(req.text)
    return req


@mesh.agent(spec("noted", "Tells what was noted; waits for it."))
async def tell_noted() -> Text:
    return Text(text=await noted.get())


@mesh.agent(spec("hang", "Never answers."))
async def hang(req: Text) -> Text:
    await asyncio.Event().wait()
    return req


@mesh.agent(spec("count", "RouteStats.", "numbers"))
async def count(req: Count) -> Number:  # type: ignore[misc] # the published SDK wants the chunk's type
    for number in range(req.upto):
        if number == req.fail_at:
            raise ValueError(f"cannot count to {number}")
        yield Number(number=number)


@mesh.agent(spec("endless", "Counts until its reader leaves.", "numbers"))
async def endless(req: Count) -> Number:  # type: ignore[misc] # as above
    try:
        while True:
            yield Number(number=req.upto)
            await asyncio.sleep(0.001)
    finally:
        left.set()


@mesh.agent(spec("left", "Waits until the reader of `endless` has left."))
async def wait_left() -> Text:
    await left.wait()
    return Text(text="left")


mesh.run()
