"""Shared state and artifacts, written by one SDK and read by the other (protocol §3)."""

import pytest

from tests.interop.conftest import Sides
from tests.interop.peers import Peer, Refused


def test_a_value(sides: Sides, name: str) -> None:
    """What one puts the other gets; a second put replaces it, and revisions grow."""
    first = sides.writer.ask("kv_put", f"{name}.plan", "eins · один")
    assert "eins · один" == sides.reader.ask("kv_get", f"{name}.plan")
    assert first < sides.reader.ask("kv_put", f"{name}.plan", "zwei")
    assert "zwei" == sides.writer.ask("kv_get", f"{name}.plan")


def test_compare_and_set(sides: Sides, name: str) -> None:
    """A value that one put, the other changes in a `cas` block."""
    sides.writer.ask("kv_put", name, "one")
    sides.reader.ask("kv_cas", name, " two")
    sides.writer.ask("kv_cas", name, " three")
    assert "one two three" == sides.reader.ask("kv_get", name)


def test_updates_at_the_same_time(stock: Peer, ours: Peer, name: str) -> None:
    """When both count one value up, nothing is lost."""
    ours.ask("kv_put", name, "0")
    counting = [peer.begin("kv_count", name, 25) for peer in (stock, ours)]
    for conversation in counting:
        conversation.result()
    assert ("50", "50") == (stock.ask("kv_get", name), ours.ask("kv_get", name))


def test_a_watch(sides: Sides, name: str) -> None:
    """A watch gives the value there is, and then each that the other puts."""
    sides.writer.ask("kv_put", name, "first")
    watch = sides.reader.begin("kv_watch", name)
    assert "first" == watch.item()
    for value in ("second", "third"):
        sides.writer.ask("kv_put", name, value)
        assert value == watch.item()
    watch.stop()


def test_a_deleted_key(sides: Sides, name: str) -> None:
    """What one deletes the other cannot get; ours says so with a mesh error."""
    sides.writer.ask("kv_put", name, "here")
    assert "here" == sides.reader.ask("kv_get", name)
    sides.writer.ask("kv_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(Refused):
            peer.ask("kv_get", name)


@pytest.mark.parametrize("size", [0, 5, 300_000])
def test_an_artifact(sides: Sides, name: str, size: int) -> None:
    """Bytes come back as they were, also those of more than one chunk of the store."""
    data = bytes(number % 256 for number in range(size)).decode("latin-1")
    sides.writer.ask("workspace_put", f"{name}/data.bin", data, binary=True)
    assert data == sides.reader.ask("workspace_get", f"{name}/data.bin")


def test_a_text_artifact(sides: Sides, name: str) -> None:
    """A text is stored as its UTF-8."""
    sides.writer.ask("workspace_put", name, "größer", binary=False)
    assert "größer".encode().decode("latin-1") == sides.reader.ask("workspace_get", name)


def test_a_deleted_artifact(sides: Sides, name: str) -> None:
    """What one deletes the other cannot get."""
    sides.writer.ask("workspace_put", name, "here", binary=False)
    assert "here" == sides.reader.ask("workspace_get", name)
    sides.writer.ask("workspace_delete", name)
    for peer in (sides.writer, sides.reader):
        with pytest.raises(Refused):
            peer.ask("workspace_get", name)
