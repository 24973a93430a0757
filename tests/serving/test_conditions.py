"""Conditions of gates: which values of a key, and which messages, activate an agent."""

import asyncio
from typing import Any

import pytest
from openagentmesh import AgentMesh
from openagentmesh.protocol.errors import InvalidAgent

from tests.support.gates import call_when_active, declare_gated, is_active, wait_until
from tests.support.meshes import reconnects
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("short_linger")


@pytest.mark.parametrize("initial", [True, False])
async def test_without_a_key_or_message_the_initial_state_applies(
    mesh: AgentMesh, name: str, *, initial: bool
) -> None:
    """A deleted key is the same as a missing one."""
    declare_gated(
        mesh, f"{name}.a", mesh.kv_condition(f"{name}.k", lambda text: text == "on", initial=initial)
    )
    declare_gated(mesh, f"{name}.b", mesh.subject_condition(name, bool, initial=initial))
    await mesh.catalog()
    assert (initial, initial) == (is_active(mesh, f"{name}.a"), is_active(mesh, f"{name}.b"))
    await mesh.kv.put(f"{name}.k", "off" if initial else "on")
    await wait_until(mesh, f"{name}.a", active=not initial)
    await mesh.kv.delete(f"{name}.k")
    await wait_until(mesh, f"{name}.a", active=initial)


async def test_after_a_burst_of_changes_the_last_one_applies(mesh: AgentMesh, name: str) -> None:
    """However fast the key changes, its last value decides."""
    evaluated: set[str] = set()

    def is_on(text: str) -> bool:
        evaluated.add(text)
        return text.startswith("on")

    declare_gated(mesh, name, mesh.kv_condition(name, is_on))
    await mesh.catalog()
    for last in ("on 1", "off 2", "on 3"):
        for _ in range(10):
            await mesh.kv.put(name, "on")
            await mesh.kv.put(name, "off")
        await mesh.kv.put(name, last)
        await until(lambda: last in evaluated)  # noqa: B023 - of this iteration
        await wait_until(mesh, name, active=last.startswith("on"))
    # The last "off" may still deactivate it for a moment.
    assert mesh.instance_id == await call_when_active(mesh, name)
    assert is_active(mesh, name)


async def test_a_predicate_that_raises_changes_nothing(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log contains the agent; the next value is evaluated."""

    def strict(text: str) -> bool:
        return {"on": True, "off": False}[text]

    declare_gated(mesh, name, mesh.kv_condition(name, strict))
    await mesh.kv.put(name, "on")
    await mesh.catalog()
    await mesh.kv.put(name, "neither")
    await until(lambda: f"{name}: condition failed on 'neither'" in caplog.text)
    assert mesh.instance_id == await mesh.call(name)
    await mesh.kv.put(name, "off")
    await wait_until(mesh, name, active=False)


@pytest.mark.parametrize("kind", ["key", "subject"])
async def test_a_predicate_may_raise_any_exception(mesh: AgentMesh, name: str, kind: str) -> None:
    """A CancelledError from it ends neither the watcher of the condition nor the connection."""

    def strict(text: str) -> bool:
        if text == "neither":
            raise asyncio.CancelledError
        return text == "on"

    is_key = kind == "key"
    condition, change = (mesh.kv_condition, mesh.kv.put) if is_key else (mesh.subject_condition, mesh.publish)
    declare_gated(mesh, name, condition(name, strict))
    await mesh.catalog()
    for text, active in (("on", True), ("neither", True), ("off", False), ("neither", False), ("on", True)):
        await change(name, text)
        await wait_until(mesh, name, active=active)
    assert 0 == reconnects(mesh)


@pytest.mark.parametrize("value", ["", "a b", "a..b", ".a", "a.>.b", "x" * 5000, None, 7])
def test_keys_and_subjects_of_conditions_are_checked(value: Any) -> None:
    """An invalid key or subject is rejected at its declaration; a key condition accepts no pattern."""
    mesh = AgentMesh()
    for make in (mesh.kv_condition, mesh.subject_condition):
        with pytest.raises(InvalidAgent, match="is invalid"):
            make(value, bool)
    with pytest.raises(InvalidAgent, match="is invalid"):
        mesh.kv_condition("a.*", bool)


@pytest.mark.parametrize(
    ("parameter", "value"), [("predicate", "on"), ("drain_timeout", -1), ("drain_timeout", "30")]
)
def test_an_invalid_condition_is_rejected_at_its_declaration(parameter: str, value: Any) -> None:
    """Values that would fail when the mesh connects or the gate changes raise InvalidAgent."""
    for make in (AgentMesh().kv_condition, AgentMesh().subject_condition):
        with pytest.raises(InvalidAgent, match=parameter):
            make("a", **{"predicate": bool, parameter: value})
    with pytest.raises(InvalidAgent, match="active_when"):
        declare_gated(AgentMesh(), "a", value)
