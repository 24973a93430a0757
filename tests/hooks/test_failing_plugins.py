"""Middlewares of plugins that fail: the error names the plugin, and the request is not handled."""

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
async def test_a_middleware_that_raises_is_named(url: str, name: str, verb: str) -> None:
    """The caller gets HandlerError with the plugin's name; a MeshError keeps its code."""
    events: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", events), Recorder("b", events)) as mesh:

        async def request(**headers: str) -> None:
            if verb == "call":
                await mesh.call(f"{name}.responder", 1, headers=headers)
            else:
                async for _ in mesh.stream(f"{name}.streamer", 1, headers=headers):
                    pass

        with pytest.raises(HandlerError, match="the plugin 'recorder' failed: failure of a plugin") as caught:
            await request(raises="a")
        assert {"plugin": "recorder"} == caught.value.details
        with pytest.raises(PermissionDenied, match="not permitted"):
            await request(refuses="b")
        await request()


class Raising:
    """A plugin with the endpoint `endpoint`; objects of this class are endpoints that fail."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        return lambda _inner: self.endpoint

    async def fail(self, _call: Call) -> None:
        raise ValueError("failure of a plugin")

    async def __call__(self, call: Call) -> None:
        await self.fail(call)


@pytest.mark.parametrize(
    ("endpoint", "error"),
    [
        (lambda call: Raising(None).fail(call), "failure of a plugin"),
        (Raising(None), "failure of a plugin"),
        (partial(Raising.fail, Raising(None)), "failure of a plugin"),
        (lambda _call: None, "await"),
    ],
    ids=["lambda", "object", "partial", "not-awaitable"],
)
async def test_the_plugin_of_a_failing_endpoint_is_named_for_every_kind_of_callable(
    url: str, name: str, endpoint: Any, error: str
) -> None:
    """Also between the middlewares of two other plugins, and when the endpoint is not awaitable."""
    async with mesh_with_plugins(url, name, Recorder("a", []), Raising(endpoint), Recorder("b", [])) as mesh:
        with pytest.raises(HandlerError, match=error) as caught:
            await mesh.call(f"{name}.responder", 1)
    assert {"plugin": "raising"} == caught.value.details


async def test_an_error_of_the_handler_does_not_name_a_plugin(url: str, name: str) -> None:
    """With plugins, errors of the handler and for invalid input are the same as without them."""
    mesh = AgentMesh(url, plugins=[Recorder("a", [])])

    @mesh.agent(AgentSpec(name=name))
    async def failing(number: int) -> int:
        raise ValueError("mine")

    async with mesh:
        with pytest.raises(HandlerError, match=r"^mine$"):
            await mesh.call(name, 1)
        with pytest.raises(InvalidInput):
            await mesh.call(name, "not a number")


async def test_a_client_middleware_that_fails_before_a_call_is_named(url: str, name: str) -> None:
    """The error is PluginFailed with the plugin's name, and the request is not sent."""
    events: Events = []
    async with mesh_with_plugins(url, name, Recorder("a", events)) as mesh:
        with pytest.raises(PluginFailed, match="the plugin 'recorder' failed before the call of"):
            await mesh.call(f"{name}.responder", 1, headers={"stops": "a"})
        assert [("a", "out", "call", f"{name}.responder")] == events
