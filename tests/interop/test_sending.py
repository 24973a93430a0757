"""`send` between the published SDK and ours, without a reply and with callbacks (protocol §7)."""

import re

import pytest

from tests.support.peers import CommandFailed, Pair, repeat_until_received


def test_a_send_without_a_reply_subject_runs_the_handler(pair: Pair) -> None:
    """Without a reply subject the handler runs, and `send` returns None."""
    assert pair.caller.run("send", pair.agent("store"), {"text": "remember"}) is None
    assert "remember" == pair.caller.run("call", pair.agent("stored"))["text"]


def test_the_reply_is_sent_to_the_reply_subject(pair: Pair, name: str) -> None:
    """With `reply_to` the reply is sent to that subject."""
    answers = pair.caller.start("subscribe", subject=f"answers.{name}")
    repeat_until_received(
        answers, lambda: pair.caller.run("send", pair.agent("echo"), {"text": "ja"}, f"answers.{name}")
    )
    assert {"text": "ja", "times": 1} == answers.item()
    answers.stop()


def test_on_reply_is_called_with_the_reply(pair: Pair) -> None:
    """`on_reply` is called with the reply."""
    replies = pair.caller.start("send_with_callbacks", pair.agent("echo"), {"text": "ja"}, timeout=20)
    assert {"reply": {"text": "ja", "times": 1}} == replies.item()
    replies.stop()


@pytest.mark.parametrize(
    ("agent", "code", "message"),
    [("fail", "handler_error", "no wine today"), ("quota", "quota_used_up", "Try again tomorrow")],
)
def test_on_error_is_called_with_the_error_of_the_handler(
    pair: Pair, agent: str, code: str, message: str
) -> None:
    """`on_error` is called with the error that the handler raised."""
    replies = pair.caller.start("send_with_callbacks", pair.agent(agent), {"text": "wine"}, timeout=20)
    error = replies.item()["error"]
    assert (code, message, pair.agent(agent)) == (error["code"], error["message"], error["agent"])
    replies.stop()


def test_on_error_is_called_with_a_timeout_without_a_reply(pair: Pair) -> None:
    """`on_error` is called with a MeshTimeout that names the reply subject."""
    replies = pair.caller.start("send_with_callbacks", pair.agent("hang"), {"text": ""}, timeout=0.2)
    error = replies.item()["error"]
    assert ("MeshTimeout", "timeout") == (error["type"], error["code"])
    assert re.fullmatch(r"No message on mesh\.results\.[0-9a-f]{32} within 0\.2s", error["message"])
    replies.stop()


def test_our_callbacks_are_called_once(ours_calls_published: Pair) -> None:
    """After the reply, `on_error` is not called with a timeout, as it is in the published SDK."""
    caller, agent = ours_calls_published.caller, ours_calls_published.agent
    replies = caller.start("send_with_callbacks", agent("echo"), {"text": "ja"}, timeout=1.0)
    assert "reply" in replies.item()
    # The timeout of the first send would have been reported before that of the second one.
    late = caller.start("send_with_callbacks", agent("hang"), {"text": ""}, timeout=1.2)
    assert "timeout" == late.item()["error"]["code"]
    assert replies.messages.empty()
    replies.stop()
    late.stop()


def test_a_published_callback_is_called_with_each_chunk(published_calls_ours: Pair) -> None:
    """Our streamer calls `on_reply` of a published caller with each chunk, and then ends."""
    caller, agent = published_calls_ours.caller, published_calls_ours.agent
    replies = caller.start("send_with_callbacks", agent("count"), {"upto": 3}, timeout=1.0)
    assert [0, 1, 2] == [replies.item()["reply"]["number"] for _ in range(3)]
    # Without the end, the timeout of the first send would have been reported before that of the second one.
    late = caller.start("send_with_callbacks", agent("hang"), {"text": ""}, timeout=1.2)
    assert "timeout" == late.item()["error"]["code"]
    assert replies.messages.empty()
    replies.stop()
    late.stop()


def test_our_callback_is_called_with_the_refusal_of_a_published_streamer(ours_calls_published: Pair) -> None:
    """The published host streams only to `stream`, and `on_error` of our caller gets its message."""
    name = ours_calls_published.agent("count")
    replies = ours_calls_published.caller.start("send_with_callbacks", name, {"upto": 3}, timeout=20)
    error = replies.item()["error"]
    assert "invocation_mismatch" == error["code"]
    assert f"Agent '{name}' is streaming-only. Use stream() instead" == error["message"]
    replies.stop()


@pytest.mark.usefixtures("publishers")
def test_a_send_to_a_publisher_is_rejected(pair: Pair) -> None:
    """The caller recognizes the publisher by the other SDK's catalog, and rejects the send."""
    name = pair.agent("feed.clock")
    with pytest.raises(CommandFailed) as caught:
        pair.caller.run("send", name, {})
    assert "InvocationMismatch" == caught.value.type
    text = "is a publisher and cannot be sent to. Subscribe to its events instead"
    assert f"Agent '{name}' {text}" == caught.value.message
