"""Plugins that fail on the way of a request: they are named, and let nothing through."""

from functools import partial
from typing import Any

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Call,
    HandlerError,
    InvalidInput,
    Middleware,
    PermissionDenied,
    PluginFailed,
    hookimpl,
)

from tests.support.plugins import Events, Recorder, mesh_with_plugins


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_middleware_that_raises_is_named_and_lets_nothing_through(
    url: str, name: str, verb: str
) -> None:
    """Its failure is a handler_error with the plugin's name; a MeshError keeps its code."""
    told: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", told), Recorder("b", told)) as mesh:

        async def ask(**headers: str) -> None:
            if verb == "call":
                await mesh.call(f"{name}.asked", 1, headers=headers)
            else:
                async for _ in mesh.stream(f"{name}.counts", 1, headers=headers):
                    pass

        with pytest.raises(
            HandlerError, match="the plugin 'recorder' failed: a plugin's own failure"
        ) as caught:
            await ask(raises="a")
        assert {"plugin": "recorder"} == caught.value.details
        with pytest.raises(PermissionDenied, match="not for you"):
            await ask(refuses="b")
        await ask()


class Raising:
    """A plugin whose endpoint fails, whatever kind of function it is."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        return lambda _below: self.endpoint

    async def fail(self, _call: Call) -> None:
        raise ValueError("its own")

    async def __call__(self, call: Call) -> None:
        await self.fail(call)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        (lambda call: Raising(None).fail(call), "its own"),
        (Raising(None), "its own"),
        (partial(Raising.fail, Raising(None)), "its own"),
        (lambda _call: None, "await"),
    ],
    ids=["lambda", "object", "partial", "not-awaitable"],
)
async def test_whatever_an_endpoint_is_its_plugin_is_named(
    url: str, name: str, endpoint: Any, why: str
) -> None:
    """By the place it has around the agent, not by what it is made of; also between two others."""
    async with mesh_with_plugins(url, name, Recorder("a", []), Raising(endpoint), Recorder("b", [])) as mesh:
        with pytest.raises(HandlerError, match=why) as caught:
            await mesh.call(f"{name}.asked", 1)
    assert {"plugin": "raising"} == caught.value.details


async def test_a_handlers_failure_is_not_a_plugins(url: str, name: str) -> None:
    """Within plugins, what a handler raises and what a caller sends wrong are told as without them."""
    mesh = AgentMesh(url, plugins=[Recorder("a", [])])

    @mesh.agent(AgentSpec(name=name))
    async def failing(number: int) -> int:
        raise ValueError("mine")

    async with mesh:
        with pytest.raises(HandlerError, match=r"^mine$"):
            await mesh.call(name, 1)
        with pytest.raises(InvalidInput):
            await mesh.call(name, "no number")


async def test_a_client_middleware_that_fails_sends_nothing(url: str, name: str) -> None:
    """It is named, and the request does not leave."""
    told: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", told)) as mesh:
        with pytest.raises(PluginFailed, match="the plugin 'recorder' failed before the call of"):
            await mesh.call(f"{name}.asked", 1, headers={"stops": "a"})
        assert [("a", "out", "call", f"{name}.asked")] == told
