"""What commands tell of the agents on the mesh."""

from tests.support.commands import Up

SUMMARIZER = "nlp.summarizer  0.1.0  call    Summarizes text to a target length."


def test_a_stream_is_a_line_a_chunk(hosted: Up) -> None:
    """`agent stream` prints each chunk as a line of JSON; its input may be an argument."""
    result = hosted.run("agent", "stream", "time.ticker", '{"count": 3, "every": 0}')
    assert (0, "") == (result.code, result.err)
    assert ['{"number": 0', '{"number": 1', '{"number": 2'] == [
        line.partition(",")[0] for line in result.out.splitlines()
    ]


def test_the_catalog_for_people(hosted: Up) -> None:
    """`mesh catalog` is a line an agent with version and kind; `--channel` keeps what lies in it."""
    whole, channel = hosted.run_all(("mesh", "catalog"), ("mesh", "catalog", "--channel", "time"))
    lines = whole.out.splitlines()
    assert 7 == len(lines)
    assert [SUMMARIZER] == [line[: len(SUMMARIZER)] for line in lines if line.startswith("nlp.")]
    [only] = channel.out.splitlines()
    assert ["time.ticker", "0.1.0", "stream"] == only.split()[:3]


def test_the_catalog_for_programs(hosted: Up) -> None:
    """`mesh catalog --json` is a list of entries, of nothing where a channel is empty."""
    catalog = "mesh", "catalog", "--json", "--channel"
    channel, empty = hosted.run_all((*catalog, "nlp"), (*catalog, "nlp.summ"))
    [entry] = channel.json
    assert ("nlp.summarizer", ["text"], True, False) == tuple(
        entry[key] for key in ("name", "tags", "invocable", "streaming")
    )
    assert [] == empty.json


def test_a_contract(hosted: Up) -> None:
    """`agent contract` is the published document as JSON; with `--text` its fields with their defaults."""
    contract = "agent", "contract", "nlp.summarizer"
    for_programs, for_people = hosted.run_all(contract, (*contract, "--text"))
    document = for_programs.json
    assert ("nlp.summarizer", "0.1.0") == (document["name"], document["version"])
    text = for_people.out
    assert text.startswith("nlp.summarizer 0.1.0 (responder)\n")
    assert "input:\n  text: string\n  max_length: integer = 200\n" in text
    assert "output:\n  summary: string\n" in text
