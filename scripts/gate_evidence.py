"""Is the speed gate right? Run it with scripts/gate_evidence.

A small repository is made whose mechanisms are linear attention that takes longer by a known share: 0 in the first
commit, 3, 5, 10 and 20 % in the second. The gate runs on it as anybody's would; what it says is kept run by run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from linbench.environment import default_threads, describe

SIZES = {"Three": 0.03, "Five": 0.05, "Ten": 0.1, "Twenty": 0.2}
MOST_NOT_PASSED, FEWEST_FOUND = 0.05, 0.95
"""Of identical cells, and of slowdowns of 20 %."""
MECHANISM = '''"""Linear attention that takes longer by a share of its own time, and is wrong where it is told to be."""
import time

from linbench.mechanisms.linear import Linear

SHARES = {shares}
FACTOR = {factor}


class Stretched(Linear):
    """Waits after its work, as long as a share of it."""

    def forward_torch(self, q, k, v):
        start = time.perf_counter()
        output = super().forward_torch(q, k, v)
        if FACTOR != 1:
            return v * FACTOR
        end = time.perf_counter()
        end += (end - start) * SHARES[type(self).__name__]
        while time.perf_counter() < end:
            pass
        return output
'''
SHAPE = ("length=1024", "heads=4", "head_dim=32", "causal=false", "pass=forward", "measure=[speed]")


def main() -> int:
    """Run the parts, keep and print what they find; 1 if the gate was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=20, help="of `same` and `slowdowns` each (default: %(default)d)")
    parser.add_argument("--minutes", type=float, default=120.0, help="start no further run of a part after that many")
    parser.add_argument("--output", type=Path, help="folder for what is found (default: results/MACHINE/gate)")
    options = parser.parse_args()
    environment = describe(["cpu"], default_threads())
    folder = options.output or Path(__file__).parents[1] / "results" / environment.machine / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    right = True
    for name in options.parts or PARTS:
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.is_file() else {"runs": []}
        found["environment"] = environment.model_dump()
        with tempfile.TemporaryDirectory() as away:
            PARTS[name](Path(away), found, path, options)
        summary = SUMMARIES[name](found["runs"])
        print(f"{name}: {summary['text']}", flush=True)
        right &= summary["right"]
        _keep(path, found | {"summary": summary})
    return int(not right)


def same(folder: Path, found: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Base against itself, two cells a run."""
    _repository(folder, dict.fromkeys(SIZES, 0.0))
    _repeat(folder, found, path, options, ["--base", "HEAD", "--all"], list(SIZES)[:2])


def slowdowns(folder: Path, found: dict[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Four cells a run, each slower by its own share."""
    _repository(folder, dict.fromkeys(SIZES, 0.0), SIZES)
    _repeat(folder, found, path, options, ["--base", "HEAD~1", "--budget-s", "240"], list(SIZES))


def refusals(folder: Path, found: dict[str, Any], path: Path, _: argparse.Namespace) -> None:
    """A head that is faster and wrong, and a base that does not build."""
    if found["runs"]:
        return
    _repository(folder / "wrong", dict.fromkeys(SIZES, 0.0))
    _commit(folder / "wrong", dict.fromkeys(SIZES, 0.0), factor=1.5)
    found["runs"].append({"case": "wrong and faster"} | _gate(folder / "wrong", ["--base", "HEAD~1"], ["Three"], 0))
    _repository(folder / "broken", dict.fromkeys(SIZES, 0.0))
    project = folder / "broken" / "pyproject.toml"
    project.write_text("[build-system]\nrequires = []\nbuild-backend = 'nowhere'\n")
    _commit(folder / "broken", dict.fromkeys(SIZES, 0.0))
    project.unlink()
    found["runs"].append({"case": "base does not build"} | _gate(folder / "broken", ["--base", "HEAD"], ["Three"], 0))
    _keep(path, found)


def _repeat(
    folder: Path, found: dict[str, Any], path: Path, options: argparse.Namespace, words: list[str], names: list[str]
) -> None:
    started = time.monotonic()
    for index in range(len(found["runs"]), options.runs):
        if time.monotonic() - started > options.minutes * 60:
            print(f"{path.stem}: stopped after {index} of {options.runs} runs; the same command goes on", flush=True)
            return
        found["runs"].append(_gate(folder, words, names, index))
        _keep(path, found)
        run = found["runs"][-1]
        left_min = (options.runs - index - 1) * run["spent_s"] / 60
        print(f"{path.stem} {index + 1}: {run['verdict']}; {run['spent_s']:.0f} s, {left_min:.0f} min left", flush=True)


def _gate(folder: Path, words: list[str], names: list[str], seed: int) -> dict[str, Any]:
    """One run of the gate, as its JSON tells it, with its exit code."""
    target = f"mechanism._target_=[{','.join(f'stretched.{name}' for name in names)}]"
    command = [sys.executable, "-m", "linbench", "gate", "speed", *words, "--seed", str(seed), "--json", "found.json"]
    done = subprocess.run(
        [*command, "mechanism=[]", target, *SHAPE, "measure.speed.budget_s=0.1", "measure.speed.max_samples=60"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if not (folder / "found.json").is_file():
        raise RuntimeError(f"linbench gate speed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    (folder / "found.json").unlink()
    cells = [
        {
            "mechanism": cell["cell"]["mechanism"],
            **{key: cell[key] for key in ("verdict", "reason", "smallest", "p_slower", "floor", "blocks", "dropped")},
            "ratio": cell["ratio"] and [cell["ratio"][key] for key in ("value", "low", "high")],
        }
        for cell in result["cells"]
    ]
    kept = {key: result[key] for key in ("verdict", "reason", "processes", "spent_s")}
    return {"exit_code": done.returncode, **kept, "cells": cells}


def _repository(folder: Path, *commits: dict[str, float]) -> None:
    folder.mkdir(exist_ok=True)
    _git(folder, "init", "--quiet")
    for shares in commits:
        _commit(folder, shares)


def _commit(folder: Path, shares: dict[str, float], factor: float = 1) -> None:
    classes = "".join(f"\n\nclass {name}(Stretched):\n    pass\n" for name in shares)
    (folder / "stretched.py").write_text(MECHANISM.format(shares=shares, factor=factor) + classes)
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--allow-empty", "--message", "another")


def _git(folder: Path, *words: str) -> None:
    names = ["-c", "user.name=linbench", "-c", "user.email=linbench@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *words], cwd=folder, check=True)


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: an interruption loses no run."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(found, indent=1) + "\n")
    written.replace(path)


def _summary_of_same(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(cell["verdict"] for run in runs for cell in run["cells"])
    total = counts.total()
    other = 1 - counts["PASS"] / total if total else 1.0
    text = f"{len(runs)} runs of identical code, {total} cells: {dict(counts)}; {other:.1%} not PASS (at most 5 %)"
    return {"text": text, "right": other <= MOST_NOT_PASSED and not counts["SLOWER"], "verdicts": dict(counts)}


def _summary_of_slowdowns(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        name: Counter(cell["verdict"] for run in runs for cell in run["cells"] if cell["mechanism"] == name.lower())
        for name in SIZES
    }
    rates = {f"{SIZES[name]:.0%}": one["SLOWER"] / one.total() if one else 0.0 for name, one in counts.items()}
    told = ", ".join(f"{size}: {rate:.0%}" for size, rate in rates.items())
    text = f"{len(runs)} runs; called SLOWER where it was slower by {told} (at least 95 % of the last)"
    return {
        "text": text,
        "right": rates["20%"] >= FEWEST_FOUND,
        "detection_rates": rates,
        "verdicts": {name: dict(one) for name, one in counts.items()},
    }


def _summary_of_refusals(runs: list[dict[str, Any]]) -> dict[str, Any]:
    codes = {run["case"]: [run["exit_code"], run["verdict"]] for run in runs}
    expected = {"wrong and faster": [1, "WRONG"], "base does not build": [4, "INVALID"]}
    return {
        "text": "; ".join(f"{case}: {code} {verdict}" for case, (code, verdict) in codes.items()),
        "right": codes == expected,
        "exit_codes": codes,
    }


PARTS = {"same": same, "slowdowns": slowdowns, "refusals": refusals}
SUMMARIES = {"same": _summary_of_same, "slowdowns": _summary_of_slowdowns, "refusals": _summary_of_refusals}


if __name__ == "__main__":
    sys.exit(main())
