"""What the child says of cells before they run: cost, whether they can, and which source would make their numbers."""

from __future__ import annotations

import torch

from linbench import inputs, registry
from linbench.cell import Cell, digest
from linbench.errors import UsageError
from linbench.measure.check import check_rows
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism
from linbench.prospect import Prospect
from linbench.protocol import ForeseeRequest, Foresight, Measure
from linbench.provenance import source_hash
from linbench.record import Cost


def foresee(request: ForeseeRequest) -> Foresight:
    """What each cell costs, whether it can run, and which source would make its numbers."""
    return Foresight(prospects=[_prospect(cell, request) for cell in request.cells])


def _prospect(cell: Cell, request: ForeseeRequest) -> Prospect:
    try:
        cls = registry.load(cell.mechanism, cell.target)
    except UsageError as error:
        if cell.mechanism in registry.plug_ins():  # it joins every sweep, and must not take it with it
            return Prospect(unsupported=str(error), code="none")
        return Prospect(usage_error=str(error))
    try:
        if cell.implementation not in cls.implementations():
            choices = ", ".join(cls.implementations())
            reason = f"{cell.mechanism} has no implementation '{cell.implementation}', only {choices}"
            return Prospect(unsupported=reason, code="none")
        mechanism = registry.of_cell(cell)
        lacking = mechanism.unsupported(cell) or _undecodable(mechanism, cell) or inputs.unsupported(cell)
        lacking = lacking or fused.untimed(cell)
        family = cell.inputs_target or inputs.families()[cell.inputs].replace(":", ".")
        modules = [cls.__module__, family.rpartition(".")[0], "linbench.measure.check"]
        modules += [wanted.target.rpartition(".")[0] for wanted in request.measures.values()]
        made_with = [source_hash(modules), torch.__version__, request.threads, _settings(request.measures)]
        if (data := inputs.fingerprint(cell)) is not None:
            made_with.append(data)
        if lacking:
            return Prospect(unsupported=lacking, code=digest(made_with))
        state = mechanism.state_bytes(cell.length, getattr(torch, cell.dtype))
        cost = Cost(
            flops=mechanism.pass_flops(cell),
            min_bytes=mechanism.pass_bytes(cell),
            state_bytes=state,
            claimed_time=cls.description.time,
            claimed_memory=cls.description.memory,
        )
        rows = check_rows(cell.length, cell.batch * cell.heads)
        return Prospect(
            cost=cost,
            code=digest(made_with),
            check_rows=1 if cell.pass_ == "decode" else rows,
            sequential_check=cls.sequential_reference,
            setup_flops=_setup_flops(mechanism, cell),
        )
    except UsageError as error:
        return Prospect(usage_error=str(error))


def _setup_flops(mechanism: Mechanism, cell: Cell) -> int:
    """What a decode cell computes before its token: a prompt, which without a prefill of its own is as many steps."""
    if cell.pass_ != "decode":
        return 0
    if type(mechanism).prefill is Mechanism.prefill:
        return mechanism.decode_flops(cell) * cell.length
    return mechanism.pass_flops(cell.model_copy(update={"pass_": "prefill"}))


def _undecodable(mechanism: Mechanism, cell: Cell) -> str | None:
    """Why the cell's pass cannot go token by token, where it has to."""
    if cell.pass_ not in ("prefill", "decode"):
        return None
    if not cell.causal:
        return f"{cell.pass_} goes from token to token: it needs causal=true"
    try:
        mechanism.require_decoding()
    except UsageError as error:
        return str(error)
    own = mechanism.generating()
    if cell.implementation not in own:
        ways = "one way" if len(own) == 1 else f"{len(own)} ways"
        return f"{cell.mechanism} has {ways} to {cell.pass_}, implementation={' or '.join(own)}"
    return None


def _settings(measures: dict[str, Measure]) -> object:
    return {name: measure.model_dump(mode="json") for name, measure in measures.items()}
