"""The gate over fake trees: what it calls a slower, a wrong, a larger and a disturbed head, and when it stops."""

import contextlib

import numpy as np
import pytest

from linbench.cell import Cell
from linbench.gate import speed
from linbench.gate.speed import Asked, Verdict, gate
from linbench.gate.trees import Tree, UnusableError
from linbench.protocol import Measure, Outcome
from linbench.record import Check, Memory, Speed, Status

CELLS = [Cell(mechanism=name, length=128, heads=2, head_dim=8) for name in ("softmax", "linear", "retnet")]
MEASURES = {"speed": Measure(target="x.y")}


class FakeTree(Tree):
    """Answers what a process would have answered; ``behaviour`` says by mechanism what is unusual."""

    def behave(self, seed, code="c0de", **behaviour):
        object.__setattr__(self, "behaviour", behaviour)
        object.__setattr__(self, "generator", np.random.default_rng(seed))
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "asked", [])
        return self

    def answers(self, requests, limit_s):
        self.asked.append([one["request"].get("cell", {}).get("mechanism") for one in requests])
        if requests[0]["kind"] == "foresee":
            cells = requests[0]["request"]["cells"]
            codes = [self.code if cell["mechanism"] == "linear" else "same" for cell in cells]
            return [{"prospects": [{"code": code} for code in codes]}]
        process = float(np.exp(self.generator.normal(0, 0.01)))
        return [self._outcome(one["request"]["cell"]["mechanism"], process) for one in requests]

    def _outcome(self, mechanism, process):
        unusual = self.behaviour.get(mechanism, {})
        status = Status(unusual.get("status", "ok"))
        reason = None if status is Status.OK else "so it was"
        if status not in (Status.OK, Status.NOISY):
            return Outcome(status=status, reason=reason).model_dump(mode="json")
        samples = list(process * unusual.get("factor", 1.0) * np.exp(self.generator.normal(0, 0.002, 12)))
        took = Speed(
            clock="perf_counter",
            warmup_ms=[1.0],
            samples_ms=samples,
            calls_per_sample=1,
            stop="converged",
            threads=1,
            foreign_cpu_cores=0.0,
        )
        size = int(unusual.get("bytes", 2**24))
        memory = Memory(method="VmHWM", increment_bytes=size, samples_bytes=[size], inputs_bytes=1)
        check = Check(passed=True, rows=1, rows_total=1, relative_error=0.0, worst_row_error=0.0, tolerance=1e-4)
        return Outcome(status=status, reason=reason, check=check, speed=took, memory=memory).model_dump(mode="json")


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Runs the gate over base and a head that behaves as it is told."""

    def run(everything=True, head_code="c0de", budget_s=1800.0, base=None, **behaviour):
        trees = (
            FakeTree("base", "a" * 40, tmp_path, "python").behave(1, **(base or {})),
            FakeTree("head", "b" * 40, tmp_path, "python").behave(2, head_code, **behaviour),
        )

        @contextlib.contextmanager
        def fake(*_):
            yield trees

        monkeypatch.setattr(speed, "two_trees", fake)
        result = gate(CELLS, MEASURES, 60.0, Asked(tmp_path, "main", everything=everything, budget_s=budget_s))
        return result, trees

    return run


def verdicts(result):
    return {finding.cell.mechanism: finding.verdict for finding in result.findings}


def test_identical_trees_pass(compared):
    result, _ = compared()
    assert set(verdicts(result).values()) == {Verdict.PASS}
    assert result.exit_code == 0


def test_a_slower_cell_is_found_looked_at_again_alone_and_fails_the_gate(compared):
    result, (_, head) = compared(linear={"factor": 1.2})
    assert verdicts(result) == {"softmax": "PASS", "linear": "SLOWER", "retnet": "PASS"}
    assert result.exit_code == 1
    assert head.asked[-1] == ["linear"]
    (finding,) = [one for one in result.findings if one.cell.mechanism == "linear"]
    assert finding.smallest == pytest.approx(1.2, abs=0.04)
    assert finding.ratio.low < 1.2 < finding.ratio.high


def test_a_faster_cell_passes_the_gate(compared):
    result, _ = compared(linear={"factor": 0.7})
    assert verdicts(result)["linear"] == "FASTER"
    assert result.exit_code == 0


@pytest.mark.parametrize("status", ["incorrect", "crash", "oom", "timeout"])
def test_a_head_that_is_wrong_is_never_faster(compared, status):
    result, _ = compared(linear={"status": status, "factor": 0.1})
    assert verdicts(result)["linear"] == "WRONG"
    assert result.exit_code == 1
    assert f"head: {status}: so it was" in [one.reason for one in result.findings]


def test_a_head_that_takes_more_memory_fails_the_gate(compared):
    result, _ = compared(retnet={"bytes": 2**26, "factor": 0.5})
    assert verdicts(result)["retnet"] == "WRONG"
    assert "head takes 67,108,864 bytes at its peak, base 16,777,216" in [one.reason for one in result.findings]


def test_a_cell_that_fails_in_base_is_invalid(compared):
    result, _ = compared(base={"softmax": {"status": "timeout"}}, softmax={"status": "timeout"})
    assert verdicts(result)["softmax"] == "INVALID"
    assert result.exit_code == 4


def test_disturbed_processes_are_no_samples(compared):
    result, _ = compared(linear={"status": "noisy"})
    assert verdicts(result)["linear"] == "INVALID"
    (finding,) = [one for one in result.findings if one.cell.mechanism == "linear"]
    assert finding.dropped > 0
    assert finding.ratio is None


def test_only_cells_whose_code_differs_are_measured(compared):
    result, (_, head) = compared(everything=False, head_code="other")
    assert list(verdicts(result)) == ["linear"]
    assert len(result.untouched) == 2
    assert all(words in (["linear"], [None]) for words in head.asked)


def test_with_nothing_touched_the_gate_passes_without_a_measurement(compared):
    result, (base, head) = compared(everything=False)
    assert result.findings == []
    assert result.exit_code == 0
    assert base.asked == head.asked == [[None]]


def test_a_tree_that_gives_no_answer_makes_the_gate_invalid(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def broken(*_):
        raise UnusableError("base does not build: no such compiler")
        yield

    monkeypatch.setattr(speed, "two_trees", broken)
    result = gate(CELLS, MEASURES, 60.0, Asked(tmp_path, "main"))
    assert result.exit_code == 4
    assert result.invalid == "base does not build: no such compiler"


def test_an_undecided_cell_gets_more_blocks_until_the_budget_is_spent(compared, monkeypatch):
    verdict = [Verdict.UNDECIDED]
    monkeypatch.setattr(speed, "decided", lambda *_: verdict[0])
    clock = iter(range(10_000))
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    result, _ = compared(budget_s=5.0)
    assert result.exit_code == 3
    assert result.findings[0].blocks > speed.FIRST_BLOCKS
