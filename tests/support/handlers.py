"""Inputs and outputs of handlers, and the declaration of a handler without a mesh."""

from collections.abc import Callable
from typing import Any

from openagentmesh import AgentSpec
from openagentmesh.agent.agent import AgentVersion, declare
from openagentmesh.agent.handler import TypeCache
from pydantic import BaseModel


class In(BaseModel):
    """An input type."""

    text: str


class Out(BaseModel):
    """An output type."""

    length: int = 0


Handler = Callable[..., Any]


def declared(function: Handler) -> AgentVersion:
    """The version of an agent with this handler, without a mesh."""
    return declare(AgentSpec(name="a"), function, TypeCache())
