"""The gate of costs: each column's rule, what it says, its exit codes, and a block size that makes a kernel spill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linbench.cli import main
from linbench.gate.costs import RULES, CostVerdict, compare, differs

ROOT = Path(__file__).parents[2]
ROW: dict[str, Any] = {
    "family": "additive",
    "kernel": "additive.forward",
    "mechanisms": ["linear"],
    "pass": "forward",
    "arch": "sm_90",
    "triton": "3.7.1",
    "dtype": "bfloat16",
    "key_dim": 64,
    "value_dim": 64,
    "registers": 168,
    "stack_bytes": 0,
    "spill_bytes": 0,
    "shared_bytes": 24576,
    "instructions": 1080,
    "in_loop": {"all": 600, "asynchronous_load": 8},
    "tensor_core_instructions": 128,
    "serialised_wgmma": 0,
    "ctas_per_multiprocessor": 2,
    "intermediate_bytes": 0,
    "state_bytes": 0,
    "moved_tensors": 4,
    "over_budget": None,
}
WORSE = {
    "spill_bytes": 8,
    "stack_bytes": 16,
    "serialised_wgmma": 1,
    "tensor_core_instructions": 0,
    "ctas_per_multiprocessor": 1,
    "intermediate_bytes": 4096,
    "state_bytes": 4096,
    "moved_tensors": 5,
    "in_loop": {"all": 640, "asynchronous_load": 8},
}


@pytest.mark.parametrize("column", WORSE)
def test_a_column_that_becomes_worse_fails_and_says_why_and_the_other_way_is_better(column: str) -> None:
    (found,) = compare([ROW], [ROW | {column: WORSE[column]}])
    assert found.verdict is CostVerdict.WORSE
    (change,) = found.changes
    assert " before, " in change.told
    assert f"({RULES[change.column].why})" in change.told
    (back,) = compare([ROW | {column: WORSE[column]}], [ROW])
    assert back.verdict is CostVerdict.BETTER


def test_loads_that_are_no_longer_asynchronous_fail() -> None:
    (found,) = compare([ROW], [ROW | {"in_loop": {"all": 600, "asynchronous_load": 0}}])
    assert found.verdict is CostVerdict.WORSE


@pytest.mark.parametrize("changed", [{"registers": 250}, {"in_loop": {"all": 629, "asynchronous_load": 4}}])
def test_what_has_no_consequence_is_told_and_passes(changed: dict[str, Any]) -> None:
    (found,) = compare([ROW], [ROW | changed])
    assert found.verdict is CostVerdict.PASS
    assert found.changes


def test_a_column_that_is_no_longer_known_fails() -> None:
    (found,) = compare([ROW], [ROW | {"serialised_wgmma": None}])
    assert found.verdict is CostVerdict.WORSE


def test_another_tile_is_held_against_the_last_and_twins_against_their_own() -> None:
    table = [ROW | {"config": {"chunk": 64}}, ROW | {"config": {"chunk": 64}, "instructions": 7}]
    fresh = [ROW | {"config": {"chunk": 32}}, ROW | {"config": {"chunk": 32}, "instructions": 8}]
    first, second = compare(table, fresh)
    assert not first.changes
    assert [change.column for change in second.changes] == ["instructions"]


def test_new_binaries_pass_within_the_general_budget_only() -> None:
    assert compare([], [ROW])[0].verdict is CostVerdict.NEW
    (found,) = compare([], [ROW | {"over_budget": "8 bytes spilled"}])
    assert (found.verdict, found.reason) == (CostVerdict.WORSE, "8 bytes spilled")
    (known,) = compare([ROW | {"over_budget": "8 bytes spilled"}], [ROW | {"over_budget": "8 bytes spilled"}])
    assert known.verdict is CostVerdict.PASS


def test_what_is_gone_is_named_and_what_was_not_compiled_is_not() -> None:
    other, elsewhere = ROW | {"kernel": "additive.rows"}, ROW | {"arch": "sm_80"}
    found = compare([ROW, other, elsewhere], [ROW])
    assert [one.verdict for one in found] == [CostVerdict.PASS, CostVerdict.GONE]


def test_a_family_that_does_not_compile_is_worse() -> None:
    failed = {"family": "delta", "arch": "sm_90", "dtype": "bfloat16", "key_dim": 64, "failed": "out of registers"}
    (found,) = compare([ROW], [failed])
    assert found.verdict is CostVerdict.WORSE
    assert "out of registers" in str(found.reason)


def test_only_judged_columns_need_a_reason() -> None:
    assert differs(ROW, ROW | {"registers": 1, "spill_bytes": 8}) == {"spill_bytes": [0, 8]}


def gated(tmp_path: Path, table: object, fresh: object, *words: str) -> int:
    for name, content in (("table", table), ("fresh", fresh)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = ["--table", str(tmp_path / "table.json"), "--fresh", str(tmp_path / "fresh.json")]
    return main(["gate", "costs", *paths, *words])


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "found.json"
    assert gated(tmp_path, [ROW], [ROW]) == 0
    assert gated(tmp_path, [ROW], [ROW | {"spill_bytes": 8}], "--json", str(kept)) == 1
    said = capsys.readouterr().out
    assert "WORSE sm_90 linear forward additive.forward bfloat16 64" in said
    assert "bytes spilled: 0 before, 8 now (every thread" in said
    assert json.loads(kept.read_text())["binaries"][0]["verdict"] == "WORSE"
    assert gated(tmp_path, [ROW], [ROW | {"triton": "9.9"}]) == 4
    assert "no budgets for Triton 9.9; the table has 3.7.1" in capsys.readouterr().out
    assert gated(tmp_path, [ROW], []) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--update"], "--reason TEXT go together"),
        (["--reason", "why not"], "go together"),
        (["--update", "--reason", "a", "--fresh", "x.json"], "writes to the table of the checkout"),
        (["--table", "absent.json"], "cannot be read as JSON"),
        (["--repository", "/"], "no checkout of linbench"),
        (["--arch", "sm_1"], "choose from"),
    ],
)
def test_bad_words_get_a_sentence(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = [] if "--repository" in words else ["--repository", str(ROOT)]
    assert main(["gate", "costs", *place, *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_block_size_that_makes_a_kernel_spill_is_caught_and_a_reason_makes_it_the_budget(tmp_path: Path) -> None:
    """In a checkout of its own: the table of one family as it is, then four times the columns for every warp."""
    copy = tmp_path / "checkout"
    for name in ("scripts", "kernels", "linbench", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "results").mkdir()
    scope = ["--arch", "sm_90", "--family", "wkv", "--width", "128", "--dtype", "bfloat16"]

    def costs(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "linbench", "gate", "costs", "--repository", str(copy), *scope, *words]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=280)

    table = copy / "results" / "kernel_costs.json"
    table.write_text("[]\n")
    assert costs("--update", "--reason", "first").returncode == 0
    assert costs().returncode == 0
    configs = copy / "kernels" / "linbench_kernels" / "wkv" / "configs.py"
    configs.write_text(configs.read_text().replace("columns=32, warps=1", "columns=128, warps=1"))
    found = costs()
    assert found.returncode == 1, found.stdout + found.stderr
    assert "bytes spilled: 0 before" in found.stdout
    assert costs("--update", "--reason", "wide blocks, to see what they cost").returncode == 0
    reasons = [row["reason"]["text"] for row in json.loads(table.read_text()) if row.get("reason")]
    assert set(reasons) == {"wide blocks, to see what they cost"}
    assert costs().returncode == 0
