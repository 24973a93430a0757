"""The sample agents do what they say, under a mesh of a test."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, InvalidInput

FOLDER = Path(__file__).parents[2] / "agents"


def mesh_of(sample: str) -> AgentMesh:
    """The mesh of one sample file, loaded as a test of its author would."""
    spec = importlib.util.spec_from_file_location(f"sample_{sample}", FOLDER / f"{sample}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.mesh
    assert isinstance(found, AgentMesh)
    return found


async def test_the_summarizer_cuts() -> None:
    """At most `max_length` characters are left, without a space at the end."""
    async with mesh_of("summarizer").local() as mesh:
        assert {"summary": "hello"} == await mesh.call(
            "nlp.summarizer", {"text": "hello world", "max_length": 6}
        )
        with pytest.raises(InvalidInput):
            await mesh.call("nlp.summarizer", {"text": "x", "max_length": 0})


async def test_the_echo_gives_back_anything() -> None:
    """Any JSON comes back as it was, with the caller's instance id."""
    async with mesh_of("echo").local() as mesh:
        values: list[Any] = [{"a": [1, None]}, "text", 5, []]
        for value in values:
            answer = await mesh.call("echo", value)
            assert (value, mesh.instance_id) == (answer["said"], answer["caller"])


async def test_the_ticker_streams() -> None:
    """As many numbered ticks come as were asked for."""
    async with mesh_of("ticker").local() as mesh:
        ticks = [tick async for tick in mesh.stream("time.ticker", {"count": 3, "every": 0})]
        assert [0, 1, 2] == [tick["number"] for tick in ticks]


async def test_the_guide_finds_others_by_tag() -> None:
    """It asks whoever has the tag, knowing no name."""
    mesh = mesh_of("guide")
    summarizer = mesh_of("summarizer")
    async with mesh.local():
        assert {"called": [], "answers": {}} == await mesh.call("guide", {"text": "x"})
        async with AgentMesh(mesh.url) as second:
            assert second._node is not None
            for agent in summarizer._agents.values():
                second._node.serve(agent)
            await second._node.wait_served()
            answer = await mesh.call("guide", {"text": "hello"})
    assert {"called": ["nlp.summarizer"], "answers": {"nlp.summarizer": {"summary": "hello"}}} == answer
