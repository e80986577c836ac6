"""Rounds, their order, and disturbed times that are taken again, with a runner that answers from a script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from linbench import execution
from linbench.cell import Cell
from linbench.config import Axes, Choice, Config, Shard
from linbench.execution import IN_VAIN, execute, in_order
from linbench.plan import Skip, Step
from linbench.prospect import Prospect
from linbench.protocol import Measure, MeasureRequest, Outcome
from linbench.record import Check, Environment, Record, Round, Speed, Status
from linbench.runner import Runner
from linbench.store import read_all
from linbench.sweep import Plan

PASSED = Check(passed=True, rows=5, rows_total=5, relative_error=1e-7, worst_row_error=1e-6, tolerance=1e-4)
ENVIRONMENT = Environment(
    machine="some-cpu-2-cpu",
    cpu="Some CPU",
    cpu_flags=["avx2"],
    cores_physical=2,
    cores_logical=4,
    threads=1,
    memory_bytes=2**34,
    gpus=[],
    python="3.11",
    torch="2.13",
    blas="mkl",
    os="Linux",
    clock="tsc",
    linbench="0.1.0",
)
MEASURES = {"speed": Measure(target="speed"), "error": Measure(target="error")}


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "RETRY_WAIT_S", 0.0)


class Script:
    """A runner that answers each request with the next status, and counts its servers."""

    def __init__(self, statuses: Iterable[Status]) -> None:
        self.requests: list[tuple[int, MeasureRequest]] = []
        self.server = 0
        self._statuses = iter(statuses)

    def renew(self) -> None:
        self.server += 1

    def measure(self, request: MeasureRequest, _limit_s: float) -> Outcome:
        self.requests.append((self.server, request))
        status = next(self._statuses, None)
        if status is None:
            raise KeyboardInterrupt
        if status not in (Status.OK, Status.NOISY):
            return Outcome(status=status, reason="because")
        speed = Speed(
            clock="perf_counter",
            warmup_ms=[3.0],
            samples_ms=[float(len(self.requests))],
            calls_per_sample=1,
            stop="converged",
            threads=1,
        )
        reason = None if status is Status.OK else "others kept the machine busy"
        return Outcome(status=status, reason=reason, check=PASSED, speed=speed)


class Silent:
    def starts(self, step: Step, index: int) -> None: ...

    def ended(self, step: Step, result: Record | Round) -> None: ...


def steps(lengths: Iterable[int], **more: Any) -> list[Step]:
    cells = [Cell(mechanism="linear", length=length, seed=seed) for length in lengths for seed in range(4)]
    return [Step(cell, Prospect(code="c"), 1.0, None, **more) for cell in cells]


def forever(status: Status) -> Iterator[Status]:
    while True:
        yield status


def plan_of(folder: Path, planned: list[Step], rounds: int, retries: int = 2) -> Plan:
    axes = dict.fromkeys(("length", "batch", "heads", "head_dim", "value_dim"), 8) | {"seed": 0, "dtype": "float32"}
    asked = Config(
        mechanisms=[Choice(name="linear")],
        inputs=[Choice(name="gaussian")],
        measures=[Choice(name=name) for name in MEASURES],
        devices=[Choice(name="cpu")],
        axes=Axes(**axes, implementation="torch", causal=False, **{"pass": "forward"}),  # type: ignore[arg-type]
        time_limit_s=60,
        results_dir=str(folder),
        resume=True,
        rounds=rounds,
        retries=retries,
        shard=Shard(),
    )
    return Plan(planned, {}, ENVIRONMENT, MEASURES, asked, 2**30)


def carry_out(plan: Plan, statuses: Iterable[Status]) -> Script:
    script = Script(statuses)
    execute(plan, cast(Runner, script), "linbench run", Silent())
    return script


def test_cells_of_a_length_are_shuffled_and_short_lengths_come_first() -> None:
    planned = steps([64, 16, 32])
    order = in_order(planned, 7, 0)
    assert [step.cell.length for step in order] == [16] * 4 + [32] * 4 + [64] * 4
    assert sorted(step.cell.seed for step in order[:4]) == [0, 1, 2, 3]
    assert order == in_order(planned, 7, 0)
    assert order != in_order(planned, 7, 1)
    assert order != in_order(planned, 8, 0)


def test_every_round_is_timed_by_another_server_and_measures_nothing_else(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, steps([16, 32]), rounds=3)
    script = carry_out(plan, forever(Status.OK))
    assert [server for server, _ in script.requests] == [0] * 8 + [1] * 8 + [2] * 8
    assert [list(request.measures) for _, request in script.requests] == [["speed", "error"]] * 8 + [["speed"]] * 16
    _, records = read_all(plan.folder.glob("*.jsonl"))
    assert [[again.index for again in record.rounds] for record in records] == [[1, 2]] * 8
    assert len({tuple(speed.samples_ms) for record in records for speed in record.timings.values()}) == 24


def test_what_was_not_measured_is_not_timed_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, steps([16]), rounds=2)
    script = carry_out(plan, [Status.OK, Status.CRASH, Status.OK, Status.OOM, Status.OK, Status.TIMEOUT])
    assert len(script.requests) == 6
    assert sorted(len(record.rounds) for record in plan.records) == [0, 0, 1, 1]
    assert sorted(str(again.status) for record in plan.records for again in record.rounds) == ["ok", "timeout"]


def test_rounds_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    planned = steps([16, 32])
    plan = plan_of(tmp_path, planned, rounds=3)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, [Status.OK] * 11)  # eight records and three rounds
    _, records = read_all(plan.folder.glob("*.jsonl"))
    later = plan_of(tmp_path, planned, rounds=3)
    later.finished = {record.cell.key: record for record in records}
    assert len(later.repeated) == 13
    assert len(carry_out(later, forever(Status.OK)).requests) == 13
    _, records = read_all(plan.folder.glob("*.jsonl"))
    assert [sorted(again.index for again in record.rounds) for record in records] == [[1, 2]] * 8
    assert later.repeated == []


def test_a_disturbed_time_is_set_aside_and_taken_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, steps([16])[:1], rounds=1, retries=3)
    script = carry_out(plan, [Status.NOISY, Status.NOISY, Status.OK])
    (record,) = plan.records
    assert (record.status, record.reason) == (Status.OK, None)
    assert record.speed is not None
    assert (record.speed.discarded_rounds, record.speed.samples_ms) == (2, [3.0])
    assert [list(request.measures) for _, request in script.requests] == [["speed", "error"], ["speed"], ["speed"]]


def test_a_time_that_stays_disturbed_is_kept_as_noisy_with_its_count(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, steps([16])[:1], rounds=1, retries=2)
    assert len(carry_out(plan, forever(Status.NOISY)).requests) == 3
    (record,) = plan.records
    assert record.status is Status.NOISY
    assert record.speed is not None
    assert record.speed.discarded_rounds == 2


def test_a_retry_that_fails_leaves_what_there_was(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, steps([16])[:1], rounds=1, retries=2)
    carry_out(plan, [Status.NOISY, Status.CRASH])
    (record,) = plan.records
    assert record.status is Status.NOISY
    assert record.speed is not None
    assert record.speed.samples_ms == [1.0]


def test_a_lasting_load_is_not_waited_for_at_every_cell(tmp_path: Path) -> None:
    planned = steps([16, 32, 64])
    busy = plan_of(tmp_path / "busy", planned, rounds=1, retries=2)
    assert len(carry_out(busy, forever(Status.NOISY)).requests) == 3 * IN_VAIN + (len(planned) - IN_VAIN)
    freed = plan_of(tmp_path / "freed", planned, rounds=1, retries=2)
    script = [Status.NOISY] * 3 * IN_VAIN + [Status.OK, Status.NOISY, Status.OK, *[Status.OK] * len(planned)]
    carry_out(freed, script)
    assert sum(record.speed.discarded_rounds == 1 for record in freed.records if record.speed) == 1


def test_a_cell_that_is_not_started_has_its_reason_and_no_rounds(tmp_path: Path) -> None:
    planned = [step._replace(skip=Skip(Status.TIMEOUT, "not started")) for step in steps([16])]
    plan = plan_of(tmp_path, planned, rounds=2)
    assert carry_out(plan, []).requests == []
    assert {record.reason for record in plan.records} == {"not started"}
    assert plan.repeated == []
