"""Names of mechanisms: built in, from the entry-point group ``linbench.mechanisms``, or by import path.

Nothing here imports torch until a mechanism is loaded.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from linbench.cell import Scalar
from linbench.errors import UsageError
from linbench.parameters import checked

if TYPE_CHECKING:
    from linbench.mechanisms.base import Mechanism

ENTRY_POINT_GROUP = "linbench.mechanisms"
BUILT_IN = {
    "softmax": "linbench.mechanisms.softmax.Softmax",
    "linear": "linbench.mechanisms.linear.Linear",
    "linformer": "linbench.mechanisms.linformer.Linformer",
    "performer": "linbench.mechanisms.performer.Performer",
    "longformer": "linbench.mechanisms.longformer.Longformer",
    "retnet": "linbench.mechanisms.retnet.RetNet",
}


def plug_ins() -> dict[str, str]:
    """Mechanisms that installed packages announce: name -> import path ``module.Class``."""
    return {point.name: point.value.replace(":", ".") for point in entry_points(group=ENTRY_POINT_GROUP)}


def targets() -> dict[str, str]:
    """Every known name -> import path. A plug-in cannot take the name of a built-in mechanism."""
    return {**plug_ins(), **BUILT_IN}


def load(name: str, target: str | None = None) -> type[Mechanism]:
    """The class of a mechanism.

    Args:
        name: a built-in name or that of an entry point; ignored when ``target`` is given.
        target: import path ``module.Class`` of a mechanism that is not registered.

    Raises:
        UsageError: the name is unknown, or the path does not lead to a mechanism.
    """
    known = targets()
    path = target or known.get(name)
    if path is None:
        raise UsageError(f"unknown mechanism '{name}'; choose from {', '.join(sorted(known))}")
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"mechanism '{name}' cannot be loaded from '{path}': {error}") from error
    from linbench.mechanisms.base import Mechanism

    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise UsageError(f"mechanism '{name}': '{path}' is not a subclass of linbench.mechanisms.base.Mechanism")
    return found


def descriptions() -> dict[str, dict[str, Any]]:
    """Every known mechanism by name: kind, forms, implementations, hyperparameters with defaults and ranges, paper."""
    return {name: _description(load(name)) for name in sorted(targets())}


def _description(cls: type[Mechanism]) -> dict[str, Any]:
    about = cls.description
    schema = cls.hyperparameters().model_json_schema().get("properties", {})
    stated = ("default", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    return {
        "kind": about.kind,
        "forms": ["causal" if causal else "full" for causal in about.causal_forms],
        "implementations": list(cls.implementations()),
        "hyperparameters": {key: {k: field[k] for k in stated if k in field} for key, field in schema.items()},
        "summary": about.summary,
        "paper": about.paper,
        "arxiv": about.arxiv,
        "year": about.year,
    }


def build(
    name: str,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    causal: bool,
    implementation: str = "torch",
    seed: int = 0,
    target: str | None = None,
    **hyperparameters: Scalar,
) -> Mechanism:
    """Build a mechanism: ``build("performer", heads=4, key_dim=64, value_dim=64, causal=True, features=128)``.

    Raises:
        UsageError: unknown mechanism, implementation or hyperparameter, or a value outside its range.
    """
    from linbench.mechanisms.base import Geometry

    cls = load(name, target)
    if implementation not in cls.implementations():
        choices = ", ".join(cls.implementations())
        raise UsageError(f"{name} has no implementation '{implementation}'; choose from {choices}")
    values = checked(cls.hyperparameters(), hyperparameters, f"mechanism.{name}", "hyperparameters")
    return cls(Geometry(heads, key_dim, value_dim, causal, implementation, seed), **values)
