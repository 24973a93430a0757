"""`oam kv`: keys of the shared state, and agents that depend on them."""

from tests.support.commands import Up, until


def test_a_key_is_written_read_and_deleted(examples: Up) -> None:
    """`kv get` prints the text of `kv put`; after `kv delete` it fails with `not_found`."""
    assert 0 == examples.run("kv", "put", "shop.owner", "alice").code
    assert "alice\n" == examples.run("kv", "get", "shop.owner").out
    assert 0 == examples.run("kv", "delete", "shop.owner").code
    missing = examples.run("kv", "get", "shop.owner")
    assert (1, "") == (missing.code, missing.out)
    assert missing.err.startswith("Error [not_found]")


def test_a_written_key_activates_an_agent(examples: Up) -> None:
    """An agent with `active_when` answers calls while the key of `kv put` fulfils its condition."""

    def exit_code() -> int:
        return examples.run("agent", "call", "desk.trade", '"sell"').code

    assert 1 == exit_code()
    assert 0 == examples.run("kv", "put", "desk.status", "open").code
    assert until(lambda: exit_code() == 0)
    assert 0 == examples.run("kv", "delete", "desk.status").code
    assert until(lambda: exit_code() == 1)
