"""Catalogs and contracts: the published SDK and ours read those of each other's agents (protocol §3, §4)."""

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


def test_catalog_entries_have_all_fields(pair: Pair) -> None:
    """An entry has name, description, version, tags, and whether the agent is invocable and streams."""
    entries = {entry["name"]: entry for entry in pair.caller.run("catalog", channel=pair.channel)}
    assert {
        "name": pair.agent("echo"),
        "description": "Repeats a text.",
        "version": "1.2.3",
        "tags": ["text", "fast"],
        "invocable": True,
        "streaming": False,
    } == entries[pair.agent("echo")]
    count, where = entries[pair.agent("count")], entries[pair.agent("where")]
    assert (True, True) == (count["invocable"], count["streaming"])
    assert (True, False) == (where["invocable"], where["streaming"])


def test_both_sdks_list_the_same_agents(pairs: dict[str, Pair], published: Peer, ours: Peer) -> None:
    """Both SDKs list the same agents of both channels, in the order they were declared."""
    order = ["echo", "length", "nothing", "where", "fail", "quota", "store", "stored", "hang"]
    order += ["count", "endless", "closed"]
    for pair in pairs.values():
        for peer in (published, ours):
            found = names(peer.run("catalog", channel=pair.channel), pair)
            assert order == [name for name in found if name in order]


def test_the_catalog_is_filtered_by_tags(pair: Pair) -> None:
    """An agent is listed if it has all requested tags."""
    run = pair.caller.run
    assert ["echo", "length"] == names(run("catalog", channel=pair.channel, tags=["text"]), pair)
    assert ["echo"] == names(run("catalog", channel=pair.channel, tags=["fast", "text"]), pair)
    assert [] == run("catalog", channel=pair.channel, tags=["fast", "numbers"])


def test_the_catalog_is_filtered_by_kind(pair: Pair) -> None:
    """Invocable agents that stream are listed without all others."""
    found = pair.caller.run("catalog", channel=pair.channel, streaming=True, invocable=True)
    assert ["count", "endless"] == names(found, pair)


def test_a_contract_has_schemas_and_subject(pair: Pair) -> None:
    """A contract that is read from the registry has pydantic's schemas, and the agent's subject."""
    contract = pair.caller.run("contract", pair.agent("echo"))
    [skill] = contract["skills"]
    assert (TEXT, TEXT) == (skill["inputSchema"], skill["outputSchema"])
    assert f"mesh.agent.{pair.agent('echo')}" == contract["subject"]
    assert ("Repeats a text.", "1.2.3", ["text", "fast"]) == (
        contract["description"],
        contract["version"],
        contract["tags"],
    )
    assert (True, False) == (contract["invocable"], contract["streaming"])


def test_the_contract_of_a_streamer_has_a_chunk_schema(pair: Pair) -> None:
    """A streamer's contract has a chunk schema and no output schema."""
    contract = pair.caller.run("contract", pair.agent("count"))
    assert NUMBER == contract["chunk_schema"]
    assert (True, True) == (contract["invocable"], contract["streaming"])
    assert "outputSchema" not in contract["skills"][0]


def test_schemas_of_scalars_are_not_wrapped(pair: Pair) -> None:
    """`str` is `{"type": "string"}` and `int` is `{"type": "integer"}` in contracts of both SDKs."""
    [skill] = pair.caller.run("contract", pair.agent("length"))["skills"]
    assert ({"type": "string"}, {"type": "integer"}) == (skill["inputSchema"], skill["outputSchema"])


def test_an_agent_without_types_has_no_schemas(pair: Pair) -> None:
    """A trigger has no input schema, a handler that returns nothing no output schema."""
    [trigger] = pair.caller.run("contract", pair.agent("where"))["skills"]
    [without_output] = pair.caller.run("contract", pair.agent("nothing"))["skills"]
    assert ("inputSchema" in trigger, "outputSchema" in without_output) == (False, False)


def test_discover_returns_contracts_in_the_order_of_the_catalog(pair: Pair) -> None:
    """`discover` returns the full contracts of the agents that `catalog` lists, in its order."""
    listed = pair.caller.run("catalog", channel=pair.channel)
    contracts = pair.caller.run("discover", pair.channel)
    assert names(listed, pair) == names(contracts, pair)
    assert [TEXT] == [
        contract["skills"][0]["inputSchema"]
        for contract in contracts
        if contract["name"] == pair.agent("echo")
    ]


def test_the_contract_of_an_unknown_agent_is_not_found(published: Peer, ours: Peer, name: str) -> None:
    """`contract` of a name without an agent is `not_found` in both SDKs."""
    for peer in (published, ours):
        with pytest.raises(CommandFailed) as caught:
            peer.run("contract", name)
        assert "not_found" == caught.value.code
