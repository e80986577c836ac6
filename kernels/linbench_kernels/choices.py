"""Which configurations the wrappers choose: noted while they run, or others put in their place to try them.

Every family has a module ``launch`` that takes the configuration of a task from the function ``config``, its table; and
where few heads are spread over a device, from ``filled``, which has the last word. That is where a choice can be seen
or changed; calls are not slowed down by it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import linbench_kernels
from linbench_kernels import tables

LAST_WORD = ("filled", "config")
"""Names of functions in a module ``launch``, the one that has the last word first."""


@dataclass(frozen=True)
class Choice:
    """How one kernel is compiled for one kind of call."""

    family: str
    task: Any
    """What of a call decides it: the ``Task`` of the family, or a tuple that begins with the name of the kernel."""
    config: Any
    """The ``Config`` that is taken for that, or the ``Plan``."""
    source: str = tables.RULE
    """Where it comes from: the ``source`` of a file, see :mod:`~linbench_kernels.tables`; ``rule`` or ``override``."""

    @property
    def given(self) -> tuple[Any, ...]:
        """The arguments of the family's ``config``."""
        return self.task if isinstance(self.task, tuple) else (self.task,)

    @property
    def kernel(self) -> str:
        """Which kernel of the family, as its tasks name it."""
        if isinstance(self.task, tuple):
            return str(self.task[0])
        return str(getattr(self.task, "kernel", None) or getattr(self.task, "pass_", "all"))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by name."""
        if dataclasses.is_dataclass(self.config) and not isinstance(self.config, type):
            return dataclasses.asdict(self.config)
        return {"config": str(self.config)}


@functools.cache
def families() -> dict[str, ModuleType]:
    """The modules that launch kernels by a table, by the name of their family."""
    found = {}
    for package in pkgutil.iter_modules(linbench_kernels.__path__):
        name = f"linbench_kernels.{package.name}.launch"
        if package.ispkg and importlib.util.find_spec(name) is not None:
            launch = importlib.import_module(name)
            if callable(getattr(launch, "config", None)):
                found[package.name] = launch
    return found


@contextlib.contextmanager
def replaced(change: Callable[[Choice], Any]) -> Iterator[None]:
    """What ``change`` says is taken meanwhile, in place of every configuration that would be."""
    places = [(family, launch, _last_word(launch)) for family, launch in families().items()]
    before = [getattr(launch, name) for _, launch, name in places]
    try:
        for (family, launch, name), function in zip(places, before, strict=True):
            setattr(launch, name, _changed(family, function, change))
        yield
    finally:
        for (_, launch, name), function in zip(places, before, strict=True):
            setattr(launch, name, function)


def _last_word(launch: ModuleType) -> str:
    return next(name for name in LAST_WORD if hasattr(launch, name))


def _changed(family: str, function: Callable[..., Any], change: Callable[[Choice], Any]) -> Callable[..., Any]:
    original = getattr(function, "original", function)

    def chosen(*given: Any) -> Any:
        task = next((x for x in given if hasattr(x, "arch")), given)
        choice = Choice(family, task, function(*given))
        overridden = original is not function and choice.config != original(*given)
        source = tables.OVERRIDE if overridden else tables.source(family, choice.given)
        return change(dataclasses.replace(choice, source=source))

    chosen.original = original  # type: ignore[attr-defined]
    return chosen


@contextlib.contextmanager
def noted() -> Iterator[list[Choice]]:
    """The choices that are made meanwhile, each once, in their order."""
    kept: list[Choice] = []

    def note(choice: Choice) -> Any:
        if choice not in kept:
            kept.append(choice)
        return choice.config

    with replaced(note):
        yield kept
