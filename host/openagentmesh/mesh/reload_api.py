"""What a module's author declares about its reloads: `keep`, `dispose`, `migrate`, `reload.decline`."""

from collections.abc import Callable
from typing import Any, TypeVar

from openagentmesh.mesh.module_context import Migration, current_module

T = TypeVar("T")
FunctionT = TypeVar("FunctionT", bound=Callable[[], Any])
MigrationT = TypeVar("MigrationT", bound=Migration)


class ReloadAPI:
    """`keep`, `dispose`, `migrate` and `reload.decline` of a mesh.

    In a program without a host nothing is reloaded, and `keep` only calls the function.
    """

    def __init__(self) -> None:
        self.reload = Reload()

    def keep(self, make: Callable[[], T]) -> T:
        """Decorate a function whose result survives reloads of its module.

        The name then stands for the result: `@mesh.keep` above `def counts() -> Counts` makes `counts` a
        Counts. Pydantic models and dataclasses of the module are created anew, with the old content
        validated by the new class; an object whose class is not from a reloaded file, such as a client or a
        pool, is passed on as it is.
        """
        module = current_module()
        kept: T = make() if module is None else module.keep(make.__name__, make)
        return kept

    def dispose(self, function: FunctionT) -> FunctionT:
        """Decorate a function, plain or a coroutine function, that is called once the module is replaced.

        It is called when nothing runs on the old version any more, and at the host's stop.
        """
        if (module := current_module()) is not None:
            module.generation.disposals.append(function)
        return function

    def migrate(self, function: MigrationT) -> MigrationT:
        """Decorate a function `(old, from_version) -> new` that converts kept state to a new form.

        `old` is a copy of the kept state by name, in JSON form, `from_version` the version of the module's
        first agent; the result is validated by the new classes. It runs in a thread while the old version
        serves, again when requests change the state meanwhile, and a failure refuses the reload. It runs
        again when the version or the function has changed.
        """
        if (module := current_module()) is not None:
            module.generation.migration = function
        return function


class Reload:
    """`mesh.reload`: how a module declines to be replaced."""

    def decline(self, reason: str) -> None:
        """Do not replace this module while it runs: a change of it then requires a restart."""
        if (module := current_module()) is not None:
            module.generation.declined = reason
