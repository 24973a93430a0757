"""Every name on the wire, and which names an agent may have."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openagentmesh.protocol import subjects


@pytest.mark.parametrize(
    "name", ["a", "nlp.summarizer", "A-1_b.C.d", "events", "x.events.y", "global.x", "0", "a" * 255]
)
def test_a_name_of_plain_segments_is_accepted(name: str) -> None:
    """Letters, digits, `_` and `-` in segments joined by single dots make a name."""
    assert subjects.invalid_name(name) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", ".a", "a.", "a..b", "a b", "a\n", "a*", ">", "a.>", "a/b", "naïve", "\u0661", "a$", "a\x00"],
)
def test_a_name_that_breaks_a_subject_is_refused(name: str) -> None:
    """What is empty, a wildcard, white space or not ASCII is refused, and the reason shows a name."""
    assert "nlp.summarizer" in str(subjects.invalid_name(name))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("global", "'global' is the key of the mesh-wide observability settings"),
        ("x.events", "the suffix '.events' is reserved for the events of publishers"),
        ("a.b.events", "the suffix '.events' is reserved for the events of publishers"),
        ("a" * 256, "a name has at most 255 characters, this one has 256"),
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, why: str) -> None:
    """`global`, `x.events` and names too long for a subject are refused with the reason."""
    assert why == subjects.invalid_name(name)


@given(st.text(max_size=20) | st.from_regex(r"[A-Za-z0-9_.\-]{0,12}", fullmatch=True))
def test_an_accepted_name_is_always_a_subjects_tail(name: str) -> None:
    """Whatever is accepted has only whole segments of the allowed characters."""
    fits = all(re.fullmatch(r"[A-Za-z0-9_-]+", part, re.ASCII) for part in name.split("."))
    reserved = name == "global" or name.endswith(".events")
    assert (fits and not reserved) == (subjects.invalid_name(name) is None)


def test_subjects_and_groups_are_the_protocols() -> None:
    """Peers of other makes find each other by these very strings."""
    assert [
        "mesh.agent.a.b",
        "q.a.b",
        "mesh.stream.r1",
        "mesh.errors.a.b",
        "mesh.death.a.b",
        "mesh.death.>",
        "mesh.host.i1.ping",
    ] == [
        subjects.agent("a.b"),
        subjects.queue_group("a.b"),
        subjects.stream("r1"),
        subjects.errors("a.b"),
        subjects.death("a.b"),
        subjects.DEATHS,
        subjects.host("i1", "ping"),
    ]


def test_buckets_are_the_protocols() -> None:
    """The five KV buckets and the catalog's key have the names that stock peers open."""
    expected = {"mesh-catalog", "mesh-registry", "mesh-instances", "mesh-observability", "mesh-context"}
    assert expected == set(subjects.KV_BUCKETS)
    assert "catalog" == subjects.CATALOG_KEY


@pytest.mark.parametrize(
    ("name", "channel", "inside"),
    [
        ("nlp", "nlp", True),
        ("nlp.a", "nlp", True),
        ("nlp.a.b", "nlp", True),
        ("nlp.a.b", "nlp.a", True),
        ("nlpx", "nlp", False),
        ("x.nlp", "nlp", False),
        ("nlp", "nlp.a", False),
    ],
)
def test_a_channel_holds_itself_and_what_lies_below(name: str, channel: str, *, inside: bool) -> None:
    """A channel's members are cut at segments, never in the middle of one."""
    assert inside == subjects.in_channel(name, channel)


@pytest.mark.parametrize(
    ("text", "fits"),
    [("0af", True), ("a-b_C", True), ("x" * 128, True), ("x" * 129, False), ("", False)]
    + [(text, False) for text in ("a.b", "*", ">", "a b", "a\n", "é")],
)
def test_a_token_stands_between_two_dots(text: str, *, fits: bool) -> None:
    """Dots, wildcards and spaces never get into a subject through an id."""
    assert fits == subjects.is_token(text)
