"""`oam up` and `oam reload` when files change: the log lines, and the versions served."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Up, write_project

SAMPLE = "agents/summarizer.py"


def edit(host: Up, old: str, new: str) -> None:
    """Replace a text in the sample, in place."""
    path = host.folder / SAMPLE
    path.write_text(path.read_text().replace(old, new))


def catalog_version(host: Up) -> str:
    """The version of the only agent in the catalog."""
    [entry] = host.run("mesh", "catalog", "--json").json
    return str(entry["version"])


@pytest.fixture
def unwatched(tmp_path: Path) -> Iterator[Up]:
    """A host that does not watch its files."""
    with Up(write_project(tmp_path / "p", "summarizer"), "--no-reload") as host:
        yield host


def test_each_change_of_a_watched_file_is_logged(tmp_path: Path) -> None:
    """An edit, a syntax error with its place, its repair, a removal and a restore are a line each."""
    with Up(write_project(tmp_path / "p", "summarizer")) as host:
        source = (host.folder / SAMPLE).read_text()
        edit(host, 'tags=["text"]', 'tags=["text"], version="0.2.0"')
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer 0.1.0 → 0.2.0)")
        edit(host, "return Summ", "return return Summ")
        host.wait_for_line(f"reload refused: {SAMPLE}: SyntaxError: invalid syntax")
        host.wait_for_line("return return Summ")
        assert "^^^^^^" == host.wait_for_line("^^^^^^").strip()
        call, status = host.run_all(("agent", "call", "nlp.summarizer", '{"text": "still"}'), ("status",))
        assert '{"summary": "still"}\n' == call.out
        assert f"✗ {SAMPLE}: SyntaxError: invalid syntax (an older version serves)" in status.out
        edit(host, "return return Summ", "return Summ")
        host.wait_for_line(f"{SAMPLE}: file matches the running version again")
        (host.folder / SAMPLE).unlink()
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer withdrawn)")
        (host.folder / SAMPLE).write_text(source)
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer 0.1.0 new)")


def test_sighup_reloads_changed_files(unwatched: Up) -> None:
    """A host that does not watch its files loads the changed ones on SIGHUP, and logs when there are none."""
    edit(unwatched, 'tags=["text"]', 'version="0.2.0"')
    assert "0.1.0" == catalog_version(unwatched)
    unwatched.signal(signal.SIGHUP)
    unwatched.wait_for_line("0.1.0 → 0.2.0")
    unwatched.signal(signal.SIGHUP)
    unwatched.wait_for_line("nothing has changed on disk")


def test_the_reload_command_prints_the_result_of_each_host(unwatched: Up) -> None:
    """`oam reload` prints what each host loaded, as text or JSON, and fails when a host refused it."""
    unchanged = unwatched.run("reload")
    assert (0, "p: nothing has changed\n") == (unchanged.code, unchanged.err)
    edit(unwatched, 'tags=["text"]', 'version="0.2.0"')
    changed = unwatched.run("reload")
    assert 0 == changed.code
    assert changed.out.startswith(f"p: reloaded {SAMPLE} (nlp.summarizer 0.1.0 → 0.2.0) ")
    forced = unwatched.run("reload", "summarizer", "--json")
    [reply] = forced.json
    assert ("p", ["nlp.summarizer 0.2.0"], "") == (
        reply["host"], reply["reload"]["agents"], reply["reload"]["error"],
    )  # fmt: skip
    edit(unwatched, "from pydantic", "from missing_module")
    refused = unwatched.run("reload")
    assert (1, "ModuleNotFoundError: No module named 'missing_module'") == (
        refused.code, refused.out.splitlines()[-1].strip(),
    )  # fmt: skip
    assert refused.err.startswith(f"Error [reload_refused] reload refused: {SAMPLE}: ModuleNotFoundError")
    repeated = unwatched.run("reload")
    assert f"p: nothing has changed; not loaded: {SAMPLE}\n" == repeated.err
    unknown = unwatched.run("reload", "summariser", "--json")
    assert (1, "reload_refused") == (unknown.code, json.loads(unknown.err)["code"])


def test_requests_are_replayed_before_a_reload(tmp_path: Path) -> None:
    """The replay plugin logs replies that change; with `strict`, a new error refuses the reload."""
    folder = write_project(tmp_path / "p", "summarizer")
    path = folder / SAMPLE
    path.write_text(path.read_text().replace('tags=["text"]', "replayable=True"))
    toml = (folder / "mesh.toml").read_text()
    (folder / "mesh.toml").write_text(
        toml.replace("[host]", "[host]\nplugins = ['replay']") + "[plugins.replay]\nstrict = true\n"
    )
    with Up(folder) as host:
        assert 0 == host.run("agent", "call", "nlp.summarizer", '{"text": "keep me"}').code
        edit(host, ".rstrip()", ".upper()")
        host.wait_for_line(
            'nlp.summarizer: {"text":"keep me"} → {"summary":"KEEP ME"} (was {"summary":"keep me"})'
        )
        edit(host, "req.text[", "req.txet[")
        host.wait_for_line("reload refused: agents/summarizer.py: nlp.summarizer: ")
        assert '{"summary": "HI"}\n' == host.run("agent", "call", "nlp.summarizer", '{"text": "hi"}').out
