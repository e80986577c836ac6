"""``linbench gate costs``: compile the defaults, hold them against the table, or write a new one with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linbench.check_table import console
from linbench.errors import UsageError
from linbench.gate.costs import CostFinding, CostVerdict, Row, compare
from linbench.verbs import Parser

SCRIPT, TABLE = Path("scripts") / "kernel_costs.py", Path("results") / "kernel_costs.json"
PASSED, WORSE, INVALID = 0, 1, 4
SCOPES = ("arch", "family", "width", "dtype", "form")
ABOUT = """Compile every kernel's default configuration ahead of time and hold it against results/kernel_costs.json."""


def run(argv: Sequence[str]) -> int:
    """Compare.

    Returns:
        0 where nothing is worse, 1 where something is or does not compile, 4 where nothing could be compared.

    Raises:
        UsageError: bad words, no checkout, or a file that is no table.
    """
    parser = Parser(prog="linbench gate costs", description=ABOUT)
    for scope in SCOPES:
        parser.add_argument(f"--{scope}", nargs="+", default=[], help="only these (default: all)")
    parser.add_argument("--repository", type=Path, default=Path(), help="a checkout of linbench (default: this folder)")
    parser.add_argument("--table", type=Path, help=f"budgets (default: {TABLE} of the checkout)")
    parser.add_argument("--fresh", type=Path, help="compare this file of kernel_costs --json; nothing is compiled")
    parser.add_argument("--update", action="store_true", help="make what is compiled now the budget; takes --reason")
    parser.add_argument("--reason", help="why the budgets change: it is kept beside those that do")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    options = parser.parse_args(argv)
    if options.update != bool(options.reason):
        raise UsageError("gate costs: --update and --reason TEXT go together")
    if options.update and (options.fresh or options.table):
        raise UsageError("gate costs: --update compiles, and writes to the table of the checkout")
    table = _rows(options.table or _checkout(options.repository) / TABLE)
    fresh, trouble = (_rows(options.fresh), None) if options.fresh else _compiled(options)
    return _told(table, fresh, trouble, options)


def _checkout(folder: Path) -> Path:
    for place in (folder.resolve(), *folder.resolve().parents):
        if (place / SCRIPT).is_file():
            return place
    raise UsageError(
        f"gate costs: {folder.resolve()} is no checkout of linbench ({SCRIPT} is not there); name one with --repository"
    )


def _rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"gate costs: {path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "arch" in row for row in rows):
        raise UsageError(f"gate costs: {path} is no table of kernel_costs: a list of objects with `arch` is needed")
    return rows


def _compiled(options: Any) -> tuple[list[Row], str | None]:
    """The rows, or none and why."""
    top = _checkout(options.repository)
    scope: list[str] = []
    for name in SCOPES:
        scope += [f"--{name}", *getattr(options, name)] if getattr(options, name) else []
    with tempfile.TemporaryDirectory(prefix="linbench-costs-") as away:
        made = Path(away) / "fresh.json"
        where = ["--reason", options.reason] if options.update else []
        paths = [str(top / "scripts"), str(top / "kernels"), str(top), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, str(top / SCRIPT), *scope, *where, "--json", str(made)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == 2:
            raise UsageError(f"gate costs: {lines[-1].partition('error: ')[2] or lines[-1]}")
        if not made.is_file():
            return [], lines[-1] if lines else "kernel_costs wrote nothing"
        return _rows(made), None


def _told(table: list[Row], fresh: list[Row], trouble: str | None, options: Any) -> int:
    out = console()
    tritons = {row["triton"] for row in fresh}
    known = {row["triton"] for row in table}
    if trouble is None and tritons and not tritons & known and not options.update:
        has = ", ".join(sorted(known)) or "none"
        trouble = f"no budgets for Triton {', '.join(sorted(tritons))}; the table has {has}"
    findings = [] if trouble else compare(table, fresh)
    for finding in findings:
        _show(out, finding)
    counts = Counter(finding.verdict for finding in findings)
    worse = bool(counts[CostVerdict.WORSE]) and not options.update
    if not findings and trouble is None:
        trouble = "nothing was compiled"
    verdict = "INVALID" if trouble else "WORSE" if worse else "PASS"
    told = ", ".join(f"{counts[one]} {one}" for one in CostVerdict if counts[one]) or "no binary compared"
    out.print(f"{told}.", markup=False)
    wrote = f"; budgets written: {options.reason}" if options.update and not trouble else ""
    out.print(f"{verdict}{f': {trouble}' if trouble else ''}{wrote}", markup=False, soft_wrap=True)
    if options.json:
        plain = [{**asdict(one), "name": one.name, "verdict": str(one.verdict)} for one in findings]
        found = {"verdict": verdict, "reason": trouble, "binaries": plain}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return INVALID if trouble else WORSE if worse else PASSED


def _show(out: Any, finding: CostFinding) -> None:
    """Nothing for what is as it was."""
    if finding.verdict is CostVerdict.PASS and not finding.changes:
        return
    out.print(f"{finding.verdict} {finding.name}", markup=False, soft_wrap=True)
    if finding.reason:
        out.print(f"    {finding.reason}", markup=False, soft_wrap=True)
    for change in finding.changes:
        out.print(f"    {change.told}", markup=False, soft_wrap=True)
