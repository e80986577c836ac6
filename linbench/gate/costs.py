"""What kernels cost by their binaries, held against the table that is checked in: exact, and no GPU is needed.

The objects are those of ``scripts/kernel_costs --json``. Each column has a rule, and says why it matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Row = dict[str, Any]
Key = tuple[Any, ...]
COORDINATES = ("triton", "arch", "family", "kernel", "pass", "dtype", "key_dim", "value_dim")
"""What names a binary, beside its mechanisms. Its tile does not: another one is held against the last."""
DENSE = "dense"
"""How calls come where a row does not say it; a ``form`` is a coordinate, too."""
LONGER_LOOP = 1.05
"""Instructions of the longest loop may grow by this: assemblers shuffle a few."""


class CostVerdict(StrEnum):
    """Of one binary."""

    PASS = "PASS"
    WORSE = "WORSE"
    BETTER = "BETTER"
    NEW = "NEW"
    GONE = "GONE"


@dataclass(frozen=True)
class Rule:
    """What may become of a column."""

    title: str
    worse: Callable[[float, float], bool]
    """Of the number before and the number now."""
    why: str


def _more(before: float, now: float) -> bool:
    return now > before


def _none_left(before: float, now: float) -> bool:
    return before > 0 and now == 0


RULES: dict[str, Rule] = {
    "spill_bytes": Rule(
        "bytes spilled", _more, "every thread stores and loads them in every turn of a loop: registers ran out"
    ),
    "stack_bytes": Rule("bytes of stack", _more, "what lies on the stack is in memory, not in registers"),
    "serialised_wgmma": Rule(
        "serialised products", _more, "ptxas lets products wait for each other (C7510 to C7515): tensor cores idle"
    ),
    "tensor_core_instructions": Rule("tensor-core instructions", _none_left, "the products have left the tensor cores"),
    "in_loop.asynchronous_load": Rule(
        "asynchronous loads in the loop", _none_left, "nothing is loaded ahead any more: every turn waits for memory"
    ),
    "in_loop.all": Rule(
        "instructions in the loop",
        lambda before, now: now > LONGER_LOOP * before,
        "every chunk of tokens pays for them",
    ),
    "ctas_per_multiprocessor": Rule(
        "programs per multiprocessor",
        lambda before, now: now < before,
        "fewer programs hide less of each other's waiting (registers or shared memory bind)",
    ),
    "state_bytes": Rule("bytes of states in memory", _more, "states of chunks cross memory, which one pass avoids"),
    "intermediate_bytes": Rule("bytes of intermediates", _more, "they are written and read besides the results"),
    "moved_tensors": Rule("tensors moved", _more, "the time of a kernel that memory binds"),
}
TOLD = ("registers", "shared_bytes", "instructions")
"""Columns that are shown where they differ and judge nothing: what follows from them does."""


@dataclass(frozen=True)
class Change:
    """One column before and now."""

    column: str
    before: float | None
    now: float | None
    worse: bool

    @property
    def told(self) -> str:
        """As a person says it, with why it matters where it is worse."""
        rule = RULES.get(self.column)
        title = rule.title if rule else self.column.replace("_", " ")
        numbers = f"{title}: {_number(self.before)} before, {_number(self.now)} now"
        return f"{numbers} ({rule.why})" if rule and self.worse else numbers


@dataclass(frozen=True)
class CostFinding:
    """One binary held against its budget."""

    row: Row
    """As it is now; as it was where it is gone."""
    verdict: CostVerdict
    changes: tuple[Change, ...] = ()
    reason: str | None = None
    """Why it is worse whatever the table says: it breaks a budget that holds for all, or does not compile."""

    @property
    def name(self) -> str:
        """The binary in words."""
        row = self.row
        if "failed" in row:
            return f"{row['arch']} {row['family']} {row['dtype']} {row['key_dim']}"
        return f"{row['arch']} {row['mechanisms'][0]} {row['pass']} {row['kernel']} {row['dtype']} {row['key_dim']}"


def compare(table: Iterable[Row], fresh: Sequence[Row]) -> list[CostFinding]:
    """Every fresh binary against that of the table, then those of the table whose cell was compiled and lacks them.

    Args:
        table: the budgets, of any version of Triton.
        fresh: compiled now; an object with ``failed`` in place of columns is a family that does not compile.
    """
    known = _keyed(table)
    compiled = _keyed(row for row in fresh if "failed" not in row)
    broken = [row for row in fresh if "failed" in row]
    findings = [CostFinding(row, CostVerdict.WORSE, reason=f"does not compile: {row['failed']}") for row in broken]
    findings += [_judged(known.get(key), row) for key, row in compiled.items()]
    cells = {_cell(row) for row in compiled.values()}
    gone = [row for key, row in known.items() if key not in compiled and _cell(row) in cells]
    return findings + [CostFinding(row, CostVerdict.GONE) for row in gone]


def differs(before: Row, now: Row) -> dict[str, list[float | None]]:
    """Judged columns that are not the same, each with the two numbers: what a new budget has to give a reason for."""
    return {change.column: [change.before, change.now] for change in _changes(before, now) if change.column in RULES}


def twins(table: Iterable[Row], fresh: Iterable[Row]) -> list[tuple[Row | None, Row]]:
    """Every fresh row with its row of the table, None where it has none."""
    known = _keyed(table)
    return [(known.get(key), row) for key, row in _keyed(fresh).items()]


def _judged(before: Row | None, now: Row) -> CostFinding:
    reason = now.get("over_budget")
    if before is None:
        return CostFinding(now, CostVerdict.WORSE if reason else CostVerdict.NEW, reason=reason)
    changes = tuple(_changes(before, now))
    if reason and reason == before.get("over_budget"):
        reason = None  # it was so before: the table says it, and this change has not made it so
    worse = reason is not None or any(change.worse for change in changes)
    better = any(_better(change) for change in changes)
    verdict = CostVerdict.WORSE if worse else CostVerdict.BETTER if better else CostVerdict.PASS
    return CostFinding(now, verdict, changes, reason)


def _changes(before: Row, now: Row) -> Iterable[Change]:
    for column in (*RULES, *TOLD):
        old, new = (_of(row, column) for row in (before, now))
        if old == new:
            continue
        rule = RULES.get(column)
        yield Change(column, old, new, rule is not None and old is not None and (new is None or rule.worse(old, new)))


def _better(change: Change) -> bool:
    rule = RULES.get(change.column)
    return rule is not None and None not in (change.before, change.now) and rule.worse(change.now, change.before)  # type: ignore[arg-type]


def _of(row: Row, column: str) -> float | None:
    found: Any = row
    for name in column.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found  # type: ignore[no-any-return]


def _keyed(rows: Iterable[Row]) -> dict[Key, Row]:
    """By coordinates and mechanisms; the first, second, … of those that share them."""
    seen: Counter[Key] = Counter()
    found = {}
    for row in rows:
        key = (*(row[name] for name in COORDINATES), row.get("form", DENSE), *row["mechanisms"])
        found[*key, seen[key]] = row
        seen[key] += 1
    return found


def _cell(row: Row) -> Key:
    return (*(row[name] for name in ("triton", "arch", "family", "dtype", "key_dim")), row.get("form", DENSE))


def _number(value: float | None) -> str:
    return "nothing known" if value is None else f"{value:,}"
