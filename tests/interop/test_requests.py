"""Calls and streams between the published SDK and ours (protocol §7, §8)."""

import pytest

from tests.support.peers import CommandFailed, Pair, Peer


def test_a_call_is_answered(pair: Pair) -> None:
    """A model comes back as the JSON of the handler's model, defaults filled in."""
    assert {"text": "ja", "times": 1} == pair.caller.run("call", pair.agent("echo"), {"text": "ja"})
    answer = pair.caller.run("call", pair.agent("echo"), {"text": "jö ", "times": 3})
    assert {"text": "jö jö jö ", "times": 1} == answer


def test_scalars_are_not_wrapped(pair: Pair) -> None:
    """A handler from `str` to `int` takes a JSON string and answers a JSON number."""
    assert 4 == pair.caller.run("call", pair.agent("length"), "four")


def test_a_trigger_needs_no_input(pair: Pair) -> None:
    """A handler without a parameter is called without a body."""
    assert {"text": "here", "times": 1} == pair.caller.run("call", pair.agent("where"))


def test_none_is_an_empty_object(pair: Pair) -> None:
    """A handler that returns nothing answers `{}`."""
    assert {} == pair.caller.run("call", pair.agent("nothing"), {"text": "x"})


def test_many_calls_at_once(pair: Pair) -> None:
    """A hundred calls under way at once are all answered, each with its own agent's answer."""
    answers = pair.caller.run("calls", pair.agent("echo"), {"text": "ja"}, 100)
    assert [{"text": "ja", "times": 1}] * 100 == answers


def test_an_exception_of_the_handler(pair: Pair) -> None:
    """Any exception is a `handler_error` with its text and the agent's name."""
    with pytest.raises(CommandFailed, match="no wine today") as caught:
        pair.caller.run("call", pair.agent("fail"), {"text": "wine"})
    assert ("handler_error", pair.agent("fail")) == (caught.value.code, caught.value.agent)


def test_an_error_with_a_code_of_its_own(pair: Pair) -> None:
    """A MeshError that a handler raises keeps its code, its text and its details."""
    with pytest.raises(CommandFailed, match="Try again tomorrow") as caught:
        pair.caller.run("call", pair.agent("quota"), {"text": ""})
    assert ("quota_used_up", "MeshError") == (caught.value.code, caught.value.type)
    assert {"left": 0} == caught.value.details


def test_invalid_input_of_a_stock_caller(stock_calls_ours: Pair) -> None:
    """Our host tells a stock caller what is wrong with its input, field by field."""
    name = stock_calls_ours.agent("echo")
    with pytest.raises(CommandFailed) as caught:
        stock_calls_ours.caller.run("call", name, {"times": "many"})
    error = caught.value
    assert ("MeshError", "invalid_input", name) == (error.type, error.code, error.agent)
    assert f"Input failed validation for agent '{name}'" == error.message
    assert [["text"], ["times"]] == [problem["loc"] for problem in error.details["errors"]]


def test_invalid_input_of_our_caller(ours_calls_stock: Pair) -> None:
    """The published host says `handler_error` with pydantic's text; our caller raises just that."""
    with pytest.raises(CommandFailed, match="2 validation errors") as caught:
        ours_calls_stock.caller.run("call", ours_calls_stock.agent("echo"), {"times": "many"})
    assert ("HandlerError", "handler_error") == (caught.value.type, caught.value.code)


def test_an_unknown_agent(stock: Peer, ours: Peer, name: str) -> None:
    """Nobody there: NATS says so at once; ours turns it into `not_found`, the published SDK does not."""
    with pytest.raises(CommandFailed) as caught:
        stock.run("call", name, {})
    assert "NoRespondersError" == caught.value.type
    with pytest.raises(CommandFailed) as caught:
        ours.run("call", name, {})
    assert ("NotFound", "not_found", name) == (caught.value.type, caught.value.code, caught.value.agent)


@pytest.mark.parametrize("count", [0, 1, 12, 500])
def test_a_stream(pair: Pair, count: int) -> None:
    """Every chunk comes, in order, and then the end; also none at all, and many."""
    chunks = pair.caller.start("stream", pair.agent("count"), {"upto": count})
    assert [{"number": number} for number in range(count)] == chunks.items()


def test_a_stream_that_fails_in_the_middle(pair: Pair) -> None:
    """The chunks before the exception arrive; then it is raised at the reader."""
    chunks = pair.caller.start("stream", pair.agent("count"), {"upto": 20, "fail_at": 11})
    assert [{"number": number} for number in range(11)] == [chunks.item() for _ in range(11)]
    with pytest.raises(CommandFailed, match="cannot count to 11") as caught:
        chunks.item()
    assert ("handler_error", pair.agent("count")) == (caught.value.code, caught.value.agent)


def test_the_input_of_a_stream_is_checked(stock_calls_ours: Pair) -> None:
    """Our host answers a stream with invalid input by an error frame, which a stock caller raises."""
    with pytest.raises(CommandFailed) as caught:
        stock_calls_ours.caller.start("stream", stock_calls_ours.agent("count"), {}).item()
    assert "invalid_input" == caught.value.code


def test_a_stock_reader_that_leaves_stops_our_agent(stock_calls_ours: Pair) -> None:
    """When a stock caller breaks out of an endless stream, the handler is closed soon after."""
    chunks = stock_calls_ours.caller.start("stream", stock_calls_ours.agent("endless"), {"upto": 7}, take=2)
    assert [{"number": 7}, {"number": 7}] == chunks.items()
    answer = stock_calls_ours.caller.run("call", stock_calls_ours.agent("left"))
    assert "left" == answer["text"]


@pytest.mark.parametrize(
    ("verb", "agent", "suffix"),
    [
        ("call", "count", "is streaming-only. Use stream() instead"),
        ("stream", "echo", "does not support streaming. Use call() instead"),
        ("stream", "where", "does not support streaming. Use call() instead"),
    ],
)
def test_the_wrong_verb(pair: Pair, verb: str, agent: str, suffix: str) -> None:
    """The caller knows an agent's shape from the other SDK's catalog, and says the same text."""
    name = pair.agent(agent)
    with pytest.raises(CommandFailed) as caught:
        pair.caller.start(verb, name, {"text": "x", "upto": 1}).items()
    assert ("InvocationMismatch", "invocation_mismatch") == (caught.value.type, caught.value.code)
    assert f"Agent '{name}' {suffix}" == caught.value.message
