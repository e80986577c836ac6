"""Which q, k, v a mechanism is asked about: named, seeded input families.

On i.i.d. Gaussian inputs almost every approximation loses to the mean of the values, and on smooth inputs almost every
one is good: a number without the name of its family says little. A family is one function
``(cell, generator, *, parameters) -> q, k, v`` in one file; the keyword parameters carry pydantic types and defaults. A
module whose family cannot give every cell defines ``unsupported(cell)`` beside it.

Nothing here imports torch until a family is loaded.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from linbench.cell import Cell, Scalar, digest
from linbench.errors import UsageError
from linbench.parameters import checked, signature_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FAMILIES = {
    "gaussian": "linbench.inputs.gaussian:gaussian",
    "smooth": "linbench.inputs.smooth:smooth",
    "clustered": "linbench.inputs.clustered:clustered",
    "local": "linbench.inputs.local:local",
    "minilm": "linbench.inputs.captured:minilm",
    "trace": "linbench.inputs.traces:trace",
}


class Family(Protocol):
    """What every family is."""

    def __call__(self, cell: Cell, generator: torch.Generator, **parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q and k ``[B, H, N, D]`` and v ``[B, H, N, M]``, fp32 on the CPU."""


def families() -> dict[str, str]:
    """Every family: name -> ``module:function``."""
    return dict(_FAMILIES)


def parameters(name: str) -> dict[str, Scalar]:
    """The parameters of a family with their defaults.

    Raises:
        UsageError: the family is unknown.
    """
    family = _load(name)[1]
    return {field: info.default for field, info in _parameter_model(name, family).model_fields.items()}


def draw(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a cell: the same for every mechanism, implementation, pass and device.

    The generator's seed is a hash of the family's name and ``cell.seed``, so that it never repeats the numbers that a
    mechanism draws for its own projections from the same ``cell.seed``.

    Returns:
        q and k ``[B, H, N, D]`` and v ``[B, H, N, M]`` on the CPU, drawn in fp32 and rounded to the cell's dtype.

    Raises:
        UsageError: the family or one of its parameters is unknown, a value is out of range, or the family cannot give
            this cell.
    """
    import torch

    if reason := unsupported(cell):
        raise UsageError(f"inputs={cell.inputs}: {reason}")
    _, family = _load(cell.inputs, cell.inputs_target)
    generator = torch.Generator().manual_seed(int(digest([cell.inputs, cell.seed]), 16))
    q, k, v = family(cell, generator, **_checked_parameters(cell))
    dtype: torch.dtype = getattr(torch, cell.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def unsupported(cell: Cell) -> str | None:
    """Why the cell's family cannot give its q, k, v, in one clause, or None when it can.

    Raises:
        UsageError: the family or one of its parameters is unknown, or a value is out of range.
    """
    module, _ = _load(cell.inputs, cell.inputs_target)
    _checked_parameters(cell)
    if not hasattr(module, "unsupported"):
        return None
    reason: str | None = module.unsupported(cell)
    return reason


def fingerprint(cell: Cell) -> str | None:
    """What tells the family's data apart where it reads a file of the user's; None elsewhere."""
    module, _ = _load(cell.inputs, cell.inputs_target)
    found: str | None = module.fingerprint(cell) if hasattr(module, "fingerprint") else None
    return found


def another_draw(cell: Cell, index: int) -> Cell:
    """A cell of the same shape and family with other inputs: those of another seed, or of another captured text.

    Args:
        index: which; the draws of a captured family repeat themselves from 1 on, and never come back to 0.

    Raises:
        UsageError: the family is captured and has nothing else to give.
    """
    module, _ = _load(cell.inputs, cell.inputs_target)
    if hasattr(module, "another_draw"):
        other: Cell = module.another_draw(cell, index)
        return other
    return cell.model_copy(update={"seed": int(digest(["another draw", cell.seed, index]), 16) % 2**62})


def _load(name: str, target: str | None = None) -> tuple[ModuleType, Family]:
    """The module and the function of a family; ``target`` is the path ``module.function`` of one that is not ours."""
    if target is None and name not in _FAMILIES:
        raise UsageError(f"unknown inputs '{name}'; choose from {', '.join(_FAMILIES)}")
    path = target or _FAMILIES[name].replace(":", ".")
    module_name, _, function = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        family: Family = getattr(module, function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"inputs '{name}' cannot be loaded from '{path}': {error}") from error
    return module, family


def _parameter_model(name: str, family: Family) -> type[BaseModel]:
    return signature_model(f"{name.title()}Parameters", family, leave_out=("cell", "generator"))


def _checked_parameters(cell: Cell) -> dict[str, Any]:
    _, family = _load(cell.inputs, cell.inputs_target)
    model = _parameter_model(cell.inputs, family)
    return checked(model, cell.inputs_parameters, f"inputs.{cell.inputs}", "parameters")
