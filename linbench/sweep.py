"""What a sweep has to do: what is asked, what is known of it, what is finished, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from linbench.cell import Cell
from linbench.config import Config
from linbench.environment import available_memory_bytes, default_threads
from linbench.errors import UsageError
from linbench.plan import Step, expand, foresee
from linbench.prospect import Prospect, Rates
from linbench.protocol import ForeseeRequest, Measure, MeasureRequest, SurveyRequest
from linbench.record import Environment, Record, Status
from linbench.runner import Runner
from linbench.store import read_all

MEMORY_SHARE = 0.8
"""Of what is available when the sweep starts: the rest is for the parent, the server and everyone else."""


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
    rates: Mapping[str, Rates] = field(default_factory=dict)
    """Of each device, by its name: what estimates come from."""
    missing_devices: Mapping[str, str] = field(default_factory=dict)
    """Devices that this machine lacks, and why."""
    problems: list[str] = field(default_factory=list)
    """Mechanisms that could not even be asked, with the reason; their cells are run all the same."""

    @property
    def pending(self) -> list[Step]:
        """The steps that have no record yet, in order."""
        return [step for step in self.steps if step.cell.key not in self.finished]

    def pending_rounds(self, index: int) -> list[Step]:
        """The steps that have a time, but none of round ``index`` yet, in order."""
        return [
            step
            for step in self.steps
            if (record := self.finished.get(step.cell.key))
            and record.speed is not None
            and all(again.index != index for again in record.rounds)
        ]

    @property
    def repeated(self) -> list[Step]:
        """The steps whose time is, or may turn out to be, wanted again; one entry for every time."""
        if "speed" not in self.measures:
            return []
        fresh = [step for step in self.pending if not step.skip]
        further = range(1, self.config.rounds)
        return [step for index in further for step in (*fresh, *self.pending_rounds(index))]

    @property
    def records(self) -> list[Record]:
        """The records of the plan's cells, in the plan's order."""
        return [self.finished[step.cell.key] for step in self.steps if step.cell.key in self.finished]

    @property
    def runs(self) -> list[str]:
        """Names of the runs whose files hold the records and their rounds, oldest first."""
        rounds = (again.run for record in self.records for again in record.rounds)
        return sorted({*(record.run for record in self.records), *rounds})

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
    devices = [device.name for device in config.devices]
    survey = runner.survey(SurveyRequest(devices=devices, threads=default_threads()))
    limit = int(available_memory_bytes() * MEMORY_SHARE)
    empty = Plan([], {}, survey.environment, measures_of(config), config, limit, survey.rates, survey.missing_devices)
    return extended(empty, expand(config), runner)


def extended(plan: Plan, cells: Sequence[Cell], runner: Runner) -> Plan:
    """The plan with further cells, and what is known of them; of its resumption what earlier runs know of these, too.

    Raises:
        UsageError: as :func:`outline`.
    """
    prospects, problems = _prospects(cells, plan.measures, runner)
    for i, cell in enumerate(cells):
        if missing := plan.missing_devices.get(cell.device):
            prospects[i] = Prospect(unsupported=missing, code=prospects[i].code)
    for prospect in prospects:
        if prospect.usage_error:
            raise UsageError(prospect.usage_error)
    steps = foresee(
        cells,
        prospects,
        plan.rates,
        measures={name: measure.parameters for name, measure in plan.measures.items()},
        time_limit_s=plan.config.time_limit_s,
        memory_limit_bytes=plan.memory_limit_bytes,
    )
    further = replace(plan, steps=[*plan.steps, *steps], problems=[*plan.problems, *problems])
    if plan.steps and plan.config.resume:
        further.finished = _finished(further) | plan.finished
    return further


def measures_of(config: Config) -> dict[str, Measure]:
    """The measures that are asked for, by name."""
    return {
        choice.name: Measure(
            target=choice.target or "", parameters={key: values[0] for key, values in choice.parameters.items()}
        )
        for choice in config.measures
    }


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
    return _memory_limit(cell, plan.memory_limit_bytes)


def _memory_limit(cell: Cell, otherwise_bytes: int) -> int:
    asked = cell.device_parameters.get("memory_limit_bytes")
    return int(asked) if asked else otherwise_bytes


def request_for(cell: Cell, plan: Plan) -> MeasureRequest:
    """What a worker is asked for a cell: every measure of the plan."""
    request = measure_request(cell, plan.measures, plan.memory_limit_bytes)
    return request.model_copy(update={"peaks": plan.environment.peaks.get(cell.device)})


def measure_request(cell: Cell, measures: dict[str, Measure], memory_limit_bytes: int) -> MeasureRequest:
    """The same without a plan: the device's own threads and memory limit come first."""
    return MeasureRequest(
        cell=cell,
        measures=measures,
        threads=int(cell.device_parameters.get("threads") or default_threads()),
        memory_limit_bytes=_memory_limit(cell, memory_limit_bytes) if cell.device == "cpu" else None,
    )
