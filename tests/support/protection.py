"""Agents behind the plugin auth, and signed requests."""

from collections.abc import AsyncIterator
from typing import Any

from oam_auth import Auth
from oam_auth.signatures import Signer
from openagentmesh import AgentMesh, AgentSpec, Call, ClientOperation, current_call

from tests.support.credentials import seed


class ProtectedAgents:
    """Agents of all kinds behind the plugin auth; `handled` has the inputs of their handlers."""

    def __init__(self, url: str, name: str, auth: Auth) -> None:
        self.mesh = mesh = AgentMesh(url, plugins=[auth])
        self.handled: list[Any] = []
        self.name = name

        @mesh.agent(AgentSpec(name=f"{name}.responder"))
        async def responder(text: str) -> str:
            self.handled.append(text)
            caller = current_call().caller
            return f"{caller} {caller.subject} {sorted(caller.scopes)}"

        @mesh.agent(AgentSpec(name=f"{name}.streamer"))
        async def streamer(text: str) -> AsyncIterator[str]:
            self.handled.append(text)
            yield text

        @mesh.agent(AgentSpec(name=f"{name}.threaded"))
        def threaded(text: str) -> str:
            self.handled.append(text)
            return str(current_call().caller.subject)

        @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.news")])
        async def messages(text: str) -> None:
            self.handled.append((text, current_call().caller.subject))

        @mesh.agent(AgentSpec(name=f"{name}.keys"), sources=[mesh.kv_source(f"{name}.key")])
        async def keys(text: str) -> None:
            self.handled.append(text)

        gate = mesh.subject_condition(f"{name}.gate", lambda value: value == "open")

        @mesh.agent(AgentSpec(name=f"{name}.gated"), active_when=gate)
        async def gated(text: str) -> str:
            self.handled.append(text)
            return text


SEED, PUBLIC = seed()
SIGNER, EVE = Signer(SEED), Signer(seed()[0])


def signed(
    verb: Any = "call", target: str = "nlp.a", body: bytes = b'{"a":1}', signer: Signer = SIGNER
) -> Call:
    """A received request that its sender signed."""
    operation = ClientOperation(verb, target, body, {"X-Mesh-Request-Id": "r1"})
    signer.sign(operation)
    received: Any = "source" if verb == "publish" else verb
    return Call(target, "r1", body, dict(operation.headers), verb=received, subject=operation.subject)
