"""The table of a class of devices, chosen by binaries: for where nothing has been measured yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from linbench_kernels import tables
from linbench_kernels.choices import Choice, replaced

from kernel_binaries import additive, binaries
from kernel_binaries.budget import GATED_BACKWARD_BYTES
from kernel_binaries.launches import Launch, recorded
from kernel_binaries.rows import Asked

TUNED = Path(tables.__file__).parent / "tuned"
SOURCE = "chosen by binary, not measured"
WIDTHS = (64, 128)
LARGEST_SHARED = 227 * 1024
"""Bytes that one program may have on sm_90."""
CANDIDATES = {
    "forward": ((32, 4, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2)),
    "backward": ((64, 4, 2), (64, 8, 2)),
}
"""Columns, warps and stages that are tried beside the rule's, by pass."""


def write(arch: str) -> Path:
    """Choose for the additive family in bf16, and write the file of ``arch``."""
    path = TUNED / f"{arch}.json"
    for width in WIDTHS:
        tables.write(path, SOURCE, list(chosen(arch, width)))
    return path


def chosen(arch: str, width: int) -> Iterator[dict[str, Any]]:
    """The best candidate for every task at D = M = ``width``, the rule's own configuration among them.

    One that spills, or whose products wait for each other, is none where another does not. Then the fewest instructions
    issued for a token and head count, in the longest loop times its warps and programs; then programs side by side.
    """
    found: dict[Any, list[tuple[tuple[Any, ...], Any]]] = {}
    worst: dict[tuple[Any, Any], tuple[Any, ...]] = {}
    for variant in additive.VARIANTS:
        for asked in additive.calls(torch.bfloat16, width, variant):
            seen = set()
            for candidate in (None, *CANDIDATES.get(asked.pass_, ())) if asked.pass_ != "step" else ():
                task, config, launch = tried(arch, asked, candidate)
                if config not in seen:
                    seen.add(config)
                    cost = costs(launch, arch, asked.gated)
                    worst[task, config] = max(worst.get((task, config), cost), cost)
    for (task, config), cost in worst.items():
        found.setdefault(task, []).append((cost, config))
    for task, tries in found.items():
        cost, best = min(tries, key=lambda one: one[0])
        config = {name: getattr(best, name) for name in ("chunk", "columns", "warps", "stages", "tma")}
        why = dict(zip(("over_budget", "spill_bytes", "issued", "ctas_per_multiprocessor"), cost, strict=True))
        why["ctas_per_multiprocessor"] *= -1
        yield {"family": "additive", "task": tables.described((task,)), "config": config, "why": why}


def tried(arch: str, asked: Asked, candidate: tuple[int, int, int] | None) -> tuple[Any, Any, Launch]:
    """The task of a call, the configuration that it is given, and its launch."""
    kept: list[Choice] = []
    settings = {} if candidate is None else dict(zip(("columns", "warps", "stages"), candidate, strict=True))

    def change(choice: Choice) -> Any:
        kept.append(choice)
        rule = tables.rule_of(choice.family)
        by_rule = {} if rule is None else dataclasses.asdict(rule(choice.task))
        changed = dataclasses.replace(choice.config, **{**by_rule, **settings})
        kept[-1] = dataclasses.replace(choice, config=changed)
        return changed

    with replaced(change):
        call = recorded(arch, 1, asked.wrapper, *asked.operands, **asked.options)
    launch = next(one for one in call.launches if one.name == f"additive.{asked.pass_}")
    return kept[-1].task, kept[-1].config, launch


def costs(launch: Launch, arch: str, gated: bool) -> tuple[bool, int, float, int]:
    """What is compared: the less the better."""
    binary = binaries.compiled(launch, arch)
    allowed = GATED_BACKWARD_BYTES if gated and launch.name.endswith("backward") else 0
    over = binary.spill_bytes > allowed or bool(binary.serialised_wgmma) or binary.shared_bytes > LARGEST_SHARED
    programs = launch.grid[0] / (additive.BATCH * additive.HEADS)
    issued = binary.in_loop["all"] * launch.warps * programs / launch.config["chunk"]
    ctas = binaries.ctas_per_multiprocessor(binary, arch, launch.warps)
    return over or not ctas, binary.spill_bytes, round(issued, 1), -ctas
