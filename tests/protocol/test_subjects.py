"""Subjects and buckets, and the validation of names, keys, patterns and tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openagentmesh.protocol import subjects


@pytest.mark.parametrize(
    "name", ["a", "nlp.summarizer", "A-1_b.C.d", "events", "x.events.y", "global.x", "0", "a" * 255]
)
def test_a_valid_name_is_accepted(name: str) -> None:
    """A name is made of segments of letters, digits, `_` and `-`, joined by single dots."""
    assert subjects.invalid_name(name) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", ".a", "a.", "a..b", "a b", "a\n", "a*", ">", "a.>", "a/b", "naïve", "\u0661", "a$", "a\x00"],
)
def test_a_malformed_name_is_rejected(name: str) -> None:
    """Empty segments, wildcards, white space and other characters are rejected with an example of a name."""
    assert "nlp.summarizer" in str(subjects.invalid_name(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("global", "'global' is the key of the mesh-wide observability settings"),
        ("x.events", "the suffix '.events' is reserved for the events of publishers"),
        ("a.b.events", "the suffix '.events' is reserved for the events of publishers"),
        ("a" * 256, "a name has at most 255 characters, this one has 256"),
    ],
)
def test_a_reserved_or_too_long_name_is_rejected(name: str, reason: str) -> None:
    """`global`, `x.events` and names that are too long for a subject are rejected with the reason."""
    assert reason == subjects.invalid_name(name)


@given(st.text(max_size=20) | st.from_regex(r"[A-Za-z0-9_.\-]{0,12}", fullmatch=True))
def test_exactly_the_valid_names_are_accepted(name: str) -> None:
    """A name is accepted if all its segments have only the allowed characters and it is not reserved."""
    is_valid = all(re.fullmatch(r"[A-Za-z0-9_-]+", part, re.ASCII) for part in name.split("."))
    is_reserved = name == "global" or name.endswith(".events")
    assert (is_valid and not is_reserved) == (subjects.invalid_name(name) is None)


def test_subjects_and_queue_groups_are_those_of_the_protocol() -> None:
    """Subjects and queue groups are the strings that other implementations use."""
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


def test_buckets_are_those_of_the_protocol() -> None:
    """The five KV buckets and the catalog's key have the names that other implementations open."""
    expected = {"mesh-catalog", "mesh-registry", "mesh-instances", "mesh-observability", "mesh-context"}
    assert expected == set(subjects.KV_BUCKETS)
    assert "catalog" == subjects.CATALOG_KEY


@pytest.mark.parametrize(
    ("name", "channel", "is_inside"),
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
def test_a_channel_contains_its_own_name_and_all_names_below(
    name: str, channel: str, *, is_inside: bool
) -> None:
    """A name is in a channel if its leading segments are those of the channel."""
    assert is_inside == subjects.in_channel(name, channel)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [("0af", True), ("a-b_C", True), ("x" * 128, True), ("x" * 129, False), ("", False)]
    + [(text, False) for text in ("a.b", "*", ">", "a b", "a\n", "é")],
)
def test_a_token_is_one_word_of_a_subject(text: str, *, is_valid: bool) -> None:
    """A token has at most 128 characters, and neither dots, wildcards nor white space."""
    assert is_valid == subjects.is_token(text)


@pytest.mark.parametrize(
    ("key", "as_key", "as_pattern"),
    [("a", True, True), ("a.b-c_d/e=", True, True), ("a.*", False, True), ("*.b.>", False, True)]
    + [(">", False, True), ("*", False, True)]
    + [(text, False, False) for text in ("", ".", "a.", "a..b", "a b", ">.a", ">.*", "a.>.*", "a*", "é")],
)
def test_wildcards_are_valid_in_patterns_only(key: str, *, as_key: bool, as_pattern: bool) -> None:
    """A key is words joined by single dots; a pattern may have `*` as a word and `>` at its end."""
    assert as_key == (subjects.invalid_key(key) is None)
    assert as_pattern == (subjects.invalid_key(key, pattern=True) is None)
