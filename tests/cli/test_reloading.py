"""`oam up` and `oam reload` while files change: what the terminal says, and what is served."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Up, write_project

SAMPLE = "agents/summarizer.py"


def edit(host: Up, old: str, new: str) -> None:
    """Save the sample in place, as a simple editor does."""
    path = host.folder / SAMPLE
    path.write_text(path.read_text().replace(old, new))


def version(host: Up) -> str:
    [entry] = host.run("mesh", "catalog", "--json").json
    return str(entry["version"])


@pytest.fixture
def unwatched(tmp_path: Path) -> Iterator[Up]:
    """A host that loads nothing by itself."""
    with Up(write_project(tmp_path / "p", "summarizer"), "--no-reload") as host:
        yield host


def test_a_file_is_edited_broken_mended_deleted_and_restored(tmp_path: Path) -> None:
    """Each time the terminal says in a line what became of it, and a broken file with its place."""
    with Up(write_project(tmp_path / "p", "summarizer")) as host:
        source = (host.folder / SAMPLE).read_text()
        edit(host, 'tags=["text"]', 'tags=["text"], version="0.2.0"')
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer 0.1.0 → 0.2.0)")
        edit(host, "return Summ", "return return Summ")
        host.wait_for_line(f"reload refused: {SAMPLE}: SyntaxError: invalid syntax")
        assert any("return return Summ" in line for line in host.err)
        assert any(line.strip() == "^^^^^^" for line in host.err)
        call, status = host.run_all(("agent", "call", "nlp.summarizer", '{"text": "still"}'), ("status",))
        assert '{"summary": "still"}\n' == call.out
        assert f"✗ {SAMPLE}: SyntaxError: invalid syntax (an older version serves)" in status.out
        edit(host, "return return Summ", "return Summ")
        host.wait_for_line(f"{SAMPLE}: file matches the running version again")
        (host.folder / SAMPLE).unlink()
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer withdrawn)")
        (host.folder / SAMPLE).write_text(source)
        host.wait_for_line(f"reloaded {SAMPLE} (nlp.summarizer 0.1.0 new)")


def test_a_hangup_reloads_what_has_changed(unwatched: Up) -> None:
    """Where nothing is watched, SIGHUP takes the same path, once it is asked for."""
    edit(unwatched, 'tags=["text"]', 'version="0.2.0"')
    assert "0.1.0" == version(unwatched)
    unwatched.signal(signal.SIGHUP)
    unwatched.wait_for_line("0.1.0 → 0.2.0")
    unwatched.signal(signal.SIGHUP)
    unwatched.wait_for_line("nothing has changed on disk")


def test_a_reload_by_hand(unwatched: Up) -> None:
    """`oam reload` says what came of it on each host, in words and as JSON, and fails when it did."""
    same = unwatched.run("reload")
    assert (0, "p: nothing has changed\n") == (same.code, same.err)
    edit(unwatched, 'tags=["text"]', 'version="0.2.0"')
    done = unwatched.run("reload")
    assert 0 == done.code
    assert done.out.startswith(f"p: reloaded {SAMPLE} (nlp.summarizer 0.1.0 → 0.2.0) ")
    anyway = unwatched.run("reload", "summarizer", "--json")
    [answer] = anyway.json
    assert ("p", ["nlp.summarizer 0.2.0"], "") == (
        answer["host"], answer["reload"]["agents"], answer["reload"]["error"],
    )  # fmt: skip
    edit(unwatched, "from pydantic", "from nowhere")
    failed = unwatched.run("reload")
    assert (1, "ModuleNotFoundError: No module named 'nowhere'") == (
        failed.code, failed.out.splitlines()[-1].strip(),
    )  # fmt: skip
    assert failed.err.startswith(f"Error [reload_refused] reload refused: {SAMPLE}: ModuleNotFoundError")
    again = unwatched.run("reload")
    assert f"p: nothing has changed; not loaded: {SAMPLE}\n" == again.err
    unknown = unwatched.run("reload", "summariser", "--json")
    assert (1, "reload_refused") == (unknown.code, json.loads(unknown.err)["code"])


def test_requests_are_replayed_before_a_reload(tmp_path: Path) -> None:
    """What a new version answers differently is told; when strict, a new error refuses it."""
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
