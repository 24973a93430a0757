"""`send` between the published SDK and ours: nobody waits, or a callback does (protocol §7)."""

import re

import pytest

from tests.support.peers import CommandFailed, Pair, repeat_until_received


def test_fire_and_forget(pair: Pair) -> None:
    """Without a reply subject the handler runs, and nobody is told."""
    assert pair.caller.run("send", pair.agent("note"), {"text": "remember"}) is None
    assert "remember" == pair.caller.run("call", pair.agent("noted"))["text"]


def test_a_reply_subject_of_the_callers_choice(pair: Pair, name: str) -> None:
    """With `reply_to` the answer goes there."""
    answers = pair.caller.start("subscribe", subject=f"answers.{name}")
    repeat_until_received(
        answers, lambda: pair.caller.run("send", pair.agent("echo"), {"text": "ja"}, f"answers.{name}")
    )
    assert {"text": "ja", "times": 1} == answers.item()
    answers.stop()


def test_a_callback_hears_the_reply(pair: Pair) -> None:
    """`on_reply` is called with the answer."""
    heard = pair.caller.start("send_and_hear", pair.agent("echo"), {"text": "ja"}, timeout=20)
    assert {"reply": {"text": "ja", "times": 1}} == heard.item()
    heard.stop()


@pytest.mark.parametrize(
    ("agent", "code", "message"),
    [("fail", "handler_error", "no wine today"), ("quota", "quota_used_up", "Try again tomorrow")],
)
def test_a_callback_hears_an_error(pair: Pair, agent: str, code: str, message: str) -> None:
    """`on_error` is called with what the handler raised."""
    heard = pair.caller.start("send_and_hear", pair.agent(agent), {"text": "wine"}, timeout=20)
    error = heard.item()["error"]
    assert (code, message, pair.agent(agent)) == (error["code"], error["message"], error["agent"])
    heard.stop()


def test_a_callback_hears_that_no_reply_came(pair: Pair) -> None:
    """`on_error` is called with a MeshTimeout that names the reply subject."""
    heard = pair.caller.start("send_and_hear", pair.agent("hang"), {"text": ""}, timeout=0.2)
    error = heard.item()["error"]
    assert ("MeshTimeout", "timeout") == (error["type"], error["code"])
    assert re.fullmatch(r"No message on mesh\.results\.[0-9a-f]{32} within 0\.2s", error["message"])
    heard.stop()


def test_our_callback_hears_one_thing_only(ours_calls_stock: Pair) -> None:
    """After its reply there is no timeout too, as there is in the published SDK."""
    caller, agent = ours_calls_stock.caller, ours_calls_stock.agent
    heard = caller.start("send_and_hear", agent("echo"), {"text": "ja"}, timeout=1.0)
    assert "reply" in heard.item()
    # When the second runs out of time, the first would have done so long before.
    late = caller.start("send_and_hear", agent("hang"), {"text": ""}, timeout=1.2)
    assert "timeout" == late.item()["error"]["code"]
    assert heard.messages.empty()
    heard.stop()
    late.stop()


def test_a_stock_callback_hears_each_chunk(stock_calls_ours: Pair) -> None:
    """Our streamer that is sent to gives the callback chunk by chunk, and the end."""
    caller, agent = stock_calls_ours.caller, stock_calls_ours.agent
    heard = caller.start("send_and_hear", agent("count"), {"upto": 3}, timeout=1.0)
    assert [0, 1, 2] == [heard.item()["reply"]["number"] for _ in range(3)]
    # Without the end, it would have run out of time long before the second does.
    late = caller.start("send_and_hear", agent("hang"), {"text": ""}, timeout=1.2)
    assert "timeout" == late.item()["error"]["code"]
    assert heard.messages.empty()
    heard.stop()
    late.stop()


def test_our_callback_hears_that_a_stock_streamer_refuses(ours_calls_stock: Pair) -> None:
    """The published host streams only to `stream`, and our callback is told its text."""
    name = ours_calls_stock.agent("count")
    heard = ours_calls_stock.caller.start("send_and_hear", name, {"upto": 3}, timeout=20)
    error = heard.item()["error"]
    assert "invocation_mismatch" == error["code"]
    assert f"Agent '{name}' is streaming-only. Use stream() instead" == error["message"]
    heard.stop()


@pytest.mark.usefixtures("publishers")
def test_nothing_is_sent_to_a_publisher(pair: Pair) -> None:
    """The caller refuses it by the other SDK's catalog."""
    name = pair.agent("feed.clock")
    with pytest.raises(CommandFailed) as caught:
        pair.caller.run("send", name, {})
    assert "InvocationMismatch" == caught.value.type
    text = "is a publisher and cannot be sent to. Subscribe to its events instead"
    assert f"Agent '{name}' {text}" == caught.value.message
