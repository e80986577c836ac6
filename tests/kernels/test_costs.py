"""The committed table of binaries is about the code that is here, and keeps its budget."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = json.loads((ROOT / "results" / "kernel_costs.json").read_text())
PINNED = "3.7.1"
"""The Triton of scripts/constraints.txt, for which the budget holds; what others make of it is in the table."""


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("kernel_costs")


def test_every_configuration_of_the_table_is_the_default(costs: ModuleType) -> None:
    table = {
        (row["arch"], row["mechanisms"][0], row["pass"], row["dtype"], row["key_dim"]): row["config"]
        for row in ROWS
        if row["kernel"] == row["pass"] != "step" and row["triton"] == PINNED
    }
    found = {}
    for arch in costs.binaries.TARGETS:
        for dtype, widths in costs.WIDTHS.items():
            for width in widths:
                for variant in costs.VARIANTS:
                    for pass_, _, chosen in costs.calls(arch, costs.DTYPES[dtype], width, variant):
                        if chosen is not None:
                            found[arch, variant.mechanisms[0], pass_, dtype, width] = asdict(chosen)
    assert found == table


def test_no_default_breaks_its_budget(costs: ModuleType) -> None:
    over = [(row["arch"], row["mechanisms"], costs.over_budget(row)) for row in ROWS if row["triton"] == PINNED]
    assert [entry for entry in over if entry[2] is not None] == []


def test_a_backward_allocates_no_states(costs: ModuleType) -> None:
    """Numbers per token alone, in a share of one tensor: a state for every chunk would be twice a tensor."""
    for row in ROWS:
        tensor_bytes = costs.BATCH * costs.HEADS * costs.LENGTH * row["key_dim"] * costs.DTYPES[row["dtype"]].itemsize
        assert row["intermediate_bytes"] <= 0.5 * tensor_bytes, row["mechanisms"]
