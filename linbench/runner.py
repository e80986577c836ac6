"""The parent: one isolated child per task, a time limit, a typed outcome. Never touches a device, never imports torch.

Children are forked from a server process that has imported everything once (``multiprocessing`` forkserver with
preload), so that a cell costs a fork, not an import. The parent blocks until an answer, an end or the limit; it never
polls, because a polling parent takes a core from what is being measured.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from linbench.limits import MEMORY_SIGNS, kernel_kills
from linbench.protocol import (
    ClockTrial,
    Examined,
    ExamineRequest,
    ForeseeRequest,
    Foresight,
    MeasureRequest,
    Nearest,
    NearestRequest,
    Outcome,
    Probed,
    ProbeRequest,
    Survey,
    SurveyRequest,
    TryClockRequest,
)
from linbench.record import Status

Answer = TypeVar("Answer", bound=BaseModel)
FORESEE_LIMIT_S = 120.0
SURVEY_LIMIT_S = 120.0
ENDING_S = 5.0
"""A child that has answered gets this long to end by itself."""


class _Ended(NamedTuple):
    """How a child ended: with an answer, or without one."""

    answer: str | None
    stage: str
    exit_code: int | None
    timed_out: bool
    last_words: str


class Runner:
    """Runs tasks in children, one at a time. Use as a context manager; the fork server ends with the process.

    Args:
        also_preload: modules that the server imports besides the worker.
    """

    def __init__(self, also_preload: Sequence[str] = ()) -> None:
        # OpenBLAS and OpenMP must not start threads in the server: threads do not survive a fork
        for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(variable, "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*also_preload, "linbench.preload"])
        self._folder = tempfile.TemporaryDirectory(prefix="linbench-")
        self._log = Path(self._folder.name) / "child.log"

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def renew(self) -> None:
        """Let the next children come from a server of their own, with a memory layout of its own.

        The server of ``multiprocessing`` is one of the process; it has no public way to be stopped.
        """
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def survey(self, request: SurveyRequest) -> Survey:
        """Ask a child what machine this is; see :meth:`_ask`."""
        return self._ask("survey", request, Survey, SURVEY_LIMIT_S, "this machine cannot be surveyed: ")

    def try_clock(self, request: TryClockRequest) -> ClockTrial:
        """Try the clock of a device in a child; see :meth:`_ask`."""
        told = f"the clock of {request.device} cannot be tried: "
        return self._ask("try_clock", request, ClockTrial, SURVEY_LIMIT_S, told)

    def foresee(self, request: ForeseeRequest) -> Foresight:
        """Ask a child about the cells before they run; see :meth:`_ask`."""
        return self._ask("foresee", request, Foresight, FORESEE_LIMIT_S)

    def nearest(self, request: NearestRequest) -> Nearest:
        """Ask a child for the nearest length that a mechanism and its inputs take; see :meth:`_ask`."""
        return self._ask("nearest", request, Nearest, FORESEE_LIMIT_S)

    def examine(self, request: ExamineRequest, time_limit_s: float) -> Examined:
        """Look at one property of a mechanism, or ask which there are; see :meth:`_ask`."""
        return self._ask("examine", request, Examined, time_limit_s)

    def measure(self, request: MeasureRequest, time_limit_s: float) -> Outcome:
        """Run one cell. Always returns: no answer, a bad exit or the time limit become an outcome with its reason."""
        answer, status, reason = self._try("measure", request, time_limit_s)
        return Outcome(status=status, reason=reason) if answer is None else Outcome.model_validate_json(answer)

    def probe(self, request: ProbeRequest, time_limit_s: float) -> Probed:
        """Try one length of a frontier. Always returns, as :meth:`measure`."""
        answer, status, reason = self._try("probe", request, time_limit_s)
        return Probed(status=status, reason=reason) if answer is None else Probed.model_validate_json(answer)

    def _ask(self, task: str, request: BaseModel, answer: type[Answer], limit_s: float, failure: str = "") -> Answer:
        """The answer of a child.

        Raises:
            RuntimeError: it gave none, because a mechanism's own code ended it or the time was over; says how.
        """
        ended = self._run(task, request.model_dump_json(by_alias=True), limit_s)
        if ended.answer is None:
            raise RuntimeError(f"{failure}{_death(ended)}")
        return answer.model_validate_json(ended.answer)

    def _try(self, task: str, request: BaseModel, limit_s: float) -> tuple[str | None, Status, str]:
        """The answer of a child, or None with what its end means, and why.

        A process that the kernel killed for want of memory, or that died of an allocation, has run out of memory; where
        the kernel does not count its kills, every SIGKILL is taken for one.
        """
        kills = kernel_kills()
        ended = self._run(task, request.model_dump_json(by_alias=True), limit_s)
        if ended.answer is not None:
            return ended.answer, Status.OK, ""
        if ended.timed_out:
            return None, Status.TIMEOUT, f"no result within {limit_s:g} s; it was in stage '{ended.stage}'"
        killed = ended.exit_code == -signal.SIGKILL and (kills is None or kernel_kills() != kills)
        if killed or any(sign in ended.last_words for sign in MEMORY_SIGNS):
            return None, Status.OOM, _death(ended)
        return None, Status.CRASH, _death(ended)

    def _run(self, task: str, request: str, limit_s: float) -> _Ended:
        receiver, sender = self._context.Pipe(duplex=False)
        self._log.write_text("")
        process = self._context.Process(target=_child, args=(sender, task, request, str(self._log)), daemon=False)
        process.start()
        sender.close()  # the child's end is the only one left, so that its death is an end of file here
        try:
            answer, stage, timed_out = _listen(receiver, time.monotonic() + limit_s)
        except BaseException:  # Ctrl-C above all: the child must not outlive the request
            _kill(process)
            raise
        finally:
            receiver.close()
        process.join(ENDING_S if answer is not None else 0 if timed_out else ENDING_S)
        if process.is_alive():
            _kill(process)
        return _Ended(answer, stage, process.exitcode, timed_out, self._log.read_text(errors="replace"))


def _child(connection: Connection, task: str, request: str, log: str) -> None:
    from linbench import worker

    worker.main(connection, task, request, log)


def _listen(receiver: Connection, deadline: float) -> tuple[str | None, str, bool]:
    """Wait for the answer. Returns it (None without one), the last stage, and whether the time was over."""
    stage = "start"
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not wait([receiver], left):
            return None, stage, True
        try:
            kind, content = receiver.recv()
        except (EOFError, OSError):
            return None, stage, False
        if kind == "answer":
            return content, stage, False
        stage = content


def _kill(process: ForkServerProcess) -> None:
    """End a child and everything that it has started: it leads a process group of its own."""
    if process.pid is not None:
        for kill in (os.killpg, os.kill):  # the group does not exist yet in the child's first milliseconds
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(process.pid, signal.SIGKILL)
    process.join()


def _death(ended: _Ended) -> str:
    """One line: how a child ended that gave no answer, and the last thing that it printed."""
    if ended.timed_out:
        return f"no answer in time; it was in stage '{ended.stage}'"
    code = ended.exit_code
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        how = f"killed by {name}" + (", perhaps by the kernel for want of memory" if name == "SIGKILL" else "")
    else:
        how = f"the process ended with exit code {code} and gave no answer"
    word = _last_word(ended.last_words)
    return f"{how} in stage '{ended.stage}'" + (f": {word}" if word else "")


def _last_word(printed: str) -> str:
    """The innermost frame of a dead child that lies outside libraries, else the last line that it printed."""
    frames = re.findall(r'^\s*File "(.+)", line (\d+)(?: in|, in) (.+)$', printed, re.MULTILINE)
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for file, line, function in frames:
        if not file.startswith(libraries) and "site-packages" not in file:
            return f"{Path(file).name}:{line} in {function}"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1][:300] if lines and not frames else ""
