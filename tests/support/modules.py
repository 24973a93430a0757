"""Folders of modules on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.loader import Module

# An address without a server, for nodes that never connect.
NO_SERVER = "nats://127.0.0.1:1"
MESH = "from openagentmesh import AgentMesh, AgentSpec\nmesh = AgentMesh()\n"
WORD_PLUGIN = '''
from pydantic import BaseModel
from openagentmesh import PermissionDenied, hookimpl

class Settings(BaseModel, extra="forbid"):
    word: str = "please"

class AgentSettings(BaseModel, extra="forbid"):
    free: bool = False

class Word:
    """Permits requests that have the word in a header."""

    @hookimpl
    def mesh_settings(self):
        return Settings

    @hookimpl
    def mesh_agent_settings(self):
        return AgentSettings

    @hookimpl
    def mesh_configure(self, settings):
        if settings.word == "invalid":
            raise ValueError("invalid word")
        self.word = settings.word

    @hookimpl
    def mesh_middleware(self, agent, settings):
        if agent.name.endswith("unsupported"):
            raise LookupError("unsupported agent")
        def middleware(inner):
            async def endpoint(call):
                if not settings.free and call.headers.get("word") != self.word:
                    raise PermissionDenied("the header 'word' is wrong")
                return await inner(call)
            return endpoint
        return middleware

plugin = Word
'''

Load = Callable[..., dict[str, Module]]
Configure = Callable[..., Config]


def agent(name: str, result: str = "'ok'") -> str:
    """The source of an agent that returns `result`; `mesh` and `AgentSpec` are defined above it."""
    return f"""
@mesh.agent(AgentSpec(name={name!r}))
async def agent_{name.replace(".", "_")}(req: dict) -> object:
    return {result}
"""


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


async def answer(module: Module, number: int = 0) -> Any:
    """The result of one of a module's agents."""
    return await module.agents[number].handler.function({})
