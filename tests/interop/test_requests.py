"""Calls and streams between the published SDK and ours (protocol §7, §8)."""

import pytest

from tests.support.peers import CommandFailed, Pair, Peer


def test_a_call_returns_the_model_of_the_handler(pair: Pair) -> None:
    """A reply is the JSON of the handler's model, with its defaults."""
    assert {"text": "ja", "times": 1} == pair.caller.run("call", pair.agent("echo"), {"text": "ja"})
    answer = pair.caller.run("call", pair.agent("echo"), {"text": "jö ", "times": 3})
    assert {"text": "jö jö jö ", "times": 1} == answer


def test_scalars_are_not_wrapped(pair: Pair) -> None:
    """A handler from `str` to `int` takes a JSON string and returns a JSON number."""
    assert 4 == pair.caller.run("call", pair.agent("length"), "four")


def test_a_trigger_needs_no_input(pair: Pair) -> None:
    """A handler without a parameter is called without a body."""
    assert {"text": "here", "times": 1} == pair.caller.run("call", pair.agent("where"))


def test_the_reply_without_a_result_is_an_empty_object(pair: Pair) -> None:
    """The reply of a handler that returns nothing is `{}`."""
    assert {} == pair.caller.run("call", pair.agent("nothing"), {"text": "x"})


def test_a_hundred_concurrent_calls_are_answered(pair: Pair) -> None:
    """A hundred concurrent calls all get the agent's reply."""
    answers = pair.caller.run("calls", pair.agent("echo"), {"text": "ja"}, 100)
    assert [{"text": "ja", "times": 1}] * 100 == answers


def test_an_exception_of_the_handler_is_a_handler_error(pair: Pair) -> None:
    """Any exception is a `handler_error` with its text and the agent's name."""
    with pytest.raises(CommandFailed, match="no wine today") as caught:
        pair.caller.run("call", pair.agent("fail"), {"text": "wine"})
    assert ("handler_error", pair.agent("fail")) == (caught.value.code, caught.value.agent)


def test_an_error_keeps_its_own_code(pair: Pair) -> None:
    """A MeshError that a handler raises keeps its code, message and details."""
    with pytest.raises(CommandFailed, match="Try again tomorrow") as caught:
        pair.caller.run("call", pair.agent("quota"), {"text": ""})
    assert ("quota_used_up", "MeshError") == (caught.value.code, caught.value.type)
    assert {"left": 0} == caught.value.details


def test_our_host_answers_invalid_input_by_field(published_calls_ours: Pair) -> None:
    """Our host answers invalid input of a published caller by `invalid_input`, with each invalid field."""
    name = published_calls_ours.agent("echo")
    with pytest.raises(CommandFailed) as caught:
        published_calls_ours.caller.run("call", name, {"times": "many"})
    error = caught.value
    assert ("MeshError", "invalid_input", name) == (error.type, error.code, error.agent)
    assert f"Input failed validation for agent '{name}'" == error.message
    assert [["text"], ["times"]] == [problem["loc"] for problem in error.details["errors"]]


def test_our_caller_raises_the_published_error_of_invalid_input(ours_calls_published: Pair) -> None:
    """The published host answers `handler_error` with pydantic's text, and our caller raises it unchanged."""
    with pytest.raises(CommandFailed, match="2 validation errors") as caught:
        ours_calls_published.caller.run("call", ours_calls_published.agent("echo"), {"times": "many"})
    assert ("HandlerError", "handler_error") == (caught.value.type, caught.value.code)


def test_an_unknown_agent_is_reported_immediately(published: Peer, ours: Peer, name: str) -> None:
    """NATS reports that there are no responders; ours raises `not_found`, the published SDK does not."""
    with pytest.raises(CommandFailed) as caught:
        published.run("call", name, {})
    assert "NoRespondersError" == caught.value.type
    with pytest.raises(CommandFailed) as caught:
        ours.run("call", name, {})
    assert ("NotFound", "not_found", name) == (caught.value.type, caught.value.code, caught.value.agent)


@pytest.mark.parametrize("count", [0, 1, 12, 500])
def test_a_stream_delivers_all_chunks_in_order(pair: Pair, count: int) -> None:
    """All chunks arrive in order, then the end: for no chunk, one, some and many."""
    chunks = pair.caller.start("stream", pair.agent("count"), {"upto": count})
    assert [{"number": number} for number in range(count)] == chunks.items()


def test_a_failing_stream_delivers_its_chunks_and_then_the_error(pair: Pair) -> None:
    """The chunks before the exception arrive, then it is raised at the reader."""
    chunks = pair.caller.start("stream", pair.agent("count"), {"upto": 20, "fail_at": 11})
    assert [{"number": number} for number in range(11)] == [chunks.item() for _ in range(11)]
    with pytest.raises(CommandFailed, match="cannot count to 11") as caught:
        chunks.item()
    assert ("handler_error", pair.agent("count")) == (caught.value.code, caught.value.agent)


def test_our_host_validates_the_input_of_a_stream(published_calls_ours: Pair) -> None:
    """Our host answers a stream with invalid input by an error frame, which a published caller raises."""
    with pytest.raises(CommandFailed) as caught:
        published_calls_ours.caller.start("stream", published_calls_ours.agent("count"), {}).item()
    assert "invalid_input" == caught.value.code


def test_our_handler_is_closed_when_a_published_reader_stops(published_calls_ours: Pair) -> None:
    """When a published caller leaves an endless stream after two chunks, the handler is closed."""
    chunks = published_calls_ours.caller.start(
        "stream", published_calls_ours.agent("endless"), {"upto": 7}, take=2
    )
    assert [{"number": 7}, {"number": 7}] == chunks.items()
    answer = published_calls_ours.caller.run("call", published_calls_ours.agent("closed"))
    assert "closed" == answer["text"]


@pytest.mark.parametrize(
    ("verb", "agent", "suffix"),
    [
        ("call", "count", "is streaming-only. Use stream() instead"),
        ("stream", "echo", "does not support streaming. Use call() instead"),
        ("stream", "where", "does not support streaming. Use call() instead"),
    ],
)
def test_the_wrong_verb_is_rejected(pair: Pair, verb: str, agent: str, suffix: str) -> None:
    """The caller recognizes streamers by the other SDK's catalog; both SDKs raise the same message."""
    name = pair.agent(agent)
    with pytest.raises(CommandFailed) as caught:
        pair.caller.start(verb, name, {"text": "x", "upto": 1}).items()
    assert ("InvocationMismatch", "invocation_mismatch") == (caught.value.type, caught.value.code)
    assert f"Agent '{name}' {suffix}" == caught.value.message
