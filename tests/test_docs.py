"""The documents are executed: what they show works as shown, and what they define is everything there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from linbench.record import Check, Cost, Environment, Error, Memory, Record, Run, Speed, Status

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fenced(language: str, holding: str) -> str:
    """The fenced block of that language which holds these words."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in b]
    return str(block)


def test_the_mechanism_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(fenced("python", "class Mean"))
    (tmp_path / "mine" / "mechanism").mkdir(parents=True)
    (tmp_path / "mine" / "mechanism" / "mean.yaml").write_text(fenced("yaml", "my_module.Mean"))
    words = ["--config-dir", "mine", "mechanism=[softmax,mean]", "length=48", "causal=false", "heads=2"]
    done = subprocess.run(
        [sys.executable, "-m", "linbench", "run", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"mean/torch .*: (ok|noisy) .* distance", done.stdout), done.stdout


@pytest.mark.parametrize("command", re.findall(r"^linbench (?:run|plan) .*$", README, re.MULTILINE))
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


@pytest.mark.parametrize("model", [Run, Environment, Record, Cost, Check, Speed, Memory, Error])
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
