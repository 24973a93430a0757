"""Contract documents, catalog entries, and the verbs that each kind of agent accepts."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from openagentmesh import AgentContract, AgentSpec, CatalogEntry, InvocationMismatch, MeshError
from openagentmesh.protocol.contract import Verb, decode_catalog, encode_catalog

INPUT = {"type": "object", "properties": {"text": {"type": "string"}}}
OUTPUT = {"type": "string"}
_START = datetime.now(UTC)
SPEC = AgentSpec(name="nlp.a", description="Does a.", tags=["x", "y"], version="2.0.0")


def contract(
    *,
    invocable: bool = True,
    streaming: bool = False,
    input_: dict[str, Any] | None = INPUT,
    output: dict[str, Any] | None = None,
    chunk: dict[str, Any] | None = None,
) -> AgentContract:
    return AgentContract.declare(
        SPEC,
        invocable=invocable,
        streaming=streaming,
        input_schema=input_,
        output_schema=output,
        chunk_schema=chunk,
    )


@pytest.mark.parametrize(
    ("declared", "streaming", "schemas", "extension"),
    [
        (contract(output=OUTPUT), False, {"inputSchema": INPUT, "outputSchema": OUTPUT}, {}),
        (contract(), False, {"inputSchema": INPUT}, {}),
        (contract(input_=None, output=OUTPUT), False, {"outputSchema": OUTPUT}, {}),
        (contract(streaming=True, chunk=OUTPUT), True, {"inputSchema": INPUT}, {"chunk_schema": OUTPUT}),
        (contract(output={}), False, {"inputSchema": INPUT, "outputSchema": {}}, {}),
    ],
    ids=["responder", "no-output", "trigger", "streamer", "any-output"],
)
def test_a_document_has_exactly_the_keys_of_the_protocol(
    declared: AgentContract, schemas: dict[str, Any], extension: dict[str, Any], *, streaming: bool
) -> None:
    """The published document has the keys of protocol §4 and no others; missing schemas are omitted."""
    document = json.loads(declared.to_registry_json())
    registered = document["x-agentmesh"].pop("registered_at")
    assert {
        "name": "nlp.a",
        "description": "Does a.",
        "version": "2.0.0",
        "capabilities": {"streaming": streaming, "invocable": True},
        "skills": [{"id": "nlp.a", "name": "nlp.a", "description": "Does a.", "tags": ["x", "y"], **schemas}],
        "x-agentmesh": {"subject": "mesh.agent.nlp.a", "tags": ["x", "y"], **extension},
    } == document
    assert registered.endswith("+00:00")
    assert _START <= datetime.fromisoformat(registered) <= datetime.now(UTC)


@pytest.mark.parametrize("mcp", [True, False, {"name": "tool"}])
def test_mcp_is_published_when_it_is_set(mcp: dict[str, Any] | bool) -> None:
    """`x-agentmesh.mcp` has the value, also False, and is decoded from the document."""
    declared = contract().model_copy(update={"mcp": mcp})
    assert mcp == declared.to_document()["x-agentmesh"]["mcp"]
    assert mcp == AgentContract.from_document(declared.to_registry_json().encode()).mcp


@pytest.mark.parametrize(
    "declared", [contract(output=OUTPUT), contract(streaming=True, chunk=OUTPUT), contract(input_=None)]
)
def test_a_contract_round_trips(declared: AgentContract) -> None:
    """A contract is decoded as it was encoded."""
    assert (
        declared.model_dump()
        == AgentContract.from_document(declared.to_registry_json().encode()).model_dump()
    )


def test_missing_keys_have_the_defaults_of_the_protocol() -> None:
    """A document with nothing but a name is an invocable agent that does not stream."""
    decoded = AgentContract.from_document(b'{"name":"a.b"}')
    assert (True, False, "mesh.agent.a.b", "0.1.0", "", [], None, None, None, None) == (
        decoded.invocable,
        decoded.streaming,
        decoded.subject,
        decoded.version,
        decoded.description,
        decoded.tags,
        decoded.input_schema,
        decoded.output_schema,
        decoded.chunk_schema,
        decoded.mcp,
    )


@pytest.mark.parametrize(
    ("capabilities", "invocable", "streaming"),
    [({}, True, False), ({"streaming": True}, True, True), ({"invocable": False}, False, False)],
)
def test_a_missing_capability_has_its_default(
    capabilities: dict[str, bool], *, invocable: bool, streaming: bool
) -> None:
    """Each capability has its own default."""
    decoded = AgentContract.from_document(json.dumps({"name": "a", "capabilities": capabilities}).encode())
    assert (invocable, streaming) == (decoded.invocable, decoded.streaming)


def test_unknown_keys_are_ignored() -> None:
    """Keys of later versions of the protocol are ignored, at every level."""
    document = contract(output=OUTPUT).to_document()
    for level in (document, document["capabilities"], document["skills"][0], document["x-agentmesh"]):
        level["unknown"] = {"x": [1]}
    decoded = AgentContract.from_document(json.dumps(document).encode())
    assert ("nlp.a", INPUT, OUTPUT, ["x", "y"]) == (
        decoded.name,
        decoded.input_schema,
        decoded.output_schema,
        decoded.tags,
    )


def test_tags_of_the_skill_are_decoded() -> None:
    """Tags are decoded also from a document that has them only in its skill."""
    decoded = AgentContract.from_document(b'{"name":"a","skills":[{"tags":["t"]}]}')
    assert ["t"] == decoded.tags


@pytest.mark.parametrize(
    "document",
    [
        b"", b"oops", b"[]", b"null", b"5", b"{}", b'{"name":5}', b'{"name":"a","skills":{"a":1}}',
        b'{"name":"a","skills":[5]}', b'{"name":"a","capabilities":[1]}', b'{"name":"a","x-agentmesh":"x"}',
        b'{"name":"a","tags":5,"skills":[{"tags":5}]}', b'{"name":"a","x-agentmesh":{"registered_at":"x"}}',
        b"\xff", b"[" * 2000, b'{"name":"a","x-agentmesh":{"registered_at":1e400}}',
    ],
)  # fmt: skip
def test_a_malformed_contract_is_quoted(document: bytes) -> None:
    """A malformed document raises a MeshError that quotes its beginning."""
    with pytest.raises(MeshError, match="malformed contract") as caught:
        AgentContract.from_document(document)
    assert repr(document[:120]) in caught.value.message


PUBLISHER = "is a publisher and cannot be {}. Subscribe to its events instead"
TASK = "is a background task and cannot be {}"
# For each kind of agent: whether it is invocable, and whether it streams.
KINDS = {
    "responder": (True, False),
    "streamer": (True, True),
    "publisher": (False, True),
    "watcher": (False, False),
}


@pytest.mark.parametrize(
    ("verb", "kind", "suffix"),
    [
        ("call", "publisher", PUBLISHER.format("called")),
        ("call", "watcher", TASK.format("called")),
        ("call", "streamer", "is streaming-only. Use stream() instead"),
        ("stream", "publisher", PUBLISHER.format("streamed")),
        ("stream", "watcher", TASK.format("streamed")),
        ("stream", "responder", "does not support streaming. Use call() instead"),
        ("send", "publisher", PUBLISHER.format("sent to")),
        ("send", "watcher", TASK.format("sent to")),
        ("subscribe", "streamer", "streams responses to requests. Use stream() instead"),
        ("subscribe", "responder", "does not publish events. Use call() instead"),
        ("subscribe", "watcher", "is a background task and does not publish events"),
    ],
)
def test_a_wrong_verb_is_rejected_with_the_text_of_the_protocol(verb: Verb, kind: str, suffix: str) -> None:
    """The error has exactly the text of protocol §7, since tools match these texts."""
    invocable, streaming = KINDS[kind]
    with pytest.raises(InvocationMismatch) as caught:
        contract(invocable=invocable, streaming=streaming).check_verb(verb)
    assert (f"Agent 'nlp.a' {suffix}", "nlp.a") == (caught.value.message, caught.value.agent)


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        ("call", "responder"),
        ("stream", "streamer"),
        ("send", "responder"),
        ("send", "streamer"),
        ("subscribe", "publisher"),
    ],
)
def test_a_matching_verb_is_accepted(verb: Verb, kind: str) -> None:
    """The verbs of each kind of agent raise no error."""
    invocable, streaming = KINDS[kind]
    contract(invocable=invocable, streaming=streaming).check_verb(verb)


def test_a_catalog_entry_has_exactly_the_keys_of_the_protocol() -> None:
    """An entry has name, description, version, tags, invocable and streaming, and no other key."""
    expected = {
        "name": "nlp.a", "description": "Does a.", "version": "2.0.0", "tags": ["x", "y"],
        "invocable": True, "streaming": True,
    }  # fmt: skip
    entries = encode_catalog([contract(streaming=True).to_catalog_entry().model_dump()])
    assert [expected] == json.loads(entries)


def test_a_document_is_strict_json() -> None:
    """A default of NaN in a schema is not published as `NaN`, which is not JSON."""
    document = contract(input_=INPUT | {"default": math.nan}).to_registry_json()
    assert "NaN" not in document
    assert document == json.dumps(json.loads(document), separators=(",", ":"))


def test_an_empty_catalog_is_an_array() -> None:
    """A catalog without agents is encoded as `[]`."""
    assert b"[]" == encode_catalog([])


@pytest.mark.parametrize(
    "document", [None, b"", b"[]", b"{}", b"oops", b"null", b"\xff", b"[" * 2000, b"[5]"]
)
def test_a_malformed_catalog_has_no_entries(document: bytes | None) -> None:
    """A missing, empty or malformed catalog is decoded as an empty list."""
    assert [] == decode_catalog(document)


def test_a_malformed_catalog_entry_is_skipped() -> None:
    """The other entries are decoded in order, with defaults for missing keys."""
    document = (
        b'[{"name":"a"},{"nome":"b"},5,null,{"name":"c","tags":5},{"name":"d","streaming":true,"new":1}]'
    )
    assert [CatalogEntry(name="a"), CatalogEntry(name="d", streaming=True)] == decode_catalog(document)
    assert (True, False, "0.1.0", []) == (
        CatalogEntry(name="a").invocable,
        CatalogEntry(name="a").streaming,
        CatalogEntry(name="a").version,
        CatalogEntry(name="a").tags,
    )
