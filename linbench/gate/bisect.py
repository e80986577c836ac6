"""``linbench bisect``: git halves the commits, the gate says which half.

Every commit that git proposes is gated against the good one. Cells that run the same code there are not measured, so
that a commit that touches nothing costs a look at its source. What the gate leaves undecided, or cannot build, is
skipped, as ``git bisect run`` does with an exit code of 125. All of it happens in a worktree of its own.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from linbench.errors import UsageError
from linbench.gate.speed import Asked, Result, gate
from linbench.gate.statistics import THRESHOLD, Verdict
from linbench.gate.trees import git_answer
from linbench.verbs import VERBS, Parser

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from linbench.cell import Cell

FOUND, LEFT_OPEN = 0, 3
BAD = (Verdict.SLOWER, Verdict.WRONG)
WORDS = {Verdict.PASS: "good", Verdict.SLOWER: "bad", Verdict.WRONG: "bad"}
"""What git is told; other verdicts are skipped."""
Judge = Callable[[str, "Sequence[Cell]"], Result]
"""A commit and the cells to look at -> what the gate says of it against the good one."""


@dataclass
class Search:
    """What a bisection found, and how."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """Commit -> what the gate said of it, in the order in which git asked."""
    cells: list[Cell] = field(default_factory=list)
    """Those that are slower or wrong at the bad commit."""
    culprits: list[str] = field(default_factory=list)
    """One commit; several where some had to be skipped; none where the bad one is not bad."""
    reason: str = ""
    """Why there is not one."""

    @property
    def exit_code(self) -> int:
        """0 for one commit, 3 for more or none; 4 where the gate could not compare the two ends."""
        if len(self.culprits) == 1:
            return FOUND
        ends = list(self.verdicts.values())[:1]
        return 4 if ends == [Verdict.INVALID] else LEFT_OPEN


def search(repository: Path, good: str, bad: str, cells: Sequence[Cell], judge: Judge) -> Search:
    """The first commit after ``good`` at which the gate finds a cell slower or wrong.

    Raises:
        UsageError: no such commit, or ``good`` is no ancestor of ``bad``.
    """
    top = Path(git_answer(repository, "rev-parse", "--show-toplevel"))
    first, last = (git_answer(top, "rev-parse", "--verify", f"{one}^{{commit}}") for one in (good, bad))
    if first == last or git_answer(top, "merge-base", first, last) != first:
        raise UsageError(f"bisect: {good} is no ancestor of {bad}")
    result = judge(last, cells)
    found = Search({last: result.verdict})
    found.cells = [finding.cell for finding in result.findings if finding.verdict in BAD]
    if not found.cells:
        found.reason = f"{bad} against {good}: {result.verdict}{f', {result.invalid}' if result.invalid else ''}"
        return found
    with _worktree(top, last) as tree:
        answer = git_answer(tree, "bisect", "start", "--no-checkout", last, first)
        while not (culprits := _culprits(answer)):
            commit = git_answer(tree, "rev-parse", "BISECT_HEAD")
            found.verdicts[commit] = judge(commit, found.cells).verdict
            answer = git_answer(tree, "bisect", WORDS.get(found.verdicts[commit], "skip"), fails_at_end=True)
    found.culprits = culprits
    if len(found.culprits) > 1:
        found.reason = "the gate could not decide on the commits between them"
    return found


def _culprits(answer: str) -> list[str]:
    """Commits that git names as the first bad one; empty while it goes on asking."""
    lines = answer.splitlines()
    for index, line in enumerate(lines):
        if line.endswith(" is the first bad commit"):
            return [line.split()[0]]
        if line.startswith("The first bad commit could be any of"):
            return [line for line in lines[index + 1 :] if re.fullmatch("[0-9a-f]{40,64}", line)]
    return []


@contextlib.contextmanager
def _worktree(top: Path, commit: str) -> Iterator[Path]:
    """Where git keeps the state of this bisection: nobody's checkout changes."""
    with tempfile.TemporaryDirectory(prefix="linbench-bisect-") as away:
        folder = Path(away) / "tree"
        git_answer(top, "worktree", "add", "--detach", "--no-checkout", "--quiet", str(folder), commit)
        try:
            yield folder
        finally:
            git_answer(top, "worktree", "remove", "--force", str(folder))


def run(argv: Sequence[str]) -> int:
    """Find the commit and print the way to it.

    Returns:
        0 when one commit is found, 3 when it is not, 4 when good and bad cannot be compared.

    Raises:
        UsageError: bad words, or no such commit.
    """
    parser = Parser(prog="linbench bisect", description=VERBS["bisect"], epilog="Further words compose the sweep.")
    parser.add_argument("--good", required=True, help="commit, branch or tag that is fast")
    parser.add_argument("--bad", default="HEAD", help="a later one that is not (default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=Path(), help="default: the one of this folder")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="practical, as 0.05 (default: %(default)g)")
    parser.add_argument("--budget-s", type=float, default=900.0, help="of one commit (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    options, words = parser.parse_known_args(argv)
    asked = Asked(options.repository, options.good, None, options.threshold, options.budget_s, False, options.seed)
    return _composed(asked, options.bad, words)


def _composed(asked: Asked, bad: str, words: Sequence[str]) -> int:
    from linbench.hydra_front import checked, compose_and_call
    from linbench.plan import expand
    from linbench.sweep import measures_of

    def task(config: DictConfig, _command: str) -> int:
        settings = checked(config)
        measures = measures_of(settings)
        if "speed" not in measures:
            raise UsageError("bisect: measure: speed has to be among the measures")

        def judge(commit: str, cells: Sequence[Cell]) -> Result:
            result = gate(cells, measures, settings.time_limit_s, replace(asked, head=commit))
            reason = f": {result.invalid}" if result.invalid else ""
            print(f"{_titled(asked.repository, commit)}: {result.verdict}{reason}; {result.spent_s:.0f} s", flush=True)
            return result

        found = search(asked.repository, asked.base, bad, expand(settings), judge)
        _tell(found, asked.repository)
        return found.exit_code

    return compose_and_call(task, "bisect", words)


def _tell(found: Search, repository: Path) -> None:
    if found.cells:
        print(f"Slower or wrong: {'; '.join(cell.label for cell in found.cells)}")
    for commit in found.culprits:
        print(f"{'First bad commit' if len(found.culprits) == 1 else 'Perhaps'}: {_titled(repository, commit)}")
    if found.reason:
        print(f"No single commit: {found.reason}")


def _titled(repository: Path, commit: str) -> str:
    return git_answer(repository, "log", "-1", "--format=%h %s", commit)
