"""Run a function just before or after a module is imported, whoever imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def before_import(module: str, run: Callable[[], None]) -> None:
    """Call `run` before `module` is looked up; it may come several times."""
    _add(_Hook(module, before=run))


def after_import(module: str, run: Callable[[ModuleType], None]) -> None:
    """Call `run(module)` once `module` is loaded, before its importer goes on."""
    _add(_Hook(module, after=run))


def _add(hook: _Hook) -> None:
    """A remedy installed twice hooks once."""
    if hook not in sys.meta_path:
        sys.meta_path.insert(0, hook)


class _Hook(MetaPathFinder):
    def __init__(
        self,
        module: str,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[ModuleType], None] | None = None,
    ) -> None:
        self.module, self.before, self.after = module, before, after

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hook) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        if self.before:
            self.before()
        if self.after is None:
            return None  # the next finder finds it
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _CallAfter(spec.loader, self.after)
        return spec


class _CallAfter(Loader):
    def __init__(self, loader: Loader, run: Callable[[ModuleType], None]) -> None:
        self.loader, self.run = loader, run

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.run(module)
