"""The loop of a sweep: rounds of cells in servers of their own, disturbed times again, every answer onto the disk.

The first round takes every measure; each further one only times the cells that could be timed, in processes of a fresh
server: forked processes share their server's memory layout, and one layout is one sample of it. Within a round the
short lengths come first, so that what fails at a length is not tried at a longer one; among cells of a length the order
is drawn, so that whatever drifts meanwhile falls on all alike.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from time import perf_counter
from typing import Protocol

from linbench.plan import Skip, Step, backstop
from linbench.protocol import MeasureRequest, Outcome
from linbench.record import MEASURED, Record, Round, Run, Status
from linbench.runner import Runner
from linbench.store import RunFile
from linbench.sweep import Plan, memory_limit, request_for

RETRY_WAIT_S = 1.0
"""Before a disturbed time is taken again; twice as long before the second attempt, and so on."""
IN_VAIN = 3


class Progress(Protocol):
    """Whoever shows how far the sweep is."""

    def starts(self, step: Step, index: int) -> None:
        """A cell is about to be run, for round ``index``."""

    def ended(self, step: Step, result: Record | Round) -> None:
        """A cell has become a record, or has been timed again."""


def execute(plan: Plan, runner: Runner, command: str, progress: Progress) -> None:
    """Run what is pending, one record after the other onto the disk and into ``plan.finished``; then its rounds."""
    run = new_run(plan, command)
    execution = Execution(plan, runner, run, progress)
    with RunFile(plan.folder, run) as results:
        for step, record in execution.first_round():
            results.append(record)
            plan.finished[record.cell.key] = record
            progress.ended(step, record)
        for index in range(1, plan.config.rounds):
            for step, again in execution.further_round(index):
                results.append(again)
                plan.finished[step.cell.key].rounds.append(again)
                progress.ended(step, again)


def new_run(plan: Plan, command: str) -> Run:
    """The first line of a results file that is about to be written."""
    now = datetime.now(UTC)
    sweep = re.sub(r"\W+", "-", plan.config.sweep)  # it becomes a file's name, and may itself be a path
    return Run(
        run=f"{now:%Y%m%dT%H%M%SZ}-{sweep}-{secrets.token_hex(2)}",
        time=now.isoformat(timespec="seconds"),
        command=command,
        cells=len(plan.steps),
        rounds=plan.config.rounds,
        order_seed=secrets.randbits(32),
        environment=plan.environment,
    )


@dataclass
class Execution:
    """A plan, and who carries it out."""

    plan: Plan
    runner: Runner
    run: Run
    progress: Progress
    in_vain: int = 0
    """Cells in a row that stayed noisy through all of their retries."""

    def first_round(self) -> Iterator[tuple[Step, Record]]:
        """Every pending step with all of its measures."""
        stopped: dict[str, Skip] = {}
        pending = in_order(self.plan.pending, self.run.order_seed, 0)
        for order, step in enumerate(pending):
            began = perf_counter()
            skip = step.skip or stopped.get(step.cell.key)
            if skip:
                outcome = Outcome(status=skip.status, reason=skip.reason)
            else:
                self.progress.starts(step, 0)
                outcome = self.undisturbed(request_for(step.cell, self.plan))
                stopped.update(backstop(step.cell, outcome.status, outcome.reason or "", pending[order + 1 :]))
            yield step, self._record(step, outcome, order, perf_counter() - began)

    def further_round(self, index: int) -> Iterator[tuple[Step, Round]]:
        """Every step that has a time and none of this round, in processes of a fresh server."""
        pending = in_order(self.plan.pending_rounds(index), self.run.order_seed, index)
        if pending:
            self.runner.renew()
        for order, step in enumerate(pending):
            began = perf_counter()
            self.progress.starts(step, index)
            outcome = self.undisturbed(_speed_alone(request_for(step.cell, self.plan)))
            again = Round(
                run=self.run.run,
                time=_now(),
                cell_key=step.cell.key,
                code=step.prospect.code,
                index=index,
                order=order,
                status=outcome.status,
                reason=outcome.reason,
                elapsed_s=perf_counter() - began,
                speed=outcome.speed,
            )
            yield step, again

    def undisturbed(self, request: MeasureRequest, wait: Callable[[float], None] = time.sleep) -> Outcome:
        """Measure, and time again up to ``retries`` times while others keep the machine busy.

        What was set aside is counted; if no attempt was quiet, the last one is kept, and stays ``noisy``. After
        ``IN_VAIN`` such cells in a row the load is taken for a lasting one, and waiting for its end is given up until a
        cell is quiet again.
        """
        limit = self.plan.config.time_limit_s
        outcome = self.runner.measure(request, limit)
        retries = self.plan.config.retries if self.in_vain < IN_VAIN else 0
        for attempt in range(1, retries + 1):
            if outcome.status is not Status.NOISY:
                break
            wait(RETRY_WAIT_S * attempt)
            again = self.runner.measure(_speed_alone(request), limit)
            if again.status not in MEASURED or again.speed is None:
                break
            speed = again.speed.model_copy(update={"discarded_rounds": attempt})
            outcome = outcome.model_copy(update={"status": again.status, "reason": again.reason, "speed": speed})
        self.in_vain = self.in_vain + 1 if outcome.status is Status.NOISY else 0
        return outcome

    def _record(self, step: Step, outcome: Outcome, order: int, elapsed_s: float) -> Record:
        plan = self.plan
        return Record(
            run=self.run.run,
            time=_now(),
            cell=step.cell,
            code=step.prospect.code,
            measures=list(plan.measures),
            time_limit_s=plan.config.time_limit_s,
            memory_limit_bytes=memory_limit(step.cell, plan) if step.cell.device == "cpu" else None,
            elapsed_s=elapsed_s,
            cost=step.prospect.cost,
            order=order,
            **dict(outcome),
        )


def in_order(steps: Iterable[Step], seed: int | None, index: int) -> list[Step]:
    """Short lengths first, and a drawn order of the cells of each length."""
    generator = random.Random(f"{seed}-{index}")
    ordered = []
    for _, block in groupby(sorted(steps, key=lambda step: step.cell.length), key=lambda step: step.cell.length):
        cells = list(block)
        generator.shuffle(cells)
        ordered += cells
    return ordered


def _speed_alone(request: MeasureRequest) -> MeasureRequest:
    return request.model_copy(update={"measures": {"speed": request.measures["speed"]}})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
