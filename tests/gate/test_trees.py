"""Real worktrees of a small repository with a mechanism of its own: what cannot be measured is told."""

import subprocess

import pytest

from linbench.cli import main
from linbench.gate import speed
from linbench.gate.trees import UnusableError, two_trees

MECHANISM = '''
import time

from linbench.mechanisms.base import Description, Mechanism, streaming_bytes


class Mine(Mechanism):
    """The mean of the values, after a while."""

    description = Description("the mean", "replacement", (False,), "none", "none", 2026)

    def reference(self, q, k, v, rows=None):
        mean = v.mean(dim=2, keepdim=True).expand(*v.shape[:2], q.shape[2], v.shape[3])
        return mean if rows is None else mean[:, :, rows]

    def forward_torch(self, q, k, v):
        end = time.perf_counter() + {seconds}
        while time.perf_counter() < end:
            pass
        return self.reference(q, k, v).contiguous() * {factor}

    def flops(self, cell):
        return 1

    def min_bytes(self, cell):
        return streaming_bytes(cell)
'''
WORDS = (
    "mechanism=[]",
    "mechanism._target_=mine.Mine",
    "length=64",
    "heads=2",
    "head_dim=8",
    "causal=false",
    "measure=[speed]",
    "measure.speed.budget_s=0.05",
)


def git(folder, *words):
    """Git with a name of its own, whatever the machine is called."""
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Commits what it is given as ``mine.py``."""
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    monkeypatch.chdir(folder)

    def commit(text):
        (folder / "mine.py").write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "--quiet", "-m", "another")
        return folder

    commit(MECHANISM.format(seconds=0.002, factor=1))
    return commit


@pytest.fixture
def few(monkeypatch):
    """As few blocks as can decide."""
    for name, count in {"FLOOR_BLOCKS": 1, "FIRST_BLOCKS": 3, "AGAIN_BLOCKS": 3}.items():
        monkeypatch.setattr(speed, name, count)


def test_both_trees_are_what_was_committed_and_are_removed_again(repository):
    folder = repository(MECHANISM.format(seconds=0.004, factor=1))
    with two_trees(folder, "HEAD~1", None) as (base, head):
        assert "0.002" in (base.folder / "mine.py").read_text()
        assert "0.004" in (head.folder / "mine.py").read_text()
        assert base.commit != head.commit
        assert base.python == head.python
    assert not base.folder.exists()
    assert len(git(folder, "worktree", "list").splitlines()) == 1


def test_a_process_that_dies_is_told_with_its_last_word(repository):
    folder = repository("")
    with two_trees(folder, "HEAD", None) as (base, _), pytest.raises(UnusableError, match="base cannot be measured: "):
        base.answers([{"kind": "foresee", "request": {}}], 60.0)


def test_a_base_that_does_not_build_makes_the_gate_invalid(repository, capsys):
    folder = repository(MECHANISM.format(seconds=0.003, factor=1))
    (folder / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'nowhere'\n")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "broken")
    (folder / "pyproject.toml").unlink()
    assert main(["gate", "speed", "--base", "HEAD", *WORDS]) == 4
    assert "INVALID: base does not build: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "nowhere"], "gate: git rev-parse"),
        ([], "the following arguments are required: --base"),
    ],
)
def test_bad_words_are_refused(repository, capsys, words, said):
    assert main(["gate", "speed", *words, *WORDS]) == 2
    assert said in capsys.readouterr().err


def test_a_gate_that_there_is_not_is_refused_with_the_choices(capsys):
    assert main(["gate", "memory"]) == 2
    assert "gate: choose from speed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("change", "code", "verdict"),
    [
        ({"seconds": 0.002, "factor": "1.0"}, 0, "PASS"),
        ({"seconds": 0.0026, "factor": "1"}, 1, "SLOWER"),
        ({"seconds": 0.0005, "factor": "1.5"}, 1, "WRONG"),
    ],
)
def test_a_change_of_a_real_mechanism_is_judged(repository, capsys, change, code, verdict):
    repository(MECHANISM.format(**change))
    found = main(["gate", "speed", "--base", "HEAD~1", "--json", "found.json", "--budget-s", "90", *WORDS])
    printed = capsys.readouterr().out
    if "undisturbed by other processes" in printed:
        pytest.skip("the machine is busy with something else, which the gate says")
    assert found == code
    assert printed.splitlines()[-1].startswith(verdict)
