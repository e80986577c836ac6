"""The contract of a result: what became of a cell, and which numbers each outcome may carry.

Schema history (the number is in every line that is written; readers keep every older one):

1. First version: a ``run`` line with the environment, then one ``cell`` line for each cell.
2. ``cost`` says how time and memory are claimed to grow; ``error`` judges against the mechanism's own target where it
   has one; blocks ``fit``, ``structure`` and ``kernel``.
3. ``speed`` says whether the warm-up became steady; ``error`` has positions, gradients and seeds; ``structure`` has the
   implied attention map.
4. Rounds in processes of several servers; evidence of what disturbed a time; peaks of the device; cold starts and
   frontiers; passes ``prefill`` and ``decode``; what is kept for the backward and for the next token.
5. ``configurations``: how the fused kernels of a cell were compiled.
6. ``structure`` has singular values and a coarse picture of the attention map.
"""

from linbench.record.base import MEASURED, SCHEMA_VERSION, Block, Status
from linbench.record.environment import Environment, Peaks
from linbench.record.frontier import Frontier, Probe
from linbench.record.judgement import (
    AttentionMap,
    Check,
    Cost,
    Error,
    Fit,
    Kernel,
    MapPicture,
    PositionError,
    Structure,
)
from linbench.record.lines import Record, Round, Run
from linbench.record.memory import Memory
from linbench.record.times import ColdStart, Conditions, DeviceConditions, Speed

__all__ = [
    "MEASURED",
    "SCHEMA_VERSION",
    "AttentionMap",
    "Block",
    "Check",
    "ColdStart",
    "Conditions",
    "Cost",
    "DeviceConditions",
    "Environment",
    "Error",
    "Fit",
    "Frontier",
    "Kernel",
    "MapPicture",
    "Memory",
    "Peaks",
    "PositionError",
    "Probe",
    "Record",
    "Round",
    "Run",
    "Speed",
    "Status",
    "Structure",
]
