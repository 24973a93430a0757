"""Shared state and artifacts, written by one SDK and read by the other (protocol §3)."""

import pytest

from tests.support.peers import CommandFailed, Peer, Sides


def test_a_value(sides: Sides, name: str) -> None:
    """What one puts the other gets; a second put replaces it, and revisions grow."""
    first = sides.writer.run("kv_put", f"{name}.plan", "eins · один")
    assert "eins · один" == sides.reader.run("kv_get", f"{name}.plan")
    assert first < sides.reader.run("kv_put", f"{name}.plan", "zwei")
    assert "zwei" == sides.writer.run("kv_get", f"{name}.plan")


def test_compare_and_set(sides: Sides, name: str) -> None:
    """A value that one put, the other changes in a `cas` block."""
    sides.writer.run("kv_put", name, "one")
    sides.reader.run("kv_cas", name, " two")
    sides.writer.run("kv_cas", name, " three")
    assert "one two three" == sides.reader.run("kv_get", name)


def test_updates_at_the_same_time(stock: Peer, ours: Peer, name: str) -> None:
    """When both count one value up, nothing is lost."""
    ours.run("kv_put", name, "0")
    counting = [peer.start("kv_count", name, 25) for peer in (stock, ours)]
    for conversation in counting:
        conversation.result()
    assert ("50", "50") == (stock.run("kv_get", name), ours.run("kv_get", name))


def test_a_watch(sides: Sides, name: str) -> None:
    """A watch gives the value there is, and then each that the other puts."""
    sides.writer.run("kv_put", name, "first")
    watch = sides.reader.start("kv_watch", name)
    assert "first" == watch.item()
    for value in ("second", "third"):
        sides.writer.run("kv_put", name, value)
        assert value == watch.item()
    watch.stop()


def test_a_deleted_key(sides: Sides, name: str) -> None:
    """What one deletes the other cannot get; ours says so with a mesh error."""
    sides.writer.run("kv_put", name, "here")
    assert "here" == sides.reader.run("kv_get", name)
    sides.writer.run("kv_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(CommandFailed):
            peer.run("kv_get", name)


@pytest.mark.parametrize("size", [0, 5, 300_000])
def test_an_artifact(sides: Sides, name: str, size: int) -> None:
    """Bytes come back as they were, also those of more than one chunk of the store."""
    data = bytes(number % 256 for number in range(size)).decode("latin-1")
    sides.writer.run("workspace_put", f"{name}/data.bin", data, binary=True)
    assert data == sides.reader.run("workspace_get", f"{name}/data.bin")


def test_a_text_artifact(sides: Sides, name: str) -> None:
    """A text is stored as its UTF-8."""
    sides.writer.run("workspace_put", name, "größer", binary=False)
    assert "größer".encode().decode("latin-1") == sides.reader.run("workspace_get", name)


def test_a_deleted_artifact(sides: Sides, name: str) -> None:
    """What one deletes the other cannot get."""
    sides.writer.run("workspace_put", name, "here", binary=False)
    assert "here" == sides.reader.run("workspace_get", name)
    sides.writer.run("workspace_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(CommandFailed):
            peer.run("workspace_get", name)
