"""The documents are executed: what they show works as shown, and what they define is everything there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from linbench.record import (
    Check,
    ColdStart,
    Conditions,
    Cost,
    DeviceConditions,
    Environment,
    Error,
    Fit,
    Frontier,
    Kernel,
    Memory,
    Peaks,
    Probe,
    Record,
    Round,
    Run,
    Speed,
    Status,
    Structure,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fenced(language: str, holding: str) -> str:
    """The fenced block of that language which holds these words."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in b]
    return str(block)


def in_folder(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linbench", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_mechanism_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    text = fenced("python", "class Strided")
    assert len(text.splitlines()) <= 60
    (tmp_path / "my_module.py").write_text(text)
    words = re.search(r"`linbench (run mechanism\._target_=my_module\.Strided .*?)`", README)
    assert words is not None
    short = ["length=48", "causal=false", "heads=2", "head_dim=8", "measure.speed.budget_s=0.02"]
    done = in_folder(tmp_path, *words[1].split(), *short)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"strided/torch .*: (?:ok|noisy) .* error", done.stdout)) == 2, done.stdout


def test_the_mechanism_of_the_readme_passes_the_kit(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(fenced("python", "class Strided"))
    done = in_folder(tmp_path, "check", "my_module.Strided", "--quick")
    assert done.returncode == 0, done.stdout
    assert re.search(r"exact limit .* passed", done.stdout), done.stdout


def test_installed_mechanisms_take_part_in_every_sweep_that_names_none(tmp_path: Path) -> None:
    """The package of the README, as pip leaves it: a module and the entry point that the README shows."""
    (tmp_path / "my_module.py").write_text(fenced("python", "class Strided"))
    about = tmp_path / "strided-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strided\nVersion: 1.0\n")
    group, line = re.findall(r"\[project\.entry-points\.\"(.*)\"\]\n *(.*)\n", README)[0]
    (about / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    for words, joins in ((("+sweep=smoke",), True), (("+sweep=smoke", "mechanism=linear"), False), ((), False)):
        done = in_folder(tmp_path, "plan", "length=128", *words)
        assert done.returncode == 0, done.stderr
        assert ("strided" in done.stdout) is joins, done.stdout


@pytest.mark.parametrize("command", re.findall(r"^linbench (?:run|plan|frontier) .*$", README, re.MULTILINE))
def test_every_command_of_the_readme_composes(command: str, tmp_path: Path) -> None:
    words = command.partition("#")[0].split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "linbench", *words, "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_picture_and_file_that_the_documents_link_exists() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "results/README.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


@pytest.mark.parametrize(
    "model",
    [
        Run,
        Environment,
        Peaks,
        Record,
        Round,
        Cost,
        Check,
        Speed,
        Conditions,
        DeviceConditions,
        Memory,
        Error,
        Fit,
        Structure,
        Kernel,
        ColdStart,
        Frontier,
        Probe,
    ],
)
def test_every_field_of_a_record_is_defined(model: type[BaseModel]) -> None:
    text = (ROOT / "results" / "README.md").read_text()
    for name in model.model_fields:
        assert f"`{name}`" in text, name


def test_every_status_is_defined() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    for status in Status:
        assert f"| `{status}` |" in text, status


def test_the_results_of_the_readme_are_those_of_the_record() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
