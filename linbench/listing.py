"""What there is to choose from, as tables or JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from linbench import registry
from linbench.config import config_dir
from linbench.hydra_front import options

GROUPS = ("mechanisms", "inputs", "measures", "devices", "sweeps")
FOLDERS = {"mechanisms": "mechanism", "inputs": "inputs", "measures": "measure", "devices": "device", "sweeps": "sweep"}


def show(groups: list[str], as_json: bool) -> None:
    """Print the choices of ``groups``."""
    contents = {group: registry.descriptions() if group == "mechanisms" else _files(FOLDERS[group]) for group in groups}
    if as_json:
        print(json.dumps(contents, indent=2))
        return
    console = Console(highlight=False)
    for group, entries in contents.items():
        console.print(f"[bold]{group}[/bold]")
        for name, entry in entries.items():
            for line in _lines(name, entry):
                console.print(f"  {line}", markup=False, soft_wrap=True)
        console.print()


def _files(folder: str) -> dict[str, dict[str, Any]]:
    """The leading comment of each file of a group says what it is."""
    about = {}
    for name in options(folder):
        lines = (config_dir() / folder / f"{name}.yaml").read_text().splitlines()
        comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and "@package" not in line]
        about[name] = {"about": " ".join(comment)}
    return about


def _lines(name: str, entry: dict[str, Any]) -> list[str]:
    """An entry for reading: what it is first, then what can be set."""
    if "about" in entry:
        return [f"{name:12}{entry['about']}"]
    lines = [
        f"{name:12}{entry['kind']}, {' and '.join(entry['forms'])}; {', '.join(entry['implementations'])}",
        f"{'':12}{entry['summary']}",
        f"{'':12}{entry['paper']}, arXiv {entry['arxiv']}, {entry['year']}",
    ]
    settings = [f"{key}={field.get('default')}" for key, field in entry["hyperparameters"].items()]
    return [*lines, f"{'':12}{', '.join(settings)}"] if settings else lines
