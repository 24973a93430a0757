"""Events of publishers of one SDK, received by the other SDK (protocol §7)."""

import pytest

from tests.support.peers import CommandFailed, Pair, Peer, repeat_until_received

pytestmark = pytest.mark.usefixtures("publishers")


def test_a_subscription_to_an_agent_receives_all_events(pair: Pair) -> None:
    """Every event arrives in order, and the subscription ends when the publisher ends."""
    feed = pair.caller.start("subscribe", agent=pair.agent("ticks"))
    first = feed.item()
    assert "now" == pair.caller.run("call", pair.agent("finish"), "now")
    events = [first, *feed.items()]
    numbers = range(first["number"], first["number"] + len(events))
    assert list(numbers) == [event["number"] for event in events]
    assert [False] * (len(events) - 1) + [True] == [event["last"] for event in events]


def test_the_exception_of_a_publisher_is_raised_at_the_subscriber(pair: Pair) -> None:
    """When a publisher fails, its exception is raised at the subscriber as `handler_error`."""
    feed = pair.caller.start("subscribe", agent=pair.agent("fragile"))
    feed.item()
    pair.caller.run("call", pair.agent("break"), "now")
    with pytest.raises(CommandFailed, match="broken") as caught:
        feed.items()
    assert ("handler_error", pair.agent("fragile")) == (caught.value.code, caught.value.agent)


def test_a_subscription_to_a_channel_receives_events_in_order(pair: Pair) -> None:
    """Events of the agents below a channel arrive in the order of each publisher."""
    feed = pair.caller.start("subscribe", channel=pair.agent("feed"))
    events = [feed.item() for _ in range(12)]
    first = events[0]["number"]
    assert list(range(first, first + 12)) == [event["number"] for event in events]
    feed.stop()


def test_a_channel_subscription_of_ours_ignores_requests(ours_calls_published: Pair) -> None:
    """Requests match the subject of a channel's events; ours ignores them, the published SDK does not."""
    caller, agent = ours_calls_published.caller, ours_calls_published.agent
    feed = caller.start("subscribe", channel=agent("feed"))
    feed.item()
    for _ in range(3):
        assert "no event" == caller.run("call", agent("feed.mark"), "no event")
    events = [feed.item() for _ in range(12)]
    assert [{"number", "last"}] * 12 == [set(event) for event in events]
    feed.stop()


def test_the_catalog_lists_publishers(pair: Pair) -> None:
    """A publisher streams and is not invocable; its contract has the schema of its events."""
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
def test_the_wrong_verb_for_a_publisher_is_rejected(pair: Pair, verb: str, agent: str, suffix: str) -> None:
    """The caller recognizes publishers by the other SDK's catalog; both SDKs raise the same message."""
    name = pair.agent(agent)
    command = (
        pair.caller.start(verb, agent=name) if verb == "subscribe" else pair.caller.start(verb, name, None)
    )
    with pytest.raises(CommandFailed) as caught:
        command.items()
    assert ("InvocationMismatch", f"Agent '{name}' {suffix}") == (caught.value.type, caught.value.message)


def test_ours_publishes_to_subscribers_of_the_published_sdk(published: Peer, ours: Peer, name: str) -> None:
    """JSON that ours publishes on any subject is received by a subscriber of the published SDK."""
    feed = published.start("subscribe", subject=f"news.{name}")
    repeat_until_received(feed, lambda: ours.run("publish", f"news.{name}", '{"headline": "ja"}'))
    assert {"headline": "ja"} == feed.item()
    feed.stop()
