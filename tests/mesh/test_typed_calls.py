"""Typed calls: what type checkers infer and reject, and what is checked at run time."""

from collections.abc import AsyncIterator
from pathlib import Path
from textwrap import dedent
from typing import Any, assert_type, cast

import pytest
from mypy import api
from openagentmesh import AgentMesh, AgentSpec, InvalidInput, InvalidReply
from pydantic import BaseModel

ROOT = Path(__file__).parents[2]


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    length: int


class Agents:
    """Typed agents: responders, a streamer, one without an input, and one without an output."""

    def __init__(self, mesh: AgentMesh, name: str) -> None:
        @mesh.agent(AgentSpec(name=f"{name}.measure"))
        async def measure(req: Question) -> Answer:
            return Answer(length=len(req.text))

        @mesh.agent(AgentSpec(name=f"{name}.count"))
        async def count(req: Question) -> AsyncIterator[Answer]:
            for length in range(len(req.text)):
                yield Answer(length=length)

        @mesh.agent(AgentSpec(name=f"{name}.now"))
        async def now() -> Answer:
            return Answer(length=0)

        @mesh.agent(AgentSpec(name=f"{name}.plain"))
        def plain(req: Question) -> list[int]:
            return [len(req.text)]

        @mesh.agent(AgentSpec(name=f"{name}.nothing"))
        async def nothing(req: Question) -> None: ...

        self.measure, self.count, self.now, self.plain, self.nothing = measure, count, now, plain, nothing


async def test_returns_sets_the_type_of_the_reply(mesh: AgentMesh, name: str) -> None:
    """The reply is validated as that type, which type checkers infer; without `returns` it is Any."""
    agents, question = Agents(mesh, name), {"text": "four"}
    answer = await mesh.call(f"{name}.measure", question, returns=Answer)
    assert_type(answer, Answer)
    numbers = await mesh.call(f"{name}.plain", question, returns=list[int])
    assert_type(numbers, list[int])
    either: Question | Answer = await mesh.call(f"{name}.measure", question, returns=Question | Answer)
    assert Answer(length=4) == either
    untyped = await mesh.call(f"{name}.measure", question)
    assert_type(untyped, Any)
    chunks = mesh.stream(f"{name}.count", question, returns=Answer)
    lengths = [assert_type(chunk, Answer).length async for chunk in chunks]
    assert (4, [4], {"length": 4}, [0, 1, 2, 3]) == (answer.length, numbers, untyped, lengths)
    assert agents


async def test_a_decorated_function_can_be_called_instead_of_a_name(mesh: AgentMesh, name: str) -> None:
    """Payload and reply have the function's types: of coroutines, generators, blocking functions and None."""
    agents, question = Agents(mesh, name), Question(text="four")
    assert_type(await mesh.call(agents.measure, question), Answer)
    assert_type(await mesh.call(agents.plain, question), list[int])
    assert_type(await mesh.call(agents.now), Answer)
    assert Answer(length=4) == await mesh.call(agents.measure, question)
    assert [4] == await mesh.call(agents.plain, question)
    assert Answer(length=0) == await mesh.call(agents.now)
    nothing: object = await mesh.call(agents.nothing, question)
    assert nothing is None
    lengths = [assert_type(chunk, Answer).length async for chunk in mesh.stream(agents.count, question)]
    assert [0, 1, 2, 3] == lengths


async def test_a_reply_of_another_type_raises_invalid_reply(mesh: AgentMesh, name: str) -> None:
    """The error has the invalid fields; also for the chunks of a stream."""
    agents = Agents(mesh, name)
    with pytest.raises(InvalidReply, match="does not match") as caught:
        await mesh.call(f"{name}.measure", {"text": "x"}, returns=Question)
    assert [["text"]] == [problem["loc"] for problem in caught.value.details["errors"]]
    with pytest.raises(InvalidReply):
        _ = [chunk async for chunk in mesh.stream(f"{name}.count", {"text": "x"}, returns=Question)]
    assert agents


async def test_an_invalid_payload_for_a_function_is_not_sent(mesh: AgentMesh, name: str) -> None:
    """The caller raises the error that the agent would raise, with the invalid fields."""
    agents, not_an_agent = Agents(mesh, name), cast("Any", Agents)
    with pytest.raises(InvalidInput, match=f"agent '{name}.measure'") as caught:
        await mesh.call(agents.measure, Answer(length=1))  # type: ignore[arg-type]
    assert caught.value.details["errors"]
    with pytest.raises(InvalidInput, match="is neither an agent's name nor a function decorated"):
        await mesh.call(not_an_agent, None)


SNIPPET = """
from pydantic import BaseModel
from openagentmesh import AgentMesh, AgentSpec

mesh = AgentMesh()

class Question(BaseModel):
    text: str

class Answer(BaseModel):
    length: int

@mesh.agent(AgentSpec(name="measure"))
async def measure(req: Question) -> Answer:
    return Answer(length=len(req.text))

async def main() -> None:
    await mesh.call(measure, Question(text="x"), retry=1, headers={"a": "b"})
    LINE
"""


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("await mesh.call(measure, Answer(length=1))", "arg-type"),
        ("await mesh.call(measure)", "arg-type"),
        ("answer: Question = await mesh.call(measure, Question(text=''))", "arg-type"),
        ("answer: Question = await mesh.call('measure', {}, returns=Answer)", "arg-type"),
        ("mesh.agent(AgentSpec(name='x'))(lambda one, two: one)", "type-var"),
        ("mesh.agent(AgentSpec(name='x'))(7)", "type-var"),
        ("mesh.agent(measure)", "arg-type"),
        ("mesh.agent(AgentSpec(name='x'), sources=['news'])", "list-item"),
    ],
    ids=[
        "payload", "missing-payload", "reply", "returns", "two-parameters", "not-a-function", "no-spec",
        "not-a-source",
    ],
)  # fmt: skip
def test_mypy_reports_what_fails_at_run_time(
    line: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong payload, reply or handler is the only error, in its line."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "snippet.py"
    file.write_text(dedent(SNIPPET.replace("LINE", line)))
    out, _, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(file)])
    errors = [found for found in out.splitlines() if ": error:" in found]
    assert errors, out
    number = len(file.read_text().splitlines())
    assert {(str(number), f"[{error}]")} == {(e.split(":")[1], e.rpartition(" ")[2]) for e in errors}, out


class Defaults(BaseModel):
    number: int = 7


async def test_none_is_received_as_none(mesh: AgentMesh, name: str) -> None:
    """A result of None, which is sent as `{}`, is None for a type that accepts it, in chunks too."""

    @mesh.agent(AgentSpec(name=f"{name}.optional"))
    async def optional(req: bool) -> Defaults | None:
        return Defaults() if req else None

    @mesh.agent(AgentSpec(name=f"{name}.chunks"))
    async def chunks(req: int) -> AsyncIterator[int | None]:
        yield req
        yield None

    assert await mesh.call(optional, payload=False) is None
    assert Defaults(number=7) == await mesh.call(optional, payload=True)
    assert await mesh.call(f"{name}.optional", payload=False, returns=Defaults | None) is None
    assert [1, None] == [chunk async for chunk in mesh.stream(chunks, 1)]


async def test_ambiguous_and_undecorated_functions_are_refused(mesh: AgentMesh, name: str) -> None:
    """A function that handles two agents stands for neither, and a method has no agent's name."""

    async def handle(req: int) -> int:
        return req

    mesh.agent(AgentSpec(name=f"{name}.a"))(handle)
    assert 1 == await mesh.call(handle, 1)
    mesh.agent(AgentSpec(name=f"{name}.b"))(handle)
    with pytest.raises(InvalidInput, match="the handler of several agents"):
        await mesh.call(handle, 1)
    with pytest.raises(InvalidInput, match="Methods are called by their agent's name"):
        await mesh.call(Defaults.model_dump_json, Defaults())


async def test_a_model_with_a_wrong_value_is_invalid_input(mesh: AgentMesh, name: str) -> None:
    """A model that got a value of another type by assignment is refused with the agent's name."""
    agents, question = Agents(mesh, name), Question(text="four")
    question.text = 4  # type: ignore[assignment]
    with pytest.raises(InvalidInput) as caught:
        await mesh.call(agents.measure, question)
    assert f"{name}.measure" == caught.value.agent
