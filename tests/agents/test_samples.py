"""The sample agents do what their descriptions say, on a mesh of the test."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, Host, InvalidInput
from openagentmesh.runtime.config import Config, HostSection, MeshSection

FOLDER = Path(__file__).parents[2] / "agents"


def mesh_of(sample: str) -> AgentMesh:
    """The mesh of one sample file, which is loaded as a module."""
    spec = importlib.util.spec_from_file_location(f"sample_{sample}", FOLDER / f"{sample}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.mesh
    assert isinstance(found, AgentMesh)
    return found


async def test_the_summarizer_truncates_text() -> None:
    """The summary has at most `max_length` characters, without a space at the end."""
    async with mesh_of("summarizer").local() as mesh:
        assert {"summary": "hello"} == await mesh.call(
            "nlp.summarizer", {"text": "hello world", "max_length": 6}
        )
        with pytest.raises(InvalidInput):
            await mesh.call("nlp.summarizer", {"text": "x", "max_length": 0})


async def test_the_echo_returns_any_json() -> None:
    """Any JSON is returned unchanged, with the caller's instance id."""
    async with mesh_of("echo").local() as mesh:
        values: list[Any] = [{"a": [1, None]}, "text", 5, []]
        for value in values:
            answer = await mesh.call("echo", value)
            assert (value, mesh.instance_id) == (answer["said"], answer["caller"])


async def test_the_ticker_streams_numbered_ticks() -> None:
    """The stream has the requested number of ticks."""
    async with mesh_of("ticker").local() as mesh:
        ticks = [tick async for tick in mesh.stream("time.ticker", {"count": 3, "every": 0})]
        assert [0, 1, 2] == [tick["number"] for tick in ticks]


async def test_the_guide_calls_all_agents_with_a_tag() -> None:
    """The guide calls the agents that it finds in the catalog by a tag."""
    async with mesh_of("guide").local() as mesh:
        assert {"called": [], "answers": {}} == await mesh.call("guide", {"text": "x"})
        section = HostSection(agents=["summarizer.py"], entry_points=False)
        async with Host(Config(folder=FOLDER, mesh=MeshSection(url=mesh.url), host=section)):
            answer = await mesh.call("guide", {"text": "hello"})
    assert {"called": ["nlp.summarizer"], "answers": {"nlp.summarizer": {"summary": "hello"}}} == answer
