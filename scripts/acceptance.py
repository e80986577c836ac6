"""Does linbench measure what it says? Run it with scripts/acceptance."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from acceptance_parts.finding import Part

PARTS = ("known_times", "cheats", "exact_attention", "million_tokens", "sampled_errors", "repeats")
LONG = ("repeats",)


def main() -> int:
    """Run parts, keep what they find, print it; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="folder for what is found (default: results/MACHINE/acceptance)")
    parser.add_argument("--keep", type=Path, help="folder in which `repeats` keeps its runs, and goes on from them")
    options = parser.parse_args()
    failed = False
    for name in options.parts or [part for part in PARTS if part not in LONG]:
        measure = importlib.import_module(f"acceptance_parts.{name}").measure
        part: Part = measure(options.keep) if name == "repeats" else measure()
        root = Path(__file__).parents[1] / "results" / part.environment.machine / "acceptance"
        folder = options.output or root
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(part.model_dump_json(indent=1) + "\n")
        found = [Part.model_validate_json((folder / f"{one}.json").read_text()) for one in PARTS if _kept(folder, one)]
        (folder / "README.md").write_text(_table(found))
        print(_lines(part), flush=True)
        failed |= not all(claim.holds for claim in part.claims)
    return int(failed)


def _kept(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _lines(part: Part) -> str:
    lines = [part.question]
    for claim in part.claims:
        number = f"{claim.measured:.4g}{f' {claim.unit}' if claim.unit else ''} (bound {claim.bound:.4g})"
        lines.append(f"  {'holds' if claim.holds else 'FAILS'}: {claim.claim}: {number} {claim.note}".rstrip())
    return "\n".join(lines)


def _table(parts: list[Part]) -> str:
    """All parts as one page of Markdown."""
    lines = ["# Acceptance: does linbench measure what it says?", "", "Made by `scripts/acceptance`; JSON beside.", ""]
    for part in parts:
        environment = part.environment
        where = (
            f"{environment.cpu}, {environment.threads} of {environment.cores_logical} CPUs, torch {environment.torch}"
        )
        lines += [f"## {part.question}", "", f"{where}, linbench at {environment.commit or environment.linbench}.", ""]
        lines += ["| claim | measured | bound | holds |", "| --- | ---: | ---: | --- |"]
        for claim in part.claims:
            unit = f" {claim.unit}" if claim.unit else ""
            note = f" ({claim.note})" if claim.note else ""
            verdict = "yes" if claim.holds else "**no**"
            lines.append(f"| {claim.claim}{note} | {claim.measured:.4g}{unit} | {claim.bound:.4g}{unit} | {verdict} |")
        lines += ["", *(f"`{command}`" for command in part.commands), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
