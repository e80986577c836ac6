"""The committed table of binaries is about the code that is here, and keeps its budget."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = json.loads((ROOT / "results" / "kernel_costs.json").read_text())
PINNED = "3.7.1"
"""The Triton of scripts/constraints.txt, for which the budget holds; what others make of it is in the table."""
KNOWN = ("kernel", "mechanisms", "pass", "gated", "one_pass", "config", "intermediate_bytes", "state_bytes")
"""What of an object follows from the code alone, without an assembler."""


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("kernel_costs")


@pytest.fixture
def uncompiled(costs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same with nothing read from a binary: what is launched, and with which configuration."""
    nothing = {field.name: 0 for field in dataclasses.fields(costs.binaries.Binary)}
    monkeypatch.setattr(costs.binaries, "compiled", lambda launch, arch: costs.binaries.Binary(**nothing))
    monkeypatch.setattr(costs.binaries, "ctas_per_multiprocessor", lambda binary, arch, warps: 1)
    monkeypatch.setattr(costs.binaries, "assembler", lambda arch: None)
    return costs


def known(rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps({name: row[name] for name in KNOWN}, sort_keys=True) for row in rows)


def test_the_table_is_what_the_defaults_launch(uncompiled: ModuleType) -> None:
    """Every part of it that is there, and the one that the budget is about is there for every family."""
    parts: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in ROWS:
        if row["triton"] == PINNED:
            parts.setdefault(uncompiled.cell(row), []).append(row)
    needed = {(family, "sm_90", "bfloat16", width) for family in uncompiled.FAMILIES for width in (64, 128)}
    assert needed <= set(parts)
    for cell, table in parts.items():
        assert known(table) == known(uncompiled.costs(*cell)), cell


def test_no_default_breaks_its_budget(costs: ModuleType) -> None:
    pinned = [row for row in ROWS if row["triton"] == PINNED]
    over = {costs.table.name(row): costs.over_budget(row) for row in pinned}
    assert {name: reason for name, reason in over.items() if reason is not None} == {}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"instructions": 16}, "cannot be a kernel"),
        ({"serialised_wgmma": 1}, "serialised"),
        ({"state_bytes": 4}, "states in memory"),
        ({"tensor_core_instructions": 0}, "no tensor core"),
        ({"spill_bytes": 4}, "spilled"),
        ({"spill_bytes": 4, "pass": "backward"}, "spilled"),
        ({"spill_bytes": 257, "pass": "backward", "gated": True}, "spilled"),
        ({"spill_bytes": 256, "pass": "backward", "gated": True}, None),
        ({"spill_bytes": 4, "key_dim": 256}, None),
        ({"spill_bytes": 4, "kernel": "features.queries", "mechanisms": ["hedgehog"], "pass": "backward"}, "4 bytes"),
        ({"spill_bytes": 4, "arch": "sm_80"}, None),
        ({"state_bytes": 4, "one_pass": False}, None),
    ],
)
def test_what_breaks_a_budget(changed: dict[str, Any], reason: str | None, costs: ModuleType) -> None:
    fine = {
        "kernel": "additive.forward",
        "mechanisms": ["retnet"],
        "pass": "forward",
        "gated": False,
        "one_pass": True,
        "arch": "sm_90",
        "dtype": "bfloat16",
        "key_dim": 128,
        "value_dim": 128,
        "instructions": 1000,
        "products": 4,
        "tensor_core_instructions": 16,
        "serialised_wgmma": 0,
        "spill_bytes": 0,
        "state_bytes": 0,
    }
    assert costs.over_budget(fine) is None
    found = costs.over_budget({**fine, **changed})
    assert found is None if reason is None else reason in found


def test_a_pass_is_predicted_from_all_that_its_kernels_move(costs: ModuleType) -> None:
    row = {"arch": "sm_90", "dtype": "bfloat16", "triton": PINNED, "key_dim": 64, "mechanisms": ["one", "two"]}
    forward = {**row, "pass": "forward", "moved_tensors": 4, "predicted_h200_ms": 0.5}
    backward = {**row, "pass": "backward", "moved_tensors": 10, "predicted_h200_ms": 1.25}
    more = {**backward, "moved_tensors": 2.5, "predicted_h200_ms": 0.25, "mechanisms": ["two"]}
    others = [{**forward, "arch": "sm_80"}, {**forward, "dtype": "float32"}, {**forward, "moved_tensors": None}]
    title, *lines, _ = costs.table.predictions([forward, backward, more, *others])
    assert "none of them measured" in title
    assert lines == [
        "| one | 64 | 4 | 0.500 | 10 | 1.250 | 14 | 1.750 |\n",
        "| two | 64 | 4 | 0.500 | 12.5 | 1.500 | 16.5 | 2.000 |\n",
    ]
    assert costs.table.predictions(others) == []


def test_a_scan_of_the_additive_family_keeps_little_beside_its_results(costs: ModuleType) -> None:
    """Numbers per token alone, in a share of one tensor: a state for every chunk would be twice a tensor."""
    sizes = importlib.import_module("kernel_binaries.rows")
    tokens = sizes.BATCH * sizes.HEADS * sizes.LENGTH
    for row in (row for row in ROWS if row["family"] == "additive"):
        tensor_bytes = tokens * row["key_dim"] * sizes.DTYPES[row["dtype"]].itemsize
        assert row["intermediate_bytes"] <= 0.5 * tensor_bytes, row["mechanisms"]
