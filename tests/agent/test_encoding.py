"""The decoding of inputs and the encoding of results by the types of a handler."""

import json
import math
import warnings
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, HandlerError, InvalidInput
from openagentmesh.agent.agent import AgentVersion
from pydantic import BaseModel, field_validator
from pydantic_core import PydanticCustomError

from tests.support.handlers import In, Out, declared


class Odd(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def odd(cls, n: int) -> int:
        if n == 0:
            raise PydanticCustomError("zero", "is zero", {"what": object()})
        if n % 2 == 0:
            raise ValueError("is even")
        return n


async def test_an_optional_result_is_an_empty_object_for_none(mesh: AgentMesh, name: str) -> None:
    """`Out | None` replies `{}` for None and the model otherwise."""

    @mesh.agent(AgentSpec(name=name))
    async def maybe(req: In) -> Out | None:
        return Out(length=1) if req.text else None

    assert [{}, {"length": 1}] == [await mesh.call(name, {"text": text}) for text in ("", "x")]


async def test_an_empty_body_is_the_default_or_none(mesh: AgentMesh, name: str) -> None:
    """A parameter with a default, or one that may be None, makes the body optional."""

    @mesh.agent(AgentSpec(name=f"{name}.default"))
    async def default(req: In = In(text="default")) -> str:  # noqa: B008 - what is tested
        return req.text

    @mesh.agent(AgentSpec(name=f"{name}.none"))
    async def none(req: In | None) -> str:
        return "none" if req is None else req.text

    given: list[object] = [None, {"text": "given"}]
    assert ["default", "given"] == [await mesh.call(f"{name}.default", payload) for payload in given]
    assert ["none", "given"] == [await mesh.call(f"{name}.none", payload) for payload in given]


async def return_odd(req: Odd) -> Odd:
    return req


@pytest.mark.parametrize(
    ("body", "kind", "loc"),
    [
        (b"{}", "missing", ["n"]),
        (b'{"n":"x"}', "int_parsing", ["n"]),
        (b'{"n":2}', "value_error", ["n"]),
        (b'{"n":0}', "zero", ["n"]),
        (b'{"n":[{"deep":[1]}]}', "int_type", ["n"]),
        (b"", "missing", []),
        (b"{", "json_invalid", []),
        (b"[" * 2000, "json_invalid", []),
        (b'{"n":NaN}', "finite_number", ["n"]),
        (b'{"n":"\xff"}', "json_invalid", []),
        (b"\xff\xfe", "json_invalid", []),
    ],
)
def test_an_invalid_body_raises_invalid_input(body: bytes, kind: str, loc: list[str]) -> None:
    """For any malformed body the details are pydantic's list of problems as plain JSON, without URLs."""
    with pytest.raises(InvalidInput) as caught:
        declared(return_odd).handler.decode("a", body)
    assert "Input failed validation for agent 'a'" == caught.value.message
    (found,) = json.loads(json.dumps(caught.value.details["errors"]))
    assert (kind, loc) == (found["type"], found["loc"])
    assert "url" not in found


@pytest.mark.parametrize(
    "payload", [{"n": 2}, None, b'{"n":"\xff"}'], ids=["raising-validator", "empty", "invalid-utf8"]
)
async def test_the_caller_of_an_invalid_request_gets_invalid_input(
    mesh: AgentMesh, name: str, payload: object
) -> None:
    """A raising validator, an empty body and invalid UTF-8 are rejected; the next request is served."""
    mesh.agent(AgentSpec(name=name))(return_odd)
    with pytest.raises(InvalidInput) as caught:
        await mesh.call(name, payload)
    error = caught.value
    assert (f"Input failed validation for agent '{name}'", name) == (error.message, error.agent)
    assert 1 == len(error.details["errors"])
    assert {"n": 3} == await mesh.call(name, {"n": 3})


@pytest.mark.parametrize(
    ("hint", "result", "body"),
    [
        (Out, {"length": "5"}, {"length": 5}),
        (list[Out], [{"length": 5}, Out()], [{"length": 5}, {"length": 0}]),
        (int, "5", 5),
        (str, "text", "text"),
        (float, math.nan, None),
        (Any, {"a": [1, Out()]}, {"a": [1, {"length": 0}]}),
        (None, {"any": "json"}, {"any": "json"}),
        (None, Out(length=2), {"length": 2}),
        (None, {"x": math.nan}, {"x": None}),
        (Out, None, {}),
    ],
)
def test_a_result_is_encoded_as_its_declared_type(hint: Any, result: object, body: object) -> None:
    """Similar values are converted to the declared type; without one, NaN is encoded as null."""

    def reject_constant(constant: str) -> None:
        raise AssertionError(constant)

    assert body == json.loads(returning(hint).encode(result), parse_constant=reject_constant)


def returning(hint: Any) -> AgentVersion:
    async def handler(req: In) -> Any:
        return req

    handler.__annotations__ = {"req": In, "return": hint}
    return declared(handler)


@pytest.mark.parametrize(
    ("hint", "result"),
    [
        (Out, {"length": "x"}),
        (Out, 5),
        (Out, In(text="x")),
        (In, Out()),
        (list[In], [Out()]),
        (int, "x"),
        (list[Out], [5]),
        (int | str, []),
        (Any, object()),
        (None, object()),
        (str, "\ud800"),
        (bytes, b"\xff"),
    ],
)
def test_a_result_of_another_type_is_a_handler_error(hint: Any, result: object) -> None:
    """A result that cannot be converted to the declared type is not sent, but raises `HandlerError`."""
    with pytest.raises(HandlerError, match="another type than declared"):
        returning(hint).encode(result)


@pytest.mark.parametrize("hint", [Out, list[Out]], ids=["alone", "in a list"])
def test_a_model_with_a_value_of_another_type_is_a_handler_error(hint: Any) -> None:
    """Pydantic only warns about such a model; it is rejected even if the author's module ignores warnings."""
    broken = Out(length=1)
    broken.length = "x"  # type: ignore[assignment] # what is tested
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = returning(hint)
        with pytest.raises(HandlerError, match="Expected `int`"):
            agent.encode(broken if hint is Out else [broken])
