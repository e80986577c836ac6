"""The implementation ``triton``: the kernels of ``linbench_kernels``, which is imported when they are asked for.

A mechanism that has kernels defines ``forward_triton``, and where they have a state also ``prefill_triton`` and
``step_triton``: see :class:`~linbench.mechanisms.base.Mechanism`. The state is that of the torch path in shape, dtype
and meaning, so that either goes on from what the other left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from linbench.cell import Cell, Scalar
from linbench.errors import UsageError

NAME = "triton"


def unavailable(device: str, causal: bool = True, forms: tuple[bool, ...] = (True,)) -> str | None:
    """Why no kernel can run in that form on that device of this machine, in one clause; None when one can.

    Args:
        forms: the values of ``causal`` that the kernels have.
    """
    if causal not in forms:
        return f"the triton kernels have the {'non-causal' if causal else 'causal'} form only"
    try:
        from linbench_kernels.device import unavailable as reason
    except ImportError as error:
        return f"the triton kernels cannot be imported: {error}"
    return reason(device)


def require(device: str, causal: bool = True, forms: tuple[bool, ...] = (True,)) -> None:
    """Nothing where a kernel can run.

    Raises:
        UsageError: none can, with the reason of :func:`unavailable`.
    """
    if (reason := unavailable(device, causal, forms)) is not None:
        raise UsageError(reason)


def unsupported(cell: Cell, forms: tuple[bool, ...] = (True,)) -> str | None:
    """:func:`unavailable` for a cell; its widths belong to it."""
    reason = unavailable(cell.device, cell.causal, forms)
    if reason is None:
        from linbench_kernels.additive.configs import WIDEST

        if max(cell.head_dim, cell.value_dim) > WIDEST:
            return f"the triton kernels take widths up to {WIDEST}"
    return reason


@contextmanager
def configurations(implementation: str) -> Iterator[dict[str, dict[str, Scalar]]]:
    """How the kernels that are called meanwhile are compiled, by family and kernel, and who says so; filled at the end.

    Stays empty where the implementation is another one, or no kernel can be imported.
    """
    found: dict[str, dict[str, Scalar]] = {}
    try:
        from linbench_kernels.choices import noted
    except ImportError:
        implementation = ""
    if implementation != NAME:
        yield found
        return
    with noted() as kept:
        yield found
    for choice in kept:
        name = f"{choice.family} {choice.kernel}"
        again = sum(known == name or known.startswith(f"{name} (") for known in found)
        found[f"{name} ({again + 1})" if again else name] = {**choice.settings, "source": choice.source}


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
