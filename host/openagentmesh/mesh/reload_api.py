"""What a module's author says of its reloads: what is kept, moved, thrown away, or declined."""

from collections.abc import Callable
from typing import Any, TypeVar

from openagentmesh.mesh.module_context import Migration, current_loading

T = TypeVar("T")
FunctionT = TypeVar("FunctionT", bound=Callable[[], Any])
MigrationT = TypeVar("MigrationT", bound=Migration)


class Reloading:
    """`keep`, `dispose`, `migrate` and `reload.decline` of a mesh.

    In a program of its own nothing is reloaded: `keep` just makes what it is asked for.
    """

    def __init__(self) -> None:
        self.reload = Reload()

    def keep(self, make: Callable[[], T]) -> T:
        """Decorate a function that makes something which survives reloads of its module.

        The name then stands for what was made: `@mesh.keep` above `def counts() -> Counts`
        makes `counts` a Counts. Pydantic models and dataclasses of the module are made anew,
        with the old one's content validated by the new class; anything whose class is not
        from a reloaded file, a client or a pool, passes as it is.
        """
        loading = current_loading()
        kept: T = make() if loading is None else loading.keep(make.__name__, make)
        return kept

    def dispose(self, function: FunctionT) -> FunctionT:
        """Decorate a function, plain or a coroutine's, that is called once the module is replaced.

        It is called when nothing runs on the old version any more, and at the host's stop.
        """
        if (loading := current_loading()) is not None:
            loading.generation.disposals.append(function)
        return function

    def migrate(self, function: MigrationT) -> MigrationT:
        """Decorate a function `(old, from_version) -> new` that moves what was kept to a new form.

        `old` has what is kept by name, in its JSON form and a copy, `from_version` is the version
        of the module's first agent; it returns what the new classes are to validate. It runs in
        a thread while the old version serves, again when requests change the state meanwhile, and
        a failure refuses the reload. Once it has run it does not until the version or it changes.
        """
        if (loading := current_loading()) is not None:
            loading.generation.migration = function
        return function


class Reload:
    """`mesh.reload`: how a module says that it will not be replaced."""

    def decline(self, why: str) -> None:
        """Let this module not be replaced while it runs: a change of it then asks for a restart."""
        if (loading := current_loading()) is not None:
            loading.generation.declined = why
