"""What a part finds, and how it runs linbench."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from linbench.record import Environment, Record, Run
from linbench.store import read_all, results_files

SCRIPTS = Path(__file__).parents[1]


class Claim(BaseModel):
    """One sentence, the number behind it, and its bound."""

    claim: str
    measured: float
    bound: float
    unit: str = ""
    holds: bool
    note: str = ""


class Part(BaseModel):
    """What one part found."""

    part: str
    question: str
    claims: list[Claim]
    commands: list[str]
    environment: Environment
    details: dict[str, object] = {}


class Sweep(NamedTuple):
    """A sweep that was run: its records in the order of their cells' keys."""

    run: Run
    records: list[Record]
    command: str
    wall_s: float


def at_most(claim: str, measured: float, bound: float, unit: str = "", note: str = "") -> Claim:
    """A claim that a number is not larger than its bound."""
    return Claim(claim=claim, measured=measured, bound=bound, unit=unit, holds=measured <= bound, note=note)


def sweep(*words: str, folder: Path | None = None) -> Sweep:
    """Run ``linbench run`` with these words, in a folder that is thrown away if none is given.

    In one that has a part of its records already, the rest is measured.

    Raises:
        RuntimeError: linbench ended with another exit code than 0.
    """
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as away:
        place = folder or Path(away)
        place.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "linbench", "run", *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        wall_s = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"linbench run {' '.join(words)}: {done.stderr.strip()}")
        runs, records = read_all(results_files([place]))
    ordered = sorted(records, key=lambda record: record.cell.key)
    return Sweep(runs[-1], ordered, f"linbench run {' '.join(words)}", wall_s)
