"""Real commits and a gate that decides by what they hold: git and the gate find the one that did it."""

import subprocess

import pytest

from linbench.cell import Cell
from linbench.cli import main
from linbench.gate import bisect
from linbench.gate.bisect import search
from linbench.gate.speed import Finding, Result
from linbench.gate.statistics import Verdict

CELLS = [Cell(mechanism=name, length=64) for name in ("linear", "retnet")]


def git(folder, *words):
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def commits(tmp_path):
    """Twelve commits; the file says what number they have."""
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    made = []
    for number in range(12):
        (tmp_path / "number").write_text(str(number))
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "--quiet", "-m", f"commit {number}")
        made.append(git(tmp_path, "rev-parse", "HEAD"))
    return made


def judge_of(folder, said, asked=None):
    """The gate: of ``linear`` it says what ``said`` makes of the commit's number, of the others PASS."""

    def judge(commit, cells):
        number = int(git(folder, "show", f"{commit}:number"))
        if asked is not None:
            asked.append([cell.mechanism for cell in cells])
        verdict = said(number)
        if verdict is Verdict.INVALID:
            return Result(invalid="base does not build: no compiler")
        return Result([Finding(cell, verdict if cell.mechanism == "linear" else Verdict.PASS) for cell in cells])

    return judge


@pytest.mark.parametrize("culprit", [1, 4, 7, 11])
@pytest.mark.parametrize("how", [Verdict.SLOWER, Verdict.WRONG])
def test_the_commit_is_found_in_few_steps(tmp_path, commits, culprit, how):
    judge = judge_of(tmp_path, lambda number: how if number >= culprit else Verdict.PASS)
    found = search(tmp_path, commits[0], "main", CELLS, judge)
    assert found.culprits == [commits[culprit]]
    assert found.exit_code == 0
    assert len(found.verdicts) <= 5


def test_only_cells_that_are_bad_at_the_end_are_looked_at_on_the_way(tmp_path, commits):
    asked = []
    search(tmp_path, commits[0], "main", CELLS, judge_of(tmp_path, lambda n: "SLOWER" if n > 5 else "PASS", asked))
    assert asked[0] == ["linear", "retnet"]
    assert all(names == ["linear"] for names in asked[1:])


def test_what_the_gate_cannot_decide_is_skipped(tmp_path, commits):
    said = {5: Verdict.UNDECIDED, 6: Verdict.INVALID}
    judge = judge_of(tmp_path, lambda n: said.get(n, Verdict.SLOWER if n >= 3 else Verdict.PASS))
    assert search(tmp_path, commits[0], "main", CELLS, judge).culprits == [commits[3]]


def test_where_skipped_commits_hide_it_all_candidates_are_named(tmp_path, commits):
    judge = judge_of(
        tmp_path, lambda n: Verdict.UNDECIDED if 4 <= n <= 6 else Verdict.SLOWER if n > 4 else Verdict.PASS
    )
    found = search(tmp_path, commits[0], "main", CELLS, judge)
    assert sorted(found.culprits) == sorted(commits[4:8])
    assert found.exit_code == 3


@pytest.mark.parametrize(("verdict", "code"), [("PASS", 3), ("UNDECIDED", 3), ("INVALID", 4)])
def test_a_bad_end_that_is_not_bad_is_told(tmp_path, commits, verdict, code):
    found = search(tmp_path, commits[0], "main", CELLS, judge_of(tmp_path, lambda _: Verdict(verdict)))
    assert found.culprits == []
    assert found.reason.startswith(f"main against {commits[0]}: {verdict}")
    assert found.exit_code == code


def test_nobodys_checkout_and_bisection_change(tmp_path, commits):
    git(tmp_path, "checkout", "--quiet", "main~2")
    search(tmp_path, commits[0], "main", CELLS, judge_of(tmp_path, lambda n: "SLOWER" if n > 5 else "PASS"))
    assert git(tmp_path, "rev-parse", "HEAD") == commits[9]
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1
    assert not (tmp_path / ".git" / "BISECT_LOG").exists()


@pytest.mark.parametrize(
    ("good", "said"),
    [("main", "main is no ancestor of main~3"), ("nowhere", "gate: git rev-parse"), ("main~3", "is no ancestor")],
)
def test_commits_that_cannot_be_halved_are_refused(tmp_path, commits, capsys, good, said):
    words = ["--good", good, "--bad", "main~3", "--repository", str(tmp_path), "+sweep=gate"]
    assert main(["bisect", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_the_way_and_the_commit(tmp_path, commits, capsys, monkeypatch):
    judge = judge_of(tmp_path, lambda number: Verdict.SLOWER if number >= 7 else Verdict.PASS)
    monkeypatch.setattr(bisect, "gate", lambda cells, _measures, _limit, asked: judge(asked.head, cells))
    words = ["--good", "main~11", "--repository", str(tmp_path), "mechanism=[linear]", "length=64", "measure=[speed]"]
    assert main(["bisect", *words]) == 0
    printed = capsys.readouterr().out
    assert "commit 11: SLOWER" in printed
    assert printed.splitlines()[-1].endswith("commit 7")
    assert commits[7][:7] in printed
