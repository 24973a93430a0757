"""Publishers of one SDK, heard by the other (protocol §7)."""

import pytest

from tests.support.peers import CommandFailed, Pair, Peer, repeat_until_received

pytestmark = pytest.mark.usefixtures("publishers")


def test_a_feed_of_one_agent(pair: Pair) -> None:
    """Every event comes, in order, to the end; when the publisher ends, so does the feed."""
    feed = pair.caller.start("subscribe", agent=pair.agent("ticks"))
    first = feed.item()
    assert "now" == pair.caller.run("call", pair.agent("finish"), "now")
    events = [first, *feed.items()]
    numbers = range(first["number"], first["number"] + len(events))
    assert list(numbers) == [event["number"] for event in events]
    assert [False] * (len(events) - 1) + [True] == [event["last"] for event in events]


def test_a_publisher_that_fails(pair: Pair) -> None:
    """Its exception is raised where its events are heard."""
    feed = pair.caller.start("subscribe", agent=pair.agent("fragile"))
    feed.item()
    pair.caller.run("call", pair.agent("break"), "now")
    with pytest.raises(CommandFailed, match="broken") as caught:
        feed.items()
    assert ("handler_error", pair.agent("fragile")) == (caught.value.code, caught.value.agent)


def test_a_feed_of_a_channel(pair: Pair) -> None:
    """The events of the agents below a channel come, in the order of each publisher."""
    feed = pair.caller.start("subscribe", channel=pair.agent("feed"))
    events = [feed.item() for _ in range(12)]
    first = events[0]["number"]
    assert list(range(first, first + 12)) == [event["number"] for event in events]
    feed.stop()


def test_requests_are_no_events_to_ours(ours_calls_stock: Pair) -> None:
    """Requests pass where a channel's events do; ours leaves them out, the published SDK does not."""
    caller, agent = ours_calls_stock.caller, ours_calls_stock.agent
    feed = caller.start("subscribe", channel=agent("feed"))
    feed.item()
    for _ in range(3):
        assert "no event" == caller.run("call", agent("feed.mark"), "no event")
    events = [feed.item() for _ in range(12)]
    assert [{"number", "last"}] * 12 == [set(event) for event in events]
    feed.stop()


def test_the_catalog_tells_publishers(pair: Pair) -> None:
    """A publisher streams and cannot be invoked; its contract says what it emits."""
    found = pair.caller.run("catalog", channel=pair.channel, streaming=True, invocable=False)
    names = [pair.agent(name) for name in ("feed.clock", "ticks", "fragile")]
    assert names == [entry["name"] for entry in found]
    contract = pair.caller.run("contract", names[0])
    assert (False, True) == (contract["invocable"], contract["streaming"])
    assert {"number", "last"} == set(contract["chunk_schema"]["properties"])


@pytest.mark.parametrize(
    ("verb", "agent", "suffix"),
    [
        ("call", "feed.clock", "is a publisher and cannot be called. Subscribe to its events instead"),
        ("stream", "feed.clock", "is a publisher and cannot be streamed. Subscribe to its events instead"),
        ("subscribe", "count", "streams responses to requests. Use stream() instead"),
        ("subscribe", "echo", "does not publish events. Use call() instead"),
    ],
)
def test_the_wrong_verb(pair: Pair, verb: str, agent: str, suffix: str) -> None:
    """The caller knows publishers from the other SDK's catalog, and says the same text."""
    name = pair.agent(agent)
    asked = (
        pair.caller.start(verb, agent=name) if verb == "subscribe" else pair.caller.start(verb, name, None)
    )
    with pytest.raises(CommandFailed) as caught:
        asked.items()
    assert ("InvocationMismatch", f"Agent '{name}' {suffix}") == (caught.value.type, caught.value.message)


def test_what_ours_publishes_on_a_subject(stock: Peer, ours: Peer, name: str) -> None:
    """JSON that ours publishes on any subject reaches a stock subscriber of it."""
    feed = stock.start("subscribe", subject=f"news.{name}")
    repeat_until_received(feed, lambda: ours.run("publish", f"news.{name}", '{"headline": "ja"}'))
    assert {"headline": "ja"} == feed.item()
    feed.stop()
