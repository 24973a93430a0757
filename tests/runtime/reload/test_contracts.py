"""What callers and other hosts notice of reloads: contracts, the registry, messages, an outage."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host, NotAvailable, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.runtime.config import MeshSection
from openagentmesh.transport.server import EmbeddedServer

from tests.runtime.reload.test_retirement import heard
from tests.support.meshes import node_of
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload
from tests.support.waiting import until

__all__ = ["heard"]  # a fixture

# Field of the input, field of the output, and what is said of them.
BREAKING = [
    (("body: str", "words: int = 0"), "input 'body'"),
    (("text: str", "count: int = 0"), "output 'words'"),
    (("text: int", "words: int = 0"), "input 'text': str became int"),
]


def typed(
    name: str,
    takes: str = "text: str",
    gives: str = "words: int = 0",
    version: str = "1.0.0",
    word: str = "old",
) -> str:
    """An agent with a model on both sides, which tells its word when it is called with it."""
    return f"""from pydantic import BaseModel
{MESH}
class In(BaseModel):
    {takes}

class Out(BaseModel):
    {gives}
    word: str = {word!r}

@mesh.agent(AgentSpec(name={name!r}, version={version!r}))
async def handler(req: In) -> Out:
    return Out()
"""


async def revision(mesh: AgentMesh, name: str) -> int:
    """How often anybody wrote to the registry until the last write of this agent's key."""
    entry = await node_of(mesh).buckets.get_entry(subjects.REGISTRY_BUCKET, name)
    assert entry is not None
    assert entry.revision is not None
    return entry.revision


@pytest.mark.parametrize("policy", ["warn", "refuse", "allow"])
@pytest.mark.parametrize(("then", "said"), BREAKING, ids=["renamed input", "renamed output", "other type"])
async def test_a_breaking_change_is_named_field_by_field(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    policy: str,
    then: tuple[str, str],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is served with a warning, or refused and nothing of it published, or served in silence."""
    async with Host(configure({"a.py": typed(name)}, host={"contract": policy})) as host:
        before = await revision(mesh, name)
        outcome = await reload(host, tmp_path, typed(name, *then, "2.0.0", "new"))
        told = {"warn": " ".join(outcome.notes), "refuse": outcome.error, "allow": ""}[policy]
        assert policy == "allow" or (said in told and name in told)
        assert (policy == "refuse") == bool(outcome.error)
        assert (policy == "warn") == bool(outcome.notes)
        warned = " ".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
        assert (policy != "allow") == (said in warned)
        word, version = ("old", "1.0.0") if policy == "refuse" else ("new", "2.0.0")
        payload = {"text": "1", "body": "1"} if then[0] != "text: int" or word == "old" else {"text": 1}
        assert word == (await mesh.call(name, payload))["word"]
        assert version == (await mesh.contract(name)).version
        assert (policy == "refuse") == (before == await revision(mesh, name))


COMPATIBLE = {
    "other code": ("text: str", "words: int = 0", "1.0.0"),
    "optional input": ("text: str; more: str = ''", "words: int = 0", "1.0.0"),
    "more output": ("text: str", "words: int = 0; more: str = ''", "1.0.0"),
    "version": ("text: str", "words: int = 0", "1.1.0"),
}


@pytest.mark.parametrize("then", COMPATIBLE)
async def test_a_compatible_change_is_silent(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    then: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is served without a word even where breaking ones are refused, and published if it says more."""
    async with Host(configure({"a.py": typed(name)}, host={"contract": "refuse"})) as host:
        first = await mesh.contract(name)
        before = await revision(mesh, name)
        outcome = await reload(host, tmp_path, typed(name, *COMPATIBLE[then], "new"))
        assert "new" == (await mesh.call(name, {"text": ""}))["word"]
        assert ("", []) == (outcome.error, outcome.notes)
        assert [] == [r for r in caplog.records if r.levelno >= logging.WARNING]
        changed = first.to_document() != (await mesh.contract(name)).to_document()
        assert changed == (before != await revision(mesh, name))
        assert changed or then == "other code"


RUNS = f"""import asyncio
from collections.abc import AsyncIterator
{MESH}
@mesh.agent(AgentSpec(name="{{name}}.p"))
async def publisher() -> AsyncIterator[int]:
    asyncio.heard.append({{number}})
    yield 1
    await asyncio.Event().wait()

@mesh.agent(AgentSpec(name="{{name}}.d"), sources=[mesh.subject_source("{{name}}.in")])
async def driven(text: str) -> None:
    pass
"""


async def test_the_registry_is_written_when_a_contract_changes_and_not_otherwise(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[int]
) -> None:
    """New code alone leaves the keys of publishers and of driven agents alone, too."""
    async with Host(configure({"a.py": RUNS.format(name=name, number=0)})) as host:
        before = [await revision(mesh, f"{name}.{x}") for x in "pd"]
        for number in (1, 2):
            assert not (await reload(host, tmp_path, RUNS.format(name=name, number=number))).error
        await until(lambda: [0, 1, 2] == heard)
        assert before == [await revision(mesh, f"{name}.{x}") for x in "pd"]


async def test_two_hosts_reload_the_same_change_at_once(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Both serve the new version, callers are answered throughout, and the catalog has one entry of it."""
    config = configure({"a.py": typed(name)})
    over, answers = asyncio.Event(), list[str]()

    async def keep_calling() -> None:
        while not over.is_set():
            answers.append((await mesh.call(name, {"text": ""}))["word"])

    async with Host(config) as one, Host(config) as other:
        calling = asyncio.create_task(keep_calling())
        for number in range(1, 6):
            source = typed(name, "text: str; more: str = ''", version=f"1.{number}.0", word=f"{number}")
            write(tmp_path / "agents", {"a.py": source})
            outcomes = await asyncio.gather(reload(one, tmp_path), reload(other, tmp_path))
            assert ["", ""] == [outcome.error for outcome in outcomes]
            assert {f"{number}"} == {(await mesh.call(name, {"text": ""}))["word"] for _ in range(8)}
            listed = [entry.version for entry in await mesh.catalog() if entry.name == name]
            assert [f"1.{number}.0"] == listed
            assert f"1.{number}.0" == (await mesh.contract(name)).version
        over.set()
        await calling
    assert {"old", *"12345"} >= set(answers)


async def test_a_reload_while_the_server_is_away(configure: Configure, name: str, tmp_path: Path) -> None:
    """The new code serves as soon as the server is back, and the contract follows."""
    server = EmbeddedServer(store=str(tmp_path / "store"))
    await server.start()
    disposed = f"\n@mesh.dispose\ndef over() -> None:\n    open({str(tmp_path / 'over')!r}, 'w').close()\n"
    config = configure({"a.py": typed(name) + disposed})
    config = config.model_copy(update={"mesh": MeshSection(url=server.url)})
    try:
        async with Host(config) as host, AgentMesh(server.url) as caller:
            assert "1.0.0" == (await caller.contract(name)).version
            await server.stop()
            await until(
                lambda: not host.node.connection.connected and not node_of(caller).connection.connected
            )
            write(tmp_path / "agents", {"a.py": typed(name, version="2.0.0", word="new")})
            outcome = await host.reload()
            assert outcome is not None
            assert ("", [f"{name} 1.0.0 → 2.0.0"]) == (outcome.error, outcome.agents)
            server = EmbeddedServer(server.port, str(tmp_path / "store"))
            await server.start()
            await node_of(caller).connection.wait_connected()
            await host.node.connection.wait_connected()
            await host.wait_retired()
            assert "new" == (await caller.call(name, {"text": ""}))["word"]
            assert "2.0.0" == (await caller.contract(name)).version
            assert (tmp_path / "over").exists()
    finally:
        await server.stop()


async def test_an_agent_is_removed_under_load(
    configure: Configure, mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, tmp_path: Path
) -> None:
    """Every request is answered, or is told that nobody serves it; afterwards it is in no catalog."""
    config = configure({"a.py": MESH + agent(name), "b.py": MESH + agent(f"{name}.b")})
    answers: list[object] = []

    async def ask(caller: AgentMesh) -> None:
        while True:
            try:
                answers.append(await caller.call(name, {}, timeout=5))
            except (NotFound, NotAvailable):
                return

    async with new_mesh() as caller, Host(config) as host:
        asking = [asyncio.create_task(ask(caller)) for _ in range(16)]
        await until(lambda: len(answers) > 200)
        (tmp_path / "agents/a.py").unlink()
        assert [f"{name} withdrawn"] == (await reload(host, tmp_path)).agents
        await asyncio.gather(*asking)
        assert {"ok"} == set(answers)
        await host.wait_retired()
        assert [f"{name}.b"] == [
            entry.name for entry in await caller.catalog() if entry.name.startswith(name)
        ]


DRIVEN = """{mesh}
import asyncio
from openagentmesh import MeshMessage
@mesh.agent(AgentSpec(name={name!r}), sources=[mesh.subject_source("{name}.in")]{more})
async def driven(message: MeshMessage[int]) -> None:
    asyncio.heard.append(f"{{message.data}}")
# {number}
"""


@pytest.mark.parametrize("gated", [False, True])
async def test_sources_lose_nothing_over_reloads(  # noqa: PLR0913 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, heard: list[str], *, gated: bool
) -> None:
    """Each message that comes while its agent is reloaded again and again is handled once."""
    more = f", active_when=mesh.kv_condition('{name}', lambda text: text == 'on')" if gated else ""
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            if sent - len(heard) < 100:  # more at once would be refused as too many
                await host.node.connection.publish(f"{name}.in", str(sent).encode())
                sent += 1
            await asyncio.sleep(0)

    def source(number: int) -> str:
        return DRIVEN.format(mesh=MESH, name=name, number=number, more=more)

    await mesh.kv.put(name, "on")
    async with Host(configure({"a.py": source(0)})) as host:
        await host.node.connection.flush()
        sending = asyncio.create_task(send())
        for number in range(1, 6):
            await reload(host, tmp_path, source(number))
            enough = sent + 50
            while sent < enough:
                await asyncio.sleep(0.001)
        sending.cancel()
        await until(lambda: len(heard) >= sent)
    assert list(range(sent)) == sorted(map(int, heard))
