"""What callers and other hosts see of reloads: contracts, the registry, messages, an outage."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host, NotAvailable, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.runtime.config import MeshSection
from openagentmesh.transport.server import EmbeddedServer

from tests.support.host_bench import Ledger
from tests.support.meshes import node_of
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload
from tests.support.waiting import until

# A field of the input, a field of the output, and the reported change.
BREAKING = [
    (("body: str", "words: int = 0"), "input 'body'"),
    (("text: str", "count: int = 0"), "output 'words'"),
    (("text: int", "words: int = 0"), "input 'text': str became int"),
]


def typed_agent(
    name: str,
    input_field: str = "text: str",
    output_field: str = "words: int = 0",
    version: str = "1.0.0",
    word: str = "old",
) -> str:
    """An agent with models for input and output; the output has `word`."""
    return f"""from pydantic import BaseModel
{MESH}
class In(BaseModel):
    {input_field}

class Out(BaseModel):
    {output_field}
    word: str = {word!r}

@mesh.agent(AgentSpec(name={name!r}, version={version!r}))
async def handler(req: In) -> Out:
    return Out()
"""


async def revision(mesh: AgentMesh, name: str) -> int:
    """The bucket's revision at the last write of this agent's registry key."""
    entry = await node_of(mesh).buckets.get_entry(subjects.REGISTRY_BUCKET, name)
    assert entry is not None
    assert entry.revision is not None
    return entry.revision


@pytest.mark.parametrize("policy", ["warn", "refuse", "allow"])
@pytest.mark.parametrize(
    ("fields", "change"), BREAKING, ids=["renamed-input", "renamed-output", "other-type"]
)
async def test_a_breaking_change_is_reported_by_field(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    policy: str,
    fields: tuple[str, str],
    change: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It serves with a warning, or is refused and not published, or serves without a warning."""
    async with Host(configure({"a.py": typed_agent(name)}, host={"contract": policy})) as host:
        before = await revision(mesh, name)
        result = await reload(host, tmp_path, typed_agent(name, *fields, "2.0.0", "new"))
        reported = {"warn": " ".join(result.notes), "refuse": result.error, "allow": ""}[policy]
        assert policy == "allow" or (change in reported and name in reported)
        assert (policy == "refuse") == bool(result.error)
        assert (policy == "warn") == bool(result.notes)
        warnings = " ".join(
            record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
        )
        assert (policy != "allow") == (change in warnings)
        word, version = ("old", "1.0.0") if policy == "refuse" else ("new", "2.0.0")
        payload = {"text": "1", "body": "1"} if fields[0] != "text: int" or word == "old" else {"text": 1}
        assert word == (await mesh.call(name, payload))["word"]
        assert version == (await mesh.contract(name)).version
        assert (policy == "refuse") == (before == await revision(mesh, name))


COMPATIBLE = {
    "other-code": ("text: str", "words: int = 0", "1.0.0"),
    "optional-input": ("text: str; more: str = ''", "words: int = 0", "1.0.0"),
    "additional-output": ("text: str", "words: int = 0; more: str = ''", "1.0.0"),
    "version": ("text: str", "words: int = 0", "1.1.0"),
}


@pytest.mark.parametrize("change", COMPATIBLE)
async def test_a_compatible_change_is_not_reported(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    change: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It serves without warnings though breaking changes are refused; changed contracts are published."""
    async with Host(configure({"a.py": typed_agent(name)}, host={"contract": "refuse"})) as host:
        first = await mesh.contract(name)
        before = await revision(mesh, name)
        result = await reload(host, tmp_path, typed_agent(name, *COMPATIBLE[change], "new"))
        assert "new" == (await mesh.call(name, {"text": ""}))["word"]
        assert ("", []) == (result.error, result.notes)
        assert [] == [record for record in caplog.records if record.levelno >= logging.WARNING]
        changed = first.to_document() != (await mesh.contract(name)).to_document()
        assert changed == (before != await revision(mesh, name))
        assert changed or change == "other-code"


UNATTENDED = f"""import asyncio, ledger
from collections.abc import AsyncIterator
{MESH}
@mesh.agent(AgentSpec(name="{{name}}.p"))
async def publisher() -> AsyncIterator[int]:
    ledger.runs.append("{{number}}")
    yield 1
    await asyncio.Event().wait()

@mesh.agent(AgentSpec(name="{{name}}.d"), sources=[mesh.subject_source("{{name}}.in")])
async def driven(text: str) -> None:
    pass
"""


async def test_an_unchanged_contract_is_not_published_again(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """New code alone does not write the registry keys of publishers and driven agents."""
    async with Host(configure({"a.py": UNATTENDED.format(name=name, number=0)})) as host:
        before = [await revision(mesh, f"{name}.{x}") for x in "pd"]
        for number in (1, 2):
            assert not (await reload(host, tmp_path, UNATTENDED.format(name=name, number=number))).error
        await until(lambda: ["0", "1", "2"] == ledger.runs)
        assert before == [await revision(mesh, f"{name}.{x}") for x in "pd"]


async def test_two_hosts_reload_the_same_change_at_once(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Both serve the new version, no call fails meanwhile, and the catalog has one entry."""
    config = configure({"a.py": typed_agent(name)})
    finished, answers = asyncio.Event(), list[str]()

    async def keep_calling() -> None:
        while not finished.is_set():
            answers.append((await mesh.call(name, {"text": ""}))["word"])

    async with Host(config) as one, Host(config) as other:
        calling = asyncio.create_task(keep_calling())
        for number in range(1, 6):
            source = typed_agent(name, "text: str; more: str = ''", version=f"1.{number}.0", word=f"{number}")
            write(tmp_path / "agents", {"a.py": source})
            results = await asyncio.gather(reload(one, tmp_path), reload(other, tmp_path))
            assert ["", ""] == [result.error for result in results]
            assert {f"{number}"} == {(await mesh.call(name, {"text": ""}))["word"] for _ in range(8)}
            listed = [entry.version for entry in await mesh.catalog() if entry.name == name]
            assert [f"1.{number}.0"] == listed
            assert f"1.{number}.0" == (await mesh.contract(name)).version
        finished.set()
        await calling
    assert {"old", *"12345"} >= set(answers)


async def test_a_reload_without_a_connection_is_published_after_the_reconnect(
    configure: Configure, name: str, tmp_path: Path
) -> None:
    """The new version and its contract serve as soon as the server is back."""
    server = EmbeddedServer(store=str(tmp_path / "store"))
    await server.start()
    disposal = (
        f"\n@mesh.dispose\ndef dispose() -> None:\n    open({str(tmp_path / 'disposed')!r}, 'w').close()\n"
    )
    config = configure({"a.py": typed_agent(name) + disposal})
    config = config.model_copy(update={"mesh": MeshSection(url=server.url)})
    try:
        async with Host(config) as host, AgentMesh(server.url) as caller:
            assert "1.0.0" == (await caller.contract(name)).version
            await server.stop()
            await until(
                lambda: not host.node.connection.connected and not node_of(caller).connection.connected
            )
            write(tmp_path / "agents", {"a.py": typed_agent(name, version="2.0.0", word="new")})
            result = await host.reload()
            assert result is not None
            assert ("", [f"{name} 1.0.0 → 2.0.0"]) == (result.error, result.agents)
            server = EmbeddedServer(server.port, str(tmp_path / "store"))
            await server.start()
            await node_of(caller).connection.wait_connected()
            await host.node.connection.wait_connected()
            await host.wait_retired()
            assert "new" == (await caller.call(name, {"text": ""}))["word"]
            assert "2.0.0" == (await caller.contract(name)).version
            assert (tmp_path / "disposed").exists()
    finally:
        await server.stop()


async def test_requests_during_a_removal_are_answered_or_fail(
    configure: Configure, mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, tmp_path: Path
) -> None:
    """Every request gets a reply or `NotFound` or `NotAvailable`; then the catalog has no entry."""
    config = configure({"a.py": MESH + agent(name), "b.py": MESH + agent(f"{name}.b")})
    answers: list[object] = []

    async def keep_calling(caller: AgentMesh) -> None:
        while True:
            try:
                answers.append(await caller.call(name, {}, timeout=5))
            except (NotFound, NotAvailable):
                return

    async with new_mesh() as caller, Host(config) as host:
        callers = [asyncio.create_task(keep_calling(caller)) for _ in range(16)]
        await until(lambda: len(answers) > 200)
        (tmp_path / "agents/a.py").unlink()
        assert [f"{name} withdrawn"] == (await reload(host, tmp_path)).agents
        await asyncio.gather(*callers)
        assert {"ok"} == set(answers)
        await host.wait_retired()
        assert [f"{name}.b"] == [
            entry.name for entry in await caller.catalog() if entry.name.startswith(name)
        ]


DRIVEN = """{mesh}
import ledger
from openagentmesh import MeshMessage
@mesh.agent(AgentSpec(name={name!r}), sources=[mesh.subject_source("{name}.in")]{more})
async def driven(message: MeshMessage[int]) -> None:
    ledger.runs.append(f"{{message.data}}")
# {number}
"""


@pytest.mark.parametrize("has_condition", [False, True], ids=["without-condition", "with-condition"])
async def test_sources_lose_no_message_during_reloads(  # noqa: PLR0913 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger, *, has_condition: bool
) -> None:
    """Each message that arrives while its agent is reloaded repeatedly is handled once."""
    more = f", active_when=mesh.kv_condition('{name}', lambda text: text == 'on')" if has_condition else ""
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            if sent - len(ledger.runs) < 100:  # a longer backlog would exceed the queue
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
            target = sent + 50
            while sent < target:
                await asyncio.sleep(0.001)
        sending.cancel()
        await until(lambda: len(ledger.runs) >= sent)
    assert list(range(sent)) == sorted(map(int, ledger.runs))
