"""What runs on GitHub: workflows, the action, and the action on a repository that is not linbench's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from linbench.cli import VERBS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
THEIRS = ROOT / "tests" / "third_party"
EVERY = [*WORKFLOWS, THEIRS / ".github" / "workflows" / "speed.yml"]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def commands(path: Path) -> str:
    return "\n".join(step.get("run", "") for step in steps(path))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_workflow_says_when_it_runs_and_may_do_no_more_than_it_says(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    assert found[True]  # `on` is a boolean in YAML 1.1
    assert set(found["permissions"].values()) <= {"read", "write"}
    assert all(job["runs-on"] and job["steps"] for job in found["jobs"].values())


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_what_an_event_says_is_never_part_of_a_command(path: Path) -> None:
    for step in [*steps(path), *ACTION["runs"]["steps"]]:
        text = step.get("run", "") + str(step.get("with", {}).get("script", ""))
        assert "${{" not in text, text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_scripts_and_verbs_that_are_called_exist(path: Path) -> None:
    told = commands(path)
    for name in re.findall(r"(?:^|\s)((?:scripts|\.ci)/[\w./]+)", told):
        assert (ROOT / name).is_file(), name
    for verb in re.findall(r"^linbench (\w+)", told, re.MULTILINE):
        assert verb in VERBS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_code_of_a_pull_request_never_meets_a_token_that_writes(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    writes = "write" in found["permissions"].values()
    assert "pull_request_target" not in found[True]
    if writes and not {"schedule", "workflow_dispatch"} >= set(found[True]):
        assert not any("checkout" in step.get("uses", "") or "run" in step for step in steps(path))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_the_action_gets_inputs_that_it_has(path: Path) -> None:
    for step in steps(path):
        if step.get("uses") in ("./", "linbench/linbench@main"):
            given = set(step["with"])
            required = {name for name, about in ACTION["inputs"].items() if about.get("required")}
            assert required <= given <= set(ACTION["inputs"])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The package of others with its first commit, installed as pip leaves it."""
    shutil.copytree(THEIRS, tmp_path / "theirs")
    about = tmp_path / "site" / "fading_mean-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fading-mean\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[linbench.mechanisms]\nfading_mean = fading_mean:FadingMean\n")
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "First"]):
        who = ["-c", "user.name=them", "-c", "user.email=them@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path / "theirs", check=True)
    return tmp_path / "theirs"


def gated(repository: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """The action's step in that repository: how it ended, and what it left in the files of the job by name."""
    files = {name: repository.parent / name.lower() for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "REPORT")}
    sizes = "length=[48] heads=2 head_dim=8 pass=forward measure.speed.budget_s=0.02 time_limit_s=20"
    done = subprocess.run(
        [ROOT / "scripts" / "gate_action"],
        cwd=repository,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(repository.parent / "site"), str(ROOT)]),
            "BASE": "HEAD",
            "WORDS": f"mechanism=[fading_mean] measure=[speed,memory] causal=true {sizes}",
            **{name: str(path) for name, path in files.items()},
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    return done, {name: path.read_text() if path.exists() else "" for name, path in files.items()}


def test_a_pull_request_that_touches_no_mechanism_passes(repository: Path) -> None:
    (repository / "README.md").write_text("Other words.\n")
    done, files = gated(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files["GITHUB_OUTPUT"] == "verdict=PASS\n"
    assert "run the same code in both" in files["GITHUB_STEP_SUMMARY"]


@pytest.mark.slow
def test_a_pull_request_that_breaks_a_mechanism_fails_its_job(repository: Path) -> None:
    module = repository / "src" / "fading_mean" / "__init__.py"
    module.write_text(module.read_text().replace("return (weights @ v", "return (0.5 * weights @ v"))
    done, files = gated(repository)
    assert done.returncode == 1, done.stdout + done.stderr
    assert files["GITHUB_OUTPUT"] == "verdict=WRONG\n"
    (cell,) = json.loads(files["REPORT"])["cells"]
    assert cell["verdict"] == "WRONG"
    assert "incorrect" in cell["reason"]


def test_words_that_mean_nothing_fail_the_job_without_a_verdict(repository: Path) -> None:
    done, files = gated(repository, WORDS="mechanism=[no_such_mechanism]")
    assert done.returncode == 2
    assert files["GITHUB_OUTPUT"] == ""
    assert "no_such_mechanism" in files["GITHUB_STEP_SUMMARY"]


def test_history_is_appended_to_a_branch_of_its_own(tmp_path: Path, repository: Path) -> None:
    remote, records = tmp_path / "remote.git", tmp_path / "records"
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    subprocess.run(["git", "remote", "add", "origin", str(remote)], cwd=repository, check=True)
    records.mkdir()
    for night in ("first", "second"):
        (records / f"{night}.jsonl").write_text("{}\n")
        subprocess.run([ROOT / "scripts" / "append_history", records, "desk"], cwd=repository, check=True)
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "history"], cwd=remote, check=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == ["desk/first.jsonl", "desk/second.jsonl"]
    told = subprocess.run(["git", "status", "--short"], cwd=repository, check=True, capture_output=True, text=True)
    assert told.stdout == ""
