"""What the published SDK and ours read of each other's agents (protocol §3, §4)."""

from typing import Any

import pytest

from tests.support.peers import CommandFailed, Pair, Peer

TEXT = {
    "title": "Text",
    "type": "object",
    "properties": {
        "text": {"title": "Text", "type": "string"},
        "times": {"default": 1, "title": "Times", "type": "integer"},
    },
    "required": ["text"],
}
NUMBER = {
    "title": "Number",
    "type": "object",
    "properties": {"number": {"title": "Number", "type": "integer"}},
    "required": ["number"],
}


def names(entries: list[dict[str, Any]], pair: Pair) -> list[str]:
    return [entry["name"].removeprefix(f"{pair.channel}.") for entry in entries]


def test_the_catalog_lists_each_agent_with_its_shape(pair: Pair) -> None:
    """An entry has name, description, version, tags and what the agent can do."""
    entries = {entry["name"]: entry for entry in pair.caller.run("catalog", channel=pair.channel)}
    assert {
        "name": pair.agent("echo"),
        "description": "Says it again.",
        "version": "1.2.3",
        "tags": ["text", "fast"],
        "invocable": True,
        "streaming": False,
    } == entries[pair.agent("echo")]
    count, where = entries[pair.agent("count")], entries[pair.agent("where")]
    assert (True, True) == (count["invocable"], count["streaming"])
    assert (True, False) == (where["invocable"], where["streaming"])


def test_both_catalogs_are_the_same(pairs: dict[str, Pair], stock: Peer, ours: Peer) -> None:
    """Both SDKs list the same agents of both channels, in the order they were declared."""
    order = ["echo", "length", "nothing", "where", "fail", "quota", "note", "noted", "hang"]
    order += ["count", "endless", "left"]
    for pair in pairs.values():
        for peer in (stock, ours):
            found = names(peer.run("catalog", channel=pair.channel), pair)
            assert order == [name for name in found if name in order]


def test_the_catalog_by_tags(pair: Pair) -> None:
    """An agent has to have all tags that are asked for."""
    ask = pair.caller.run
    assert ["echo", "length"] == names(ask("catalog", channel=pair.channel, tags=["text"]), pair)
    assert ["echo"] == names(ask("catalog", channel=pair.channel, tags=["fast", "text"]), pair)
    assert [] == ask("catalog", channel=pair.channel, tags=["fast", "numbers"])


def test_the_catalog_by_shape(pair: Pair) -> None:
    """Streamers are told from the others."""
    found = pair.caller.run("catalog", channel=pair.channel, streaming=True, invocable=True)
    assert ["count", "endless"] == names(found, pair)


def test_a_contract(pair: Pair) -> None:
    """A contract read from the registry has the schemas as pydantic makes them, and the subject."""
    contract = pair.caller.run("contract", pair.agent("echo"))
    [skill] = contract["skills"]
    assert (TEXT, TEXT) == (skill["inputSchema"], skill["outputSchema"])
    assert f"mesh.agent.{pair.agent('echo')}" == contract["subject"]
    assert ("Says it again.", "1.2.3", ["text", "fast"]) == (
        contract["description"],
        contract["version"],
        contract["tags"],
    )
    assert (True, False) == (contract["invocable"], contract["streaming"])


def test_the_contract_of_a_streamer(pair: Pair) -> None:
    """It has a chunk schema and no output schema."""
    contract = pair.caller.run("contract", pair.agent("count"))
    assert NUMBER == contract["chunk_schema"]
    assert (True, True) == (contract["invocable"], contract["streaming"])
    assert "outputSchema" not in contract["skills"][0]


def test_schemas_of_scalars_are_not_wrapped(pair: Pair) -> None:
    """`str` is `{"type": "string"}` and `int` is `{"type": "integer"}`, whoever published it."""
    [skill] = pair.caller.run("contract", pair.agent("length"))["skills"]
    assert ({"type": "string"}, {"type": "integer"}) == (skill["inputSchema"], skill["outputSchema"])


def test_an_agent_without_types_has_no_schemas(pair: Pair) -> None:
    """A trigger has no input schema, a handler that returns nothing no output schema."""
    [trigger] = pair.caller.run("contract", pair.agent("where"))["skills"]
    [silent] = pair.caller.run("contract", pair.agent("nothing"))["skills"]
    assert ("inputSchema" in trigger, "outputSchema" in silent) == (False, False)


def test_discover(pair: Pair) -> None:
    """`discover` gives the full contracts of what `catalog` lists, in its order."""
    listed = pair.caller.run("catalog", channel=pair.channel)
    contracts = pair.caller.run("discover", pair.channel)
    assert names(listed, pair) == names(contracts, pair)
    assert [TEXT] == [
        contract["skills"][0]["inputSchema"]
        for contract in contracts
        if contract["name"] == pair.agent("echo")
    ]


def test_the_contract_of_nobody(stock: Peer, ours: Peer, name: str) -> None:
    """A name that nobody registered is `not_found` on both sides."""
    for peer in (stock, ours):
        with pytest.raises(CommandFailed) as caught:
            peer.run("contract", name)
        assert "not_found" == caught.value.code
