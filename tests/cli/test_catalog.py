"""`oam mesh catalog` and `oam agent contract`: the published agents and their types."""

from tests.support.commands import Up

SUMMARIZER = "nlp.summarizer  0.1.0  call    Summarizes text to a target length."


def test_the_catalog_is_printed_as_a_line_per_agent(hosted: Up) -> None:
    """Each line has version and kind; with `--channel` only the agents in that channel are listed."""
    whole, channel = hosted.run_all(("mesh", "catalog"), ("mesh", "catalog", "--channel", "time"))
    lines = whole.out.splitlines()
    assert 7 == len(lines)
    assert [SUMMARIZER] == [line[: len(SUMMARIZER)] for line in lines if line.startswith("nlp.")]
    [only] = channel.out.splitlines()
    assert ["time.ticker", "0.1.0", "stream"] == only.split()[:3]


def test_the_catalog_is_printed_as_a_json_list(hosted: Up) -> None:
    """`mesh catalog --json` prints a list of entries, which is empty for a channel without agents."""
    catalog = "mesh", "catalog", "--json", "--channel"
    channel, empty = hosted.run_all((*catalog, "nlp"), (*catalog, "nlp.summ"))
    [entry] = channel.json
    assert ("nlp.summarizer", ["text"], True, False) == tuple(
        entry[key] for key in ("name", "tags", "invocable", "streaming")
    )
    assert [] == empty.json


def test_a_contract_is_printed_as_json_or_as_text(hosted: Up) -> None:
    """`agent contract` prints the published document; with `--text` the fields with their defaults."""
    contract = "agent", "contract", "nlp.summarizer"
    as_json, as_text = hosted.run_all(contract, (*contract, "--text"))
    document = as_json.json
    assert ("nlp.summarizer", "0.1.0") == (document["name"], document["version"])
    text = as_text.out
    assert text.startswith("nlp.summarizer 0.1.0 (responder)\n")
    assert "input:\n  text: string\n  max_length: integer = 200\n" in text
    assert "output:\n  summary: string\n" in text
