"""Shared state and artifacts, written by one SDK and read by the other (protocol §3)."""

import pytest

from tests.support.peers import CommandFailed, Peer, Sides


def test_a_value_is_read_by_the_other_sdk(sides: Sides, name: str) -> None:
    """A value that one SDK puts, the other one gets; a second put replaces it with a higher revision."""
    first = sides.writer.run("kv_put", f"{name}.plan", "eins · один")
    assert "eins · один" == sides.reader.run("kv_get", f"{name}.plan")
    assert first < sides.reader.run("kv_put", f"{name}.plan", "zwei")
    assert "zwei" == sides.writer.run("kv_get", f"{name}.plan")


def test_compare_and_set_updates_a_value_of_the_other_sdk(sides: Sides, name: str) -> None:
    """Both SDKs change, in a `cas` block, a value that the other one has put."""
    sides.writer.run("kv_put", name, "one")
    sides.reader.run("kv_cas", name, " two")
    sides.writer.run("kv_cas", name, " three")
    assert "one two three" == sides.reader.run("kv_get", name)


def test_concurrent_updates_lose_nothing(published: Peer, ours: Peer, name: str) -> None:
    """When both SDKs increment a value concurrently, no increment is lost."""
    ours.run("kv_put", name, "0")
    counting = [peer.start("kv_count", name, 25) for peer in (published, ours)]
    for command in counting:
        command.result()
    assert ("50", "50") == (published.run("kv_get", name), ours.run("kv_get", name))


def test_a_watch_yields_the_current_value_and_all_changes(sides: Sides, name: str) -> None:
    """A watch yields the current value, and then each value that the other SDK puts."""
    sides.writer.run("kv_put", name, "first")
    watch = sides.reader.start("kv_watch", name)
    assert "first" == watch.item()
    for value in ("second", "third"):
        sides.writer.run("kv_put", name, value)
        assert value == watch.item()
    watch.stop()


def test_a_deleted_key_cannot_be_read(sides: Sides, name: str) -> None:
    """After one SDK has deleted a key, `get` fails in both."""
    sides.writer.run("kv_put", name, "here")
    assert "here" == sides.reader.run("kv_get", name)
    sides.writer.run("kv_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(CommandFailed):
            peer.run("kv_get", name)


@pytest.mark.parametrize("size", [0, 5, 300_000])
def test_an_artifact_is_read_by_the_other_sdk(sides: Sides, name: str, size: int) -> None:
    """The bytes of an artifact are unchanged, also if it has several chunks in the store."""
    data = bytes(number % 256 for number in range(size)).decode("latin-1")
    sides.writer.run("workspace_put", f"{name}/data.bin", data, binary=True)
    assert data == sides.reader.run("workspace_get", f"{name}/data.bin")


def test_a_text_artifact_is_stored_as_utf8(sides: Sides, name: str) -> None:
    """A text is stored as UTF-8."""
    sides.writer.run("workspace_put", name, "größer", binary=False)
    assert "größer".encode().decode("latin-1") == sides.reader.run("workspace_get", name)


def test_a_deleted_artifact_cannot_be_read(sides: Sides, name: str) -> None:
    """After one SDK has deleted an artifact, `get` fails in both."""
    sides.writer.run("workspace_put", name, "here", binary=False)
    assert "here" == sides.reader.run("workspace_get", name)
    sides.writer.run("workspace_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(CommandFailed):
            peer.run("workspace_get", name)
