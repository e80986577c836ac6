"""Names of mechanisms: built in, from the entry-point group ``linbench.mechanisms``, or by import path.

Nothing here imports torch until a mechanism is loaded.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from linbench.cell import Cell, Scalar
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
    "taylor": "linbench.mechanisms.taylor.Taylor",
    "mamba": "linbench.mechanisms.mamba.Mamba",
    "hedgehog": "linbench.mechanisms.hedgehog.Hedgehog",
    "cosformer": "linbench.mechanisms.cosformer.CosFormer",
    "rfa": "linbench.mechanisms.rfa.RFA",
    "polysketch": "linbench.mechanisms.polysketch.PolySketch",
    "based": "linbench.mechanisms.based.Based",
    "gla": "linbench.mechanisms.gla.GLA",
    "hgrn2": "linbench.mechanisms.hgrn2.HGRN2",
    "mamba2": "linbench.mechanisms.mamba2.Mamba2",
    "rwkv4": "linbench.mechanisms.rwkv4.RWKV4",
    "rwkv6": "linbench.mechanisms.rwkv6.RWKV6",
    "lightning": "linbench.mechanisms.lightning.Lightning",
    "deltanet": "linbench.mechanisms.deltanet.DeltaNet",
    "gated_deltanet": "linbench.mechanisms.gated_deltanet.GatedDeltaNet",
    "kda": "linbench.mechanisms.kda.KimiDeltaAttention",
    "rwkv7": "linbench.mechanisms.rwkv7.RWKV7",
    "hyena": "linbench.mechanisms.hyena.Hyena",
    "nystrom": "linbench.mechanisms.nystrom.Nystrom",
    "efficient": "linbench.mechanisms.efficient.Efficient",
    "flatten": "linbench.mechanisms.flatten.FLatten",
    "rala": "linbench.mechanisms.rala.RALA",
    "reformer": "linbench.mechanisms.reformer.Reformer",
    "log_linear": "linbench.mechanisms.log_linear.LogLinear",
    "mesa": "linbench.mechanisms.mesa.Mesa",
    "nsa": "linbench.mechanisms.nsa.NSA",
    "galerkin": "linbench.mechanisms.galerkin.Galerkin",
    "fourier": "linbench.mechanisms.fourier.Fourier",
    "gnot": "linbench.mechanisms.gnot.GNOT",
    "oformer": "linbench.mechanisms.oformer.OFormer",
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
    path = target or BUILT_IN.get(name) or plug_ins().get(name)
    if path is None:
        raise UsageError(f"unknown mechanism '{name}'; choose from {', '.join(sorted(targets()))}")
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module that is not ours may raise anything when it is imported
        told = str(error) or type(error).__name__
        raise UsageError(f"mechanism '{name}' cannot be loaded from '{path}': {told}") from error
    from linbench.mechanisms.base import Mechanism

    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise UsageError(f"mechanism '{name}': '{path}' is not a subclass of linbench.mechanisms.base.Mechanism")
    return found


def descriptions() -> dict[str, dict[str, Any]]:
    """Every known mechanism by name: kind, forms, implementations, hyperparameters with defaults and ranges, paper."""
    return {name: _described(name) for name in sorted(targets())}


def _described(name: str) -> dict[str, Any]:
    """The description; of an installed plug-in that cannot be loaded the reason, in place of it."""
    try:
        return _description(load(name))
    except UsageError as error:
        if name in BUILT_IN:
            raise
        return {"about": f"not to be used: {error}"}


def _description(cls: type[Mechanism]) -> dict[str, Any]:
    from linbench.mechanisms.base import Mechanism

    about = cls.description
    schema = cls.hyperparameters().model_json_schema().get("properties", {})
    stated = ("default", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    return {
        "kind": about.kind,
        "forms": ["causal" if causal else "full" for causal in about.causal_forms],
        "implementations": list(cls.implementations()),
        "hyperparameters": {key: {k: field[k] for k in stated if k in field} for key, field in schema.items()},
        "decodes": True in about.causal_forms and cls.step is not Mechanism.step,
        "time": about.time,
        "memory": about.memory,
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


def of_cell(cell: Cell, *, seed: int | None = None) -> Mechanism:
    """The cell's mechanism in the cell's implementation, with another seed where one is given.

    Raises:
        UsageError: as :func:`build`.
    """
    return build(
        cell.mechanism,
        heads=cell.heads,
        key_dim=cell.head_dim,
        value_dim=cell.value_dim,
        causal=cell.causal,
        implementation=cell.implementation,
        seed=cell.seed if seed is None else seed,
        target=cell.target,
        **cell.hyperparameters,
    )
