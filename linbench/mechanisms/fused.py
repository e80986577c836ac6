"""The implementation ``triton``: the kernels of ``linbench_kernels``, which is imported when they are asked for."""

from __future__ import annotations

import os

from linbench.cell import Cell

NAME = "triton"


def unavailable(device: str, causal: bool = True) -> str | None:
    """Why no kernel can run in that form on that device of this machine, in one clause; None when one can."""
    if not causal:
        return "the triton kernels have the causal form only"
    try:
        from linbench_kernels.device import unavailable as reason
    except ImportError as error:
        return f"the triton kernels cannot be imported: {error}"
    return reason(device)


def unsupported(cell: Cell) -> str | None:
    """The same for a cell; its widths belong to it."""
    reason = unavailable(cell.device, cell.causal)
    if reason is None:
        from linbench_kernels.additive.configs import WIDEST

        if max(cell.head_dim, cell.value_dim) > WIDEST:
            return f"the triton kernels take widths up to {WIDEST}"
    return reason


def too_wide(cell: Cell, projections: int) -> str | None:
    """Why the kernels have no features of that many projections, where they could run else; None when they have."""
    if cell.implementation != NAME:
        return None
    from linbench_kernels.device import architecture
    from linbench_kernels.features.configs import widest_map

    widest = widest_map(architecture(0))
    return f"the triton kernels take up to {widest} projections" if projections > widest else None


def untimed(cell: Cell) -> str | None:
    """Why a cell that could run is not to be measured: the interpreter is there to check kernels."""
    if cell.implementation == NAME and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        return f"kernels in Triton's interpreter are never measured (linbench check {cell.mechanism} is for them)"
    return None
