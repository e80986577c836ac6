"""A sweep from plan to report: what is asked, what is known, what is finished, and the loop that does the rest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Protocol

from linbench.cell import Cell
from linbench.config import Config
from linbench.environment import available_memory_bytes, default_threads
from linbench.errors import UsageError
from linbench.plan import Prospect, Skip, Step, backstop, expand, foresee
from linbench.protocol import ForeseeRequest, Measure, MeasureRequest, Outcome, SurveyRequest
from linbench.record import Environment, Record, Run, Status
from linbench.runner import Runner
from linbench.store import RunFile, read_all

MEMORY_SHARE = 0.8
"""Of what is available when the sweep starts: the rest is for the parent, the server and everyone else."""


class Progress(Protocol):
    """Whoever shows how far the sweep is."""

    def starts(self, step: Step) -> None:
        """A cell is about to be run."""

    def ended(self, step: Step, record: Record) -> None:
        """A cell has become a record."""


@dataclass
class Plan:
    """Everything that is known before the first cell runs."""

    steps: list[Step]
    finished: dict[str, Record]
    """Cell key -> its record: of an earlier run as long as it still holds, and of this one."""
    environment: Environment
    measures: dict[str, Measure]
    config: Config
    memory_limit_bytes: int
    problems: list[str] = field(default_factory=list)
    """Mechanisms that could not even be asked, with the reason; their cells are run all the same."""

    @property
    def pending(self) -> list[Step]:
        """The steps that have no record yet, in order."""
        return [step for step in self.steps if step.cell.key not in self.finished]

    @property
    def records(self) -> list[Record]:
        """The records of the plan's cells, in the plan's order."""
        return [self.finished[step.cell.key] for step in self.steps if step.cell.key in self.finished]

    @property
    def folder(self) -> Path:
        """Where this machine's results are."""
        return Path(self.config.results_dir) / self.environment.machine


def prepare(config: Config, runner: Runner) -> Plan:
    """A plan, and what of it is finished.

    Raises:
        UsageError: as :func:`outline`, or nothing can run.
    """
    plan = outline(config, runner)
    if plan.steps and all(step.skip and step.skip.status is Status.UNSUPPORTED for step in plan.steps):
        reasons = list(dict.fromkeys(step.skip.reason for step in plan.steps if step.skip))
        raise UsageError(f"nothing can run: {'; '.join(reasons[:3])}")
    if config.resume:
        plan.finished = _finished(plan)
    return plan


def outline(config: Config, runner: Runner) -> Plan:
    """Expand the configuration, survey the machine, ask each mechanism about its cells.

    Raises:
        UsageError: a mechanism, implementation, parameter or shape that cannot be.
    """
    cells = expand(config)
    measures = {
        choice.name: Measure(
            target=choice.target or "", parameters={key: values[0] for key, values in choice.parameters.items()}
        )
        for choice in config.measures
    }
    threads = default_threads()
    survey = runner.survey(SurveyRequest(devices=[device.name for device in config.devices], threads=threads))
    prospects, problems = _prospects(cells, measures, runner)
    for i, cell in enumerate(cells):
        if missing := survey.missing_devices.get(cell.device):
            prospects[i] = Prospect(unsupported=missing, code=prospects[i].code)
    for prospect in prospects:
        if prospect.usage_error:
            raise UsageError(prospect.usage_error)
    limit = int(available_memory_bytes() * MEMORY_SHARE)
    settings = {name: measure.parameters for name, measure in measures.items()}
    steps = foresee(
        cells,
        prospects,
        survey.rates,
        measures=settings,
        time_limit_s=config.time_limit_s,
        memory_limit_bytes=limit,
    )
    return Plan(steps, {}, survey.environment, measures, config, limit, problems)


def _prospects(cells: Sequence[Cell], measures: dict[str, Measure], runner: Runner) -> tuple[list[Prospect], list[str]]:
    """Ask a child about all built-in mechanisms, and one about each other: its code may not survive."""
    groups: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        target = cell.target or ""
        groups.setdefault("" if target.startswith("linbench.") else target, []).append(i)
    prospects = [Prospect() for _ in cells]
    problems = []
    for target, members in groups.items():
        request = ForeseeRequest(cells=[cells[i] for i in members], measures=measures, threads=default_threads())
        try:
            found = runner.foresee(request).prospects
        except RuntimeError as error:
            problems.append(f"{target}: {error}")
            found = [Prospect(code="unforeseen") for _ in members]
        for i, prospect in zip(members, found, strict=True):
            prospects[i] = prospect
    return prospects, problems


def _finished(plan: Plan) -> dict[str, Record]:
    """Records of earlier runs that still hold: same cell, same code, and no limit that has been raised since."""
    _, records = read_all(plan.folder.glob("*.jsonl"))
    wanted = {step.cell.key: step for step in plan.steps}
    return {
        record.cell.key: record
        for record in records
        if (step := wanted.get(record.cell.key)) and _holds(record, step, plan)
    }


def _holds(record: Record, step: Step, plan: Plan) -> bool:
    if record.code != step.prospect.code or set(record.measures) != set(plan.measures):
        return False
    if record.status is Status.TIMEOUT:
        return record.time_limit_s >= plan.config.time_limit_s
    if record.status is Status.OOM:
        return (record.memory_limit_bytes or 0) >= 0.9 * memory_limit(step.cell, plan)
    return True


def memory_limit(cell: Cell, plan: Plan) -> int:
    """Bytes that a CPU cell may allocate."""
    asked = cell.device_parameters.get("memory_limit_bytes")
    return int(asked) if asked else plan.memory_limit_bytes


def execute(plan: Plan, runner: Runner, command: str, progress: Progress) -> None:
    """Run what is pending, one record after the other onto the disk and into ``plan.finished``."""
    run = new_run(plan, command)
    with RunFile(plan.folder, run) as results:
        for step, record in _records(plan, runner, run, progress.starts):
            results.append(record)
            plan.finished[record.cell.key] = record
            progress.ended(step, record)


def new_run(plan: Plan, command: str) -> Run:
    """The first line of a results file that is about to be written."""
    now = datetime.now(UTC)
    sweep = re.sub(r"\W+", "-", plan.config.sweep)  # it becomes a file's name, and may itself be a path
    return Run(
        run=f"{now:%Y%m%dT%H%M%SZ}-{sweep}-{secrets.token_hex(2)}",
        time=now.isoformat(timespec="seconds"),
        command=command,
        cells=len(plan.steps),
        environment=plan.environment,
    )


def _records(plan: Plan, runner: Runner, run: Run, starts: Callable[[Step], None]) -> Iterator[tuple[Step, Record]]:
    stopped: dict[str, Skip] = {}
    pending = plan.pending
    for i, step in enumerate(pending):
        began = perf_counter()
        skip = step.skip or stopped.get(step.cell.key)
        if skip:
            outcome = Outcome(status=skip.status, reason=skip.reason)
        else:
            starts(step)
            outcome = runner.measure(_request(step.cell, plan), plan.config.time_limit_s)
            stopped.update(backstop(step.cell, outcome.status, outcome.reason or "", pending[i + 1 :]))
        yield step, _record(step, outcome, plan, run, perf_counter() - began)


def _request(cell: Cell, plan: Plan) -> MeasureRequest:
    return MeasureRequest(
        cell=cell,
        measures=plan.measures,
        threads=int(cell.device_parameters.get("threads") or default_threads()),
        memory_limit_bytes=memory_limit(cell, plan) if cell.device == "cpu" else None,
    )


def _record(step: Step, outcome: Outcome, plan: Plan, run: Run, elapsed_s: float) -> Record:
    return Record(
        run=run.run,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        cell=step.cell,
        code=step.prospect.code,
        measures=list(plan.measures),
        time_limit_s=plan.config.time_limit_s,
        memory_limit_bytes=memory_limit(step.cell, plan) if step.cell.device == "cpu" else None,
        elapsed_s=elapsed_s,
        cost=step.prospect.cost,
        **dict(outcome),
    )
