"""The contract document, the catalog's lines, and which verb an agent takes."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from openagentmesh import AgentContract, AgentSpec, CatalogEntry, InvocationMismatch, MeshError
from openagentmesh.protocol.contract import Verb, decode_catalog, encode_catalog

IN = {"type": "object", "properties": {"text": {"type": "string"}}}
OUT = {"type": "string"}
_BEGAN = datetime.now(UTC)
SPEC = AgentSpec(name="nlp.a", description="Does a.", tags=["x", "y"], version="2.0.0")


def contract(
    *,
    invocable: bool = True,
    streaming: bool = False,
    takes: dict[str, Any] | None = IN,
    output: dict[str, Any] | None = None,
    chunk: dict[str, Any] | None = None,
) -> AgentContract:
    return AgentContract.declare(
        SPEC,
        invocable=invocable,
        streaming=streaming,
        input_schema=takes,
        output_schema=output,
        chunk_schema=chunk,
    )


@pytest.mark.parametrize(
    ("made", "streaming", "schemas", "own"),
    [
        (contract(output=OUT), False, {"inputSchema": IN, "outputSchema": OUT}, {}),
        (contract(), False, {"inputSchema": IN}, {}),
        (contract(takes=None, output=OUT), False, {"outputSchema": OUT}, {}),
        (contract(streaming=True, chunk=OUT), True, {"inputSchema": IN}, {"chunk_schema": OUT}),
        (contract(output={}), False, {"inputSchema": IN, "outputSchema": {}}, {}),
    ],
    ids=["responder", "no-output", "trigger", "streamer", "any-output"],
)
def test_the_document_is_the_protocols(
    made: AgentContract, schemas: dict[str, Any], own: dict[str, Any], *, streaming: bool
) -> None:
    """The published document has the keys of protocol §4 and no others; what is not there is left out."""
    document = json.loads(made.to_registry_json())
    registered = document["x-agentmesh"].pop("registered_at")
    assert {
        "name": "nlp.a",
        "description": "Does a.",
        "version": "2.0.0",
        "capabilities": {"streaming": streaming, "invocable": True},
        "skills": [{"id": "nlp.a", "name": "nlp.a", "description": "Does a.", "tags": ["x", "y"], **schemas}],
        "x-agentmesh": {"subject": "mesh.agent.nlp.a", "tags": ["x", "y"], **own},
    } == document
    assert registered.endswith("+00:00")
    assert _BEGAN <= datetime.fromisoformat(registered) <= datetime.now(UTC)


@pytest.mark.parametrize("mcp", [True, False, {"name": "tool"}])
def test_mcp_is_published_when_it_is_set(mcp: dict[str, Any] | bool) -> None:
    """`x-agentmesh.mcp` carries what was set, False included, and comes back."""
    made = contract().model_copy(update={"mcp": mcp})
    assert mcp == made.to_document()["x-agentmesh"]["mcp"]
    assert mcp == AgentContract.from_document(made.to_registry_json().encode()).mcp


@pytest.mark.parametrize(
    "made", [contract(output=OUT), contract(streaming=True, chunk=OUT), contract(takes=None)]
)
def test_a_contract_is_read_as_it_was_published(made: AgentContract) -> None:
    """Writing and reading a contract loses nothing."""
    assert made.model_dump() == AgentContract.from_document(made.to_registry_json().encode()).model_dump()


def test_missing_keys_have_the_protocols_defaults() -> None:
    """A document of a name alone is an invocable agent that does not stream."""
    read = AgentContract.from_document(b'{"name":"a.b"}')
    assert (True, False, "mesh.agent.a.b", "0.1.0", "", [], None, None, None, None) == (
        read.invocable,
        read.streaming,
        read.subject,
        read.version,
        read.description,
        read.tags,
        read.input_schema,
        read.output_schema,
        read.chunk_schema,
        read.mcp,
    )


@pytest.mark.parametrize(
    ("capabilities", "invocable", "streaming"),
    [({}, True, False), ({"streaming": True}, True, True), ({"invocable": False}, False, False)],
)
def test_a_missing_capability_has_its_default(
    capabilities: dict[str, bool], *, invocable: bool, streaming: bool
) -> None:
    """Each capability is defaulted by itself."""
    read = AgentContract.from_document(json.dumps({"name": "a", "capabilities": capabilities}).encode())
    assert (invocable, streaming) == (read.invocable, read.streaming)


def test_unknown_keys_are_ignored() -> None:
    """A newer peer's keys, at every level, are no reason to fail."""
    document = contract(output=OUT).to_document()
    for level in (document, document["capabilities"], document["skills"][0], document["x-agentmesh"]):
        level["of-tomorrow"] = {"x": [1]}
    read = AgentContract.from_document(json.dumps(document).encode())
    assert ("nlp.a", IN, OUT, ["x", "y"]) == (read.name, read.input_schema, read.output_schema, read.tags)


def test_tags_are_found_on_the_skill_too() -> None:
    """A peer that writes tags only on the skill has tags."""
    read = AgentContract.from_document(b'{"name":"a","skills":[{"tags":["t"]}]}')
    assert ["t"] == read.tags


@pytest.mark.parametrize(
    "document",
    [
        b"", b"oops", b"[]", b"null", b"5", b"{}", b'{"name":5}', b'{"name":"a","skills":{"a":1}}',
        b'{"name":"a","skills":[5]}', b'{"name":"a","capabilities":[1]}', b'{"name":"a","x-agentmesh":"x"}',
        b'{"name":"a","tags":5,"skills":[{"tags":5}]}', b'{"name":"a","x-agentmesh":{"registered_at":"x"}}',
        b"\xff", b"[" * 2000, b'{"name":"a","x-agentmesh":{"registered_at":1e400}}',
    ],
)  # fmt: skip
def test_what_is_no_contract_is_a_mesh_error_that_shows_it(document: bytes) -> None:
    """A peer's broken document is a MeshError with its beginning."""
    with pytest.raises(MeshError, match="malformed contract") as caught:
        AgentContract.from_document(document)
    assert repr(document[:120]) in caught.value.message


PUBLISHER = "is a publisher and cannot be {}. Subscribe to its events instead"
TASK = "is a background task and cannot be {}"
# what an agent is: invocable, streaming
SHAPES = {
    "responder": (True, False),
    "streamer": (True, True),
    "publisher": (False, True),
    "watcher": (False, False),
}


@pytest.mark.parametrize(
    ("verb", "shape", "suffix"),
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
def test_a_wrong_verb_is_refused_in_the_protocols_words(verb: Verb, shape: str, suffix: str) -> None:
    """Tools match on these texts, so each is exactly that of protocol §7."""
    invocable, streaming = SHAPES[shape]
    with pytest.raises(InvocationMismatch) as caught:
        contract(invocable=invocable, streaming=streaming).check_verb(verb)
    assert (f"Agent 'nlp.a' {suffix}", "nlp.a") == (caught.value.message, caught.value.agent)


@pytest.mark.parametrize(
    ("verb", "shape"),
    [
        ("call", "responder"),
        ("stream", "streamer"),
        ("send", "responder"),
        ("send", "streamer"),
        ("subscribe", "publisher"),
    ],
)
def test_the_right_verb_passes(verb: Verb, shape: str) -> None:
    """Each shape has its verbs, and they raise nothing."""
    invocable, streaming = SHAPES[shape]
    contract(invocable=invocable, streaming=streaming).check_verb(verb)


def test_a_catalog_entry_has_exactly_the_protocols_keys() -> None:
    """Name, description, version, tags, invocable, streaming: an entry is these six."""
    expected = {
        "name": "nlp.a", "description": "Does a.", "version": "2.0.0", "tags": ["x", "y"],
        "invocable": True, "streaming": True,
    }  # fmt: skip
    entries = encode_catalog([contract(streaming=True).to_catalog_entry().model_dump()])
    assert [expected] == json.loads(entries)


def test_a_document_is_json_that_everybody_reads() -> None:
    """A default of NaN in a schema is not published as `NaN`, which is no JSON."""
    document = contract(takes=IN | {"default": math.nan}).to_registry_json()
    assert "NaN" not in document
    assert document == json.dumps(json.loads(document), separators=(",", ":"))


def test_an_empty_catalog_is_an_array() -> None:
    """Without agents the key holds `[]`."""
    assert b"[]" == encode_catalog([])


@pytest.mark.parametrize(
    "document", [None, b"", b"[]", b"{}", b"oops", b"null", b"\xff", b"[" * 2000, b"[5]"]
)
def test_a_catalog_that_is_none_has_no_entries(document: bytes | None) -> None:
    """Whatever stands in the catalog's key, reading it gives a list."""
    assert [] == decode_catalog(document)


def test_one_bad_catalog_entry_does_not_hide_the_others() -> None:
    """What is no entry is left out, and the rest stays, in order, with defaults for missing keys."""
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
