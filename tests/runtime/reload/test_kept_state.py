"""State that `mesh.keep` transfers from the old version to the new one."""

import runpy
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import COUNTERS, JOBS, counting_agent, keeping_module, reload


@pytest.mark.parametrize("kind", COUNTERS)
async def test_a_new_version_continues_with_kept_state(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, kind: str
) -> None:
    """The new version counts on from the old number, in an object of its own class."""
    source = counting_agent(name, *COUNTERS[kind])
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, {})
        for number in (2, 3):
            assert not (await reload(host, tmp_path, f"{source}# {number}\n")).error
            assert [number, True] == await mesh.call(name, {})


@pytest.mark.parametrize(("new_name", "expected"), [("kept", 2), ("other", 1)], ids=["same", "renamed"])
async def test_kept_state_is_matched_by_name(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, new_name: str, expected: int
) -> None:
    """State under a new name is created, state under a removed name is dropped."""
    source = counting_agent(name, *COUNTERS["model"])
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, {})
        changed = source.replace("kept", new_name)
        assert not (await reload(host, tmp_path, changed + "#\n")).error
        assert [expected, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("declared", "number", "error"),
    [
        ("class Tally(BaseModel):\n    count: int = 0\n    more: str = 'x'\n", 2, ""),
        ("class Tally(BaseModel):\n    count: int = 0\n    more: str\n", 2, "more"),
        ("class Tally(BaseModel):\n    count: int = Field(0, gt=100)\n", 2, "greater than 100"),
        ("@dataclass\nclass Tally:\n    count: int = 0\n", 2, ""),
    ],
    ids=["new-field-with-default", "new-field-without-default", "narrower-field", "dataclass"],
)
async def test_kept_state_is_validated_by_the_changed_class(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, declared: str, number: int, error: str
) -> None:
    """New fields get their defaults; state that the new class rejects refuses the reload."""
    make = "Tally.model_construct(count=0)" if error else "Tally()"
    async with Host(configure({"a.py": counting_agent(name, COUNTERS["model"][0], "Tally()")})) as host:
        await mesh.call(name, {})
        result = await reload(host, tmp_path, counting_agent(name, declared, make))
        assert error in result.error
        assert bool(error) == bool(result.error)
        assert [number, True] == await mesh.call(name, {})


PLAIN_CLASS = "class Tally:\n    count = 0\n"


async def test_a_plain_class_of_the_module_cannot_be_kept(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It is refused at the start and in a reload; the error lists the types that can be kept."""
    advice = "Keep a pydantic model, a dataclass, or an object of another package"
    async with Host(configure({"a.py": counting_agent(name, PLAIN_CLASS, "Tally()")})) as host:
        assert advice in host.modules[0].error
        assert "'kept' is kept and is a Tally" in host.modules[0].error
        assert not (await reload(host, tmp_path, counting_agent(name, *COUNTERS["model"]))).error
        assert advice in (await reload(host, tmp_path, counting_agent(name, PLAIN_CLASS, "Tally()"))).error
        assert [1, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("dict", ("class Tally(BaseModel):\n    count: int\n", "Tally(count=0)", ".count"), 2),
        ("model", ("", "{'count': 0}", "['count']"), 2),
        ("other-package", COUNTERS["model"], "'kept' was a SimpleNamespace"),
        ("model", COUNTERS["other-package"], "whose content a SimpleNamespace cannot take over"),
    ],
    ids=["dict-to-model", "model-to-dict", "other-package-to-model", "model-to-other-package"],
)
async def test_kept_state_may_change_its_type(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    before: str,
    after: tuple[str, str, str],
    expected: int | str,
) -> None:
    """Models and dicts take over each other's contents; other types refuse the reload, which names both."""
    hints = {"Tally": "Tally", "{": "dict", "SimpleNamespace": "SimpleNamespace"}

    def source(declared: str, make: str, counts: str) -> str:
        hint = next(hint for start, hint in hints.items() if make.startswith(start))
        return counting_agent(name, declared, make, counts).replace("kept() -> object", f"kept() -> {hint}")

    async with Host(configure({"a.py": source(*COUNTERS[before])})) as host:
        await mesh.call(name, {})
        result = await reload(host, tmp_path, source(*after))
        if isinstance(expected, int):
            assert (result.error, [expected, True]) == ("", await mesh.call(name, {}))
        else:
            assert expected in result.error
            assert [2, True] == await mesh.call(name, {})


async def test_importers_share_the_kept_state_of_a_helper(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It is the same object for both importers, whichever of the three files is reloaded."""
    count = "\ndef count() -> int:\n    kept.count += 1\n    return kept.count\n"
    imports = "from _common import count\n" + MESH
    files = {
        "_common.py": keeping_module(COUNTERS["model"][0], "Tally()", count),
        "a.py": imports + agent(f"{name}.a", "count()"),
        "b.py": imports + agent(f"{name}.b", "count()"),
    }
    async with Host(configure(files)) as host:
        for number, file in enumerate([*files, *files]):
            assert [2 * number + 1, 2 * number + 2] == [await mesh.call(f"{name}.{x}", {}) for x in "ab"]
            assert not (await reload(host, tmp_path, files[file] + f"# {number}\n", file)).error


async def test_models_in_a_kept_collection_get_their_new_class(bench: Bench) -> None:
    """The values of an annotated dict are instances of the new class after a reload."""
    source = f"{MESH}{JOBS}{agent(f'{bench.name}.put', 'jobs.update(a=Job(number=4))')}"
    source += agent(f"{bench.name}.get", "[isinstance(jobs['a'], Job), jobs['a'].number, jobs['a'].{read}]")
    async with bench.serve({"a.py": source.format(more="", read="number")}):
        await bench.call(".put")
        await bench.reloaded({"a.py": source.format(more="    size: int = 7", read="size")})
        assert [True, 4, 7] == await bench.call(".get")


@pytest.mark.parametrize(
    "statement", ["sys.exit('no')", "raise KeyboardInterrupt"], ids=["SystemExit", "KeyboardInterrupt"]
)
async def test_a_model_whose_validation_exits_is_refused(bench: Bench, statement: str) -> None:
    """A validator of kept state may raise SystemExit or KeyboardInterrupt; the old version keeps serving."""
    source = f"import sys\n{MESH}{JOBS.format(more='')}{agent(bench.name, 'jobs.update(a=Job())')}"
    invalid = source.replace(
        "number: int = 0", "number: int = 0\n    def model_post_init(self, _):\n        " + statement
    )
    async with bench.serve({"a.py": source}):
        await bench.call()
        assert (await bench.refused({"a.py": invalid})).error
        assert {} == await bench.call()


async def test_kept_secrets_and_deques_are_unchanged(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Secrets, which JSON would mask, and bounded deques arrive unchanged, also in nested models."""
    head = MESH + "from collections import deque\nfrom pydantic import BaseModel, SecretBytes, SecretStr\n"
    head += "class Job(BaseModel):\n    token: SecretStr = SecretStr('')\n"
    head += "    raw: SecretBytes = SecretBytes(b'')\n"
    head += "    stars: str = '**********'\n"
    head += "class Kept(BaseModel):\n    jobs: dict[int, list[Job]] = {}\n"
    head += "@mesh.keep\ndef kept() -> Kept:\n    return Kept()\n"
    head += "@mesh.keep\ndef queue() -> deque[Job]:\n    return deque(maxlen=2)\n"
    job = "Job(token=SecretStr('hunter2'), raw=SecretBytes(b'raw'))"
    put = head + agent(name, f"[kept.jobs.update({{7: [{job}]}}), queue.extend([{job}] * 3)]")
    values = "[each.token.get_secret_value(), each.raw.get_secret_value().decode(), each.stars]"
    get = head + agent(name, f"[{values} for each in [*kept.jobs[7], *queue]] + [queue.maxlen]")
    async with Host(configure({"a.py": put})) as host:
        await mesh.call(name, {})
        assert "" == (await reload(host, tmp_path, get)).error
        assert [["hunter2", "raw", "*" * 10]] * 3 + [2] == await mesh.call(name, {})


def test_without_a_host_kept_state_is_a_plain_object(tmp_path: Path) -> None:
    """In a script `keep` returns the new object, functions stay functions, and `decline` has no effect."""
    source = counting_agent("alone", *COUNTERS["model"], more="\nmesh.reload.decline('it owns the port')\n")
    source += "\n@mesh.migrate\ndef move(old: dict, from_version: str) -> dict:\n    return {'kept': old}\n"
    source += "\n@mesh.dispose\ndef dispose() -> None:\n    kept.count = -1\n"
    write(tmp_path, {"a.py": source})
    namespace = runpy.run_path(str(tmp_path / "a.py"))
    assert 0 == namespace["kept"].count
    assert {"kept": 1} == namespace["move"](1, "")
    namespace["dispose"]()
    assert -1 == namespace["kept"].count
