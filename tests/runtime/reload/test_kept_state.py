"""State that crosses a reload: what is kept, moved, thrown away, and what declines to be replaced."""

import asyncio
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import reload

MODEL = "from pydantic import BaseModel, Field\nfrom dataclasses import dataclass\n"
KEEP = """
@mesh.keep
def kept() -> object:
    return {make}
"""
# Ways to keep a number: what is declared, what makes it, and what counts it.
KINDS = {
    "model": ("class Tally(BaseModel):\n    count: int = 0\n", "Tally()", ".count"),
    "dataclass": ("@dataclass\nclass Tally:\n    count: int = 0\n", "Tally()", ".count"),
    "strict": (
        (
            "import datetime\nclass Tally(BaseModel, strict=True, extra='forbid'):\n"
            "    count: int = Field(0, alias='Count')\n    at: datetime.date = datetime.date(2026, 1, 2)\n"
        ),
        "Tally()",
        ".count",
    ),
    "dict": ("", "{'count': 0}", "['count']"),
    "foreign": ("from types import SimpleNamespace\n", "SimpleNamespace(count=0)", ".count"),
}


def counter(name: str, declared: str, make: str, counts: str = ".count", more: str = "") -> str:
    """An agent that counts its calls in what it keeps, and says its class's identity."""
    return f"""{MODEL}{MESH}{declared}{KEEP.format(make=make)}{more}
@mesh.agent(AgentSpec(name={name!r}))
async def count(req: dict) -> list:
    kept{counts} += 1
    return [kept{counts}, type(kept) is type({make})]
"""


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_kept_goes_on(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, kind: str
) -> None:
    """The new version counts on from the old one's number, in an object of its own class."""
    source = counter(name, *KINDS[kind])
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, {})
        for number in (2, 3):
            assert not (await reload(host, tmp_path, f"{source}# {number}\n")).error
            assert [number, True] == await mesh.call(name, {})


@pytest.mark.parametrize(("name_then", "expected"), [("kept", 2), ("other", 1)], ids=["same", "renamed"])
async def test_a_name_that_nothing_is_kept_under_begins_anew(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, name_then: str, expected: int
) -> None:
    """State goes by its name: a new one starts as it is made, one that is gone is dropped."""
    source = counter(name, *KINDS["model"])
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, {})
        then = source.replace("kept", name_then)
        assert not (await reload(host, tmp_path, then + "#\n")).error
        assert [expected, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("then", "number", "why"),
    [
        ("class Tally(BaseModel):\n    count: int = 0\n    more: str = 'x'\n", 2, ""),
        ("class Tally(BaseModel):\n    count: int = 0\n    more: str\n", 2, "more"),
        ("class Tally(BaseModel):\n    count: int = Field(0, gt=100)\n", 2, "greater than 100"),
        ("@dataclass\nclass Tally:\n    count: int = 0\n", 2, ""),
    ],
    ids=["new field with a default", "new field without", "tighter", "other kind"],
)
async def test_a_changed_class_takes_what_fits_it(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, then: str, number: int, why: str
) -> None:
    """New fields get their defaults; what the new class refuses refuses the reload, and the old counts on."""
    make = "Tally.model_construct(count=0)" if why else "Tally()"
    async with Host(configure({"a.py": counter(name, KINDS["model"][0], "Tally()")})) as host:
        await mesh.call(name, {})
        outcome = await reload(host, tmp_path, counter(name, then, make))
        assert why in outcome.error
        assert bool(why) == bool(outcome.error)
        assert [number, True] == await mesh.call(name, {})


PLAIN = "class Tally:\n    count = 0\n"


async def test_a_plain_class_of_the_file_cannot_be_kept(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It is refused when it is first loaded and when it is reloaded, saying what can be kept."""
    says = "Keep a pydantic model, a dataclass, or an object of another package"
    async with Host(configure({"a.py": counter(name, PLAIN, "Tally()")})) as host:
        assert says in host.modules[0].error
        assert "'kept' is kept and is a Tally" in host.modules[0].error
        assert not (await reload(host, tmp_path, counter(name, *KINDS["model"]))).error
        assert says in (await reload(host, tmp_path, counter(name, PLAIN, "Tally()"))).error
        assert [1, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("before", "then", "result"),
    [
        ("dict", ("class Tally(BaseModel):\n    count: int\n", "Tally(count=0)", ".count"), 2),
        ("model", ("", "{'count': 0}", "['count']"), 2),
        ("foreign", KINDS["model"], "'kept' was a SimpleNamespace"),
        ("model", KINDS["foreign"], "whose content a SimpleNamespace cannot take over"),
    ],
)
async def test_a_name_that_changes_its_kind(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    before: str,
    then: tuple[str, str, str],
    result: int | str,
) -> None:
    """Content moves between what has a content; anything else refuses the reload and names both kinds."""
    hints = {"Tally": "Tally", "{": "dict", "SimpleNamespace": "SimpleNamespace"}

    def source(declared: str, make: str, counts: str) -> str:
        hint = next(hint for start, hint in hints.items() if make.startswith(start))
        return counter(name, declared, make, counts).replace("kept() -> object", f"kept() -> {hint}")

    async with Host(configure({"a.py": source(*KINDS[before])})) as host:
        await mesh.call(name, {})
        outcome = await reload(host, tmp_path, source(*then))
        if isinstance(result, int):
            assert (outcome.error, [result, True]) == ("", await mesh.call(name, {}))
        else:
            assert result in outcome.error
            assert [2, True] == await mesh.call(name, {})


async def test_two_agents_share_what_a_helper_keeps(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It is the same object for both, whichever of the three files is reloaded."""
    helper = MODEL + MESH + KINDS["model"][0] + KEEP.format(make="Tally()")
    more = "\ndef count() -> int:\n    kept.count += 1\n    return kept.count\n"
    one = "from _common import count\n" + MESH
    files = {
        "_common.py": helper + more,
        "a.py": one + agent(f"{name}.a", "count()"),
        "b.py": one + agent(f"{name}.b", "count()"),
    }
    async with Host(configure(files)) as host:
        for number, file in enumerate([*files, *files]):
            assert [2 * number + 1, 2 * number + 2] == [await mesh.call(f"{name}.{x}", {}) for x in "ab"]
            assert not (await reload(host, tmp_path, files[file] + f"# {number}\n", file)).error


def migrating(name: str, version: str, body: str, *, field: str = "calls") -> str:
    """A counter of another form, with a function that moves the old one's content."""
    declared = f"class Tally(BaseModel):\n    {field}: int = 0\n    since: str = ''\n"
    more = f"\n@mesh.migrate\ndef move(old: dict, from_version: str) -> dict:\n    {body}\n"
    source = counter(name, declared, "Tally()", f".{field}", more)
    return source.replace(f"name={name!r}", f"name={name!r}, version={version!r}")


MOVE = "return {'kept': {'calls': old['kept']['count'], 'since': from_version}}"


async def test_migrate_moves_what_is_kept_once(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It gets the old form and version; the next save of the same version finds the new form moved."""
    source = migrating(name, "2.0.0", MOVE)
    async with Host(configure({"a.py": counter(name, *KINDS["model"])})) as host:
        await mesh.call(name, {})
        for number in (2, 3):
            assert not (await reload(host, tmp_path, f"# {number}\n{source}")).error
            assert [number, True] == await mesh.call(name, {})
        again = await reload(host, tmp_path, migrating(name, "3.0.0", MOVE))
        assert "KeyError: 'count'" in again.error
        assert [4, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ValueError('not this one')", "ValueError: not this one"),
        ("old['kept']['count'] = 99; 1 / 0", "ZeroDivisionError"),
        ("import time\n    while True: time.sleep(0.01)", "migrate takes longer than 0.3s"),
        ("return {'kept': {'calls': 'many'}}", "calls"),
        ("return {'talley': {}}", "migrate returned 'talley', but nothing of that name is kept"),
        ("return None", "migrate returned None, not a dict"),
        ("raise SystemExit(1)", "SystemExit: 1"),
    ],
    ids=["raises", "changes its copy", "hangs", "misfit", "unknown name", "nothing", "exits"],
)
async def test_a_migration_that_fails_changes_nothing(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, body: str, why: str
) -> None:
    """The reload is refused with the reason, and the old version counts on from its own number."""
    config = configure({"a.py": counter(name, *KINDS["model"])}, host={"load_timeout": 0.3})
    async with Host(config) as host:
        await mesh.call(name, {})
        assert why in (await reload(host, tmp_path, migrating(name, "2.0.0", body))).error
        assert [2, True] == await mesh.call(name, {})


async def test_requests_between_migrate_and_swap_are_not_forgotten(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The old version serves while migrate runs in a thread, and what it counts then is moved as well."""
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    wait = f"""import pathlib, time
    with open({str(runs)!r}, 'a') as file: file.write('.')
    while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.001)
    {MOVE}"""
    async with Host(configure({"a.py": counter(name, *KINDS["model"])})) as host:
        await mesh.call(name, {})
        reloading = asyncio.create_task(reload(host, tmp_path, migrating(name, "2.0.0", wait)))
        while not runs.exists():
            await asyncio.sleep(0.001)
        assert [[2, True], [3, True]] == [await mesh.call(name, {}) for _ in range(2)]
        gate.touch()
        assert not (await reloading).error
        assert [4, True] == await mesh.call(name, {})
    assert ".." == runs.read_text()


async def test_migrate_sees_what_passes_and_may_not_change_it(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A dict that both versions hold is shown to it, a client is not; changing the dict is refused."""
    kept = "\n@mesh.keep\ndef seen() -> dict:\n    return {'a': 1}\n"
    kept += "\n@mesh.keep\ndef lock() -> object:\n    import threading\n    return threading.Lock()\n"
    body = "old['seen'] = {{'a': {value}}}\n    assert 'lock' not in old\n    return {{'seen': old['seen']}}"
    async with Host(configure({"a.py": counter(name, *KINDS["model"], more=kept)})) as host:
        for value, why in ((2, "migrate changes 'seen', a dict that is passed on as it is"), (1, "")):
            source = migrating(name, "2.0.0", body.format(value=value)).replace(
                "\n@mesh.migrate", kept + "\n@mesh.migrate"
            )
            outcome = await reload(host, tmp_path, source)
            assert why in outcome.error
            assert bool(why) == bool(outcome.error)
        assert [1, True] == await mesh.call(name, {})


DISPOSE = """
@mesh.dispose
{kind} over():
    with open({path!r}, "a") as file:
        file.write({word!r})
    {then}
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("then", ["pass", "1 / 0", "raise SystemExit"])
async def test_dispose_is_called_once_when_its_version_is_over(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    kind: str,
    then: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a reload, and at the host's stop, each time after the last request; a failure is logged."""
    told = tmp_path / "told"

    def source(word: str) -> str:
        waits = f"""
@mesh.agent(AgentSpec(name={name!r}))
async def waits(req: dict) -> str:
    import asyncio, pathlib
    path = pathlib.Path({str(tmp_path)!r}) / req["until"]
    path.with_suffix(".began").touch()
    while not path.exists():
        await asyncio.sleep(0.001)
    with open({str(told)!r}, "a") as file:
        file.write("r")
    return {word!r}
"""
        return MESH + DISPOSE.format(kind=kind, path=str(told), word=word, then=then) + waits

    async def ask(until: str) -> "asyncio.Task[Any]":
        task = asyncio.create_task(mesh.call(name, {"until": until}))
        while not (tmp_path / until).with_suffix(".began").exists():
            await asyncio.sleep(0.001)
        return task

    host = Host(configure({"a.py": source("1")}))
    async with host:
        first = await ask("one")
        assert 1 == (await reload(host, tmp_path, source("2"))).in_flight
        assert not told.exists()
        (tmp_path / "one").touch()
        assert "1" == await first
        await host.wait_retired()
        assert "r1" == told.read_text()
        second = await ask("two")
        (tmp_path / "two").touch()
        assert "2" == await second
    assert "r1r2" == told.read_text()
    failed = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (0 if then == "pass" else 2) == len(failed)
    assert all("disposal function over failed" in r.getMessage() for r in failed)


async def test_a_module_that_declines_is_not_replaced(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Its reason is the reload's error, for a change of a helper too; what does not need it reloads."""
    files = {
        "_common.py": "WORD = 'old'\n",
        "a.py": f"from _common import WORD\n{MESH}mesh.reload.decline('it owns the port')\n"
        + agent(f"{name}.a", "WORD"),
        "b.py": MESH + agent(f"{name}.b", "'old'"),
    }
    async with Host(configure(files)) as host:
        for file in ("_common.py", "a.py"):
            outcome = await reload(host, tmp_path, files[file] + "WORD = 'new'\n", file)
            assert "a.py declines to be reloaded: it owns the port. Restart the host" == outcome.error
            write(tmp_path / "agents", {file: files[file]})
        assert not (await reload(host, tmp_path, MESH + agent(f"{name}.b", "'new'"), "b.py")).error
        assert ["old", "new"] == [await mesh.call(f"{name}.{x}", {}) for x in "ab"]


def test_without_a_host_all_of_it_is_plain(tmp_path: Path) -> None:
    """Run alone, what is kept is what is made, and the rest says nothing and does nothing."""
    source = counter("alone", *KINDS["model"], more="\nmesh.reload.decline('it owns the port')\n")
    source += "\n@mesh.migrate\ndef move(old: dict, from_version: str) -> dict:\n    return {'kept': old}\n"
    source += "\n@mesh.dispose\ndef over() -> None:\n    kept.count = -1\n"
    write(tmp_path, {"a.py": source})
    found = runpy.run_path(str(tmp_path / "a.py"))
    assert 0 == found["kept"].count
    assert {"kept": 1} == found["move"](1, "")
    found["over"]()
    assert -1 == found["kept"].count
