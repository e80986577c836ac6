"""The two trees of a comparison: a git worktree for each, with an interpreter that can import it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linbench.errors import UsageError

PROBE = Path(__file__).with_name("probe.py")
SOURCE_ROOTS = ("", "src", "kernels")
"""Folders of a tree that are imported from."""
ENVIRONMENT_FILES = ("pyproject.toml", "scripts/constraints.txt", "requirements.txt")
"""With other ones of these a tree gets an environment of its own."""
BUILD_LIMIT_S = 1800.0


class UnusableError(Exception):
    """A tree cannot be measured; says why in one sentence."""


@dataclass(frozen=True)
class Tree:
    """One version of the code, on the disk, and the interpreter that runs it."""

    name: str
    commit: str
    folder: Path
    python: str

    def answers(self, requests: Sequence[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
        """Run one process with these requests; its answers, one for each.

        Raises:
            UnusableError: it ended without them.
        """
        try:
            done = subprocess.run(
                [self.python, "-c", PROBE.read_text(encoding="utf-8")],
                input="".join(json.dumps(request) + "\n" for request in requests),
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": self._path(), "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired as error:
            raise UnusableError(f"{self.name}: no answer within {limit_s:g} s") from error
        lines = done.stdout.splitlines()
        if done.returncode or len(lines) != len(requests):
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise UnusableError(f"{self.name} cannot be measured: {words[-1] if words else 'it gave no answer'}")
        return [json.loads(line) for line in lines]

    def _path(self) -> str:
        places = [str(self.folder / root) for root in SOURCE_ROOTS]
        return os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def two_trees(repository: Path, base: str, head: str | None) -> Iterator[tuple[Tree, Tree]]:
    """Base and head, each in a worktree of its own that is removed again; head is the working tree when None.

    Raises:
        UsageError: no git repository, or no such commit.
        UnusableError: a tree cannot be built.
    """
    top = Path(git_answer(repository, "rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory(prefix="linbench-gate-") as away, contextlib.ExitStack() as stack:
        first = _worktree(top, base, Path(away) / "base", stack)
        second = top if head is None else _worktree(top, head, Path(away) / "head", stack)
        same = _environment(first) == _environment(second)
        python = sys.executable if same else _built(first, Path(away) / "environment")
        yield (
            Tree("base", git_answer(first, "rev-parse", "HEAD"), first, python),
            Tree("head", git_answer(second, "rev-parse", "HEAD"), second, sys.executable),
        )


def _worktree(top: Path, reference: str, folder: Path, stack: contextlib.ExitStack) -> Path:
    commit = git_answer(top, "rev-parse", "--verify", f"{reference}^{{commit}}")
    git_answer(top, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    stack.callback(git_answer, top, "worktree", "remove", "--force", str(folder))
    return folder


def _environment(folder: Path) -> list[str | None]:
    found = (folder / name for name in ENVIRONMENT_FILES)
    return [path.read_text(encoding="utf-8") if path.is_file() else None for path in found]


def _built(folder: Path, environment: Path) -> str:
    """The interpreter of a fresh environment that has what this tree asks for."""
    python = str(environment / "bin" / "python")
    constraints = folder / "scripts" / "constraints.txt"
    limits = ["--constraint", str(constraints)] if constraints.is_file() else []
    for command in (
        [sys.executable, "-m", "venv", str(environment)],
        [python, "-m", "pip", "install", "--quiet", *limits, str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S)
        if done.returncode:
            words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise UnusableError(f"base does not build: {words[-1] if words else 'pip gave no reason'}")
    return python


def git_answer(folder: Path, *words: str, fails_at_end: bool = False) -> str:
    """What git prints.

    Args:
        fails_at_end: a failure whose words are on its output is an answer: the last step of a bisection that skipped.

    Raises:
        UsageError: it failed; with its last words.
    """
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    if done.returncode and not (fails_at_end and done.stdout.strip()):
        lines = done.stderr.strip().splitlines()
        raise UsageError(f"gate: git {' '.join(words[:2])}: {lines[-1] if lines else 'failed'}")
    return done.stdout.strip()
