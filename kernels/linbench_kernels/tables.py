"""Where the configuration of a kernel comes from: what was tuned on this device, the checked-in table, or the rule.

``tuned/sm_90.json`` is the table of a class of devices, and says in ``source`` how it was made. What
:func:`~linbench_kernels.autotune.autotune` found on a device lies in a file of the same form in the user's cache and
has precedence; :func:`~linbench_kernels.choices.replaced` has precedence over both. What neither file knows follows the
rule of the family.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
C = TypeVar("C")

RULE, OVERRIDE = "rule", "override"
"""Sources that are no file."""

_RULES: dict[str, Callable[..., Any]] = {}
_CACHED: list[Any] = []


def tuned(rule: Callable[P, C]) -> Callable[P, C]:
    """The function ``config`` of a family: its rule where no file knows better; asked once for every task."""
    family = rule.__module__.split(".")[-2]
    _RULES[family] = rule

    @functools.cache
    def config(*given: Any) -> Any:
        chosen: Any = rule(*given)  # type: ignore[call-arg]
        settings, _ = known(family, given)
        if settings is None:
            return chosen
        names = {field.name for field in dataclasses.fields(chosen)}
        return dataclasses.replace(chosen, **{name: x for name, x in settings.items() if name in names})

    _CACHED.append(config)
    return cast("Callable[P, C]", functools.update_wrapper(config, rule))


def rule_of(family: str) -> Callable[..., Any] | None:
    """The rule of a family, if it is one that files can outdo."""
    return _RULES.get(family)


def source(family: str, given: tuple[Any, ...]) -> str:
    """Where the configuration of a task comes from, in words."""
    return known(family, given)[1] if family in _RULES else RULE


def known(family: str, given: tuple[Any, ...]) -> tuple[dict[str, Any] | None, str]:
    """The settings that a file has for the arguments of a rule, and its ``source``; None and ``rule`` for none."""
    task = described(given, _RULES.get(family))
    for table in (_of_device(), _of_class(str(task.get("arch")))):
        for one in table.get("entries", ()):
            if one["family"] == family and one["task"] == task:
                return one["config"], str(table["source"])
    return None, RULE


def described(given: tuple[Any, ...], rule: Callable[..., Any] | None = None) -> dict[str, Any]:
    """A task as files have it: the fields of a ``Task``, or arguments of the rule by their names."""
    if len(given) == 1 and dataclasses.is_dataclass(given[0]) and not isinstance(given[0], type):
        return dataclasses.asdict(given[0])
    names = list(inspect.signature(rule).parameters) if rule is not None else [str(i) for i in range(len(given))]
    return dict(zip(names, given, strict=False))


def write(path: Path, told: str, entries: list[dict[str, Any]]) -> None:
    """Put entries into a file, in place of those of the same tasks.

    Args:
        told: how the configurations were found, which records repeat.
        entries: ``family``, ``task``, ``config``, and whatever else is worth keeping.
    """
    before = json.loads(path.read_text())["entries"] if path.exists() else []
    new = [(one["family"], one["task"]) for one in entries]
    kept = [one for one in before if (one["family"], one["task"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"source": told, "entries": [*kept, *entries]}, indent=1) + "\n")


def cache_file() -> Path | None:
    """What was tuned on this device, in ``LINBENCH_KERNELS_CACHE`` or the user's cache; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    folder = os.environ.get("LINBENCH_KERNELS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name())
    return (Path(folder) if folder else Path(home) / "linbench_kernels") / f"{name}.json"


def forget() -> None:
    """Read the files again at the next call."""
    for cached in (*_CACHED, _of_device, _of_class):
        cached.cache_clear()


@functools.cache
def _of_device() -> dict[str, Any]:
    path = cache_file()
    found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    return found


@functools.cache
def _of_class(arch: str) -> dict[str, Any]:
    file = importlib.resources.files("linbench_kernels") / "tuned" / f"{arch}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found
