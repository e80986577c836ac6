"""Cold starts: each stage holds what happens in it, whoever wrote the mechanism, and a failure is one sentence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.cold_start import ColdStartError, measure_cold_start
from linbench.measure.cold_start_process import _autotune_ns, _cache_state
from linbench.record import ColdStart
from linbench.worker import classify, prepare

SOURCE = """
import os, time
from linbench.mechanisms.base import Description, Mechanism

{at_import}

class Theirs(Mechanism):
    description = Description("the values", "replacement", (False,), "none", "none", 2026)
    calls = 0

    def __init__(self, geometry):
        super().__init__(geometry)
        {at_build}

    def reference(self, q, k, v, rows=None):
        return v if rows is None else v[:, :, rows]

    def forward_torch(self, q, k, v):
        print("words of a mechanism's own")
        self.calls += 1
        if self.calls == 1:
            {at_first_call}
        return v.clone()

    def flops(self, cell):
        return 0

    def min_bytes(self, cell):
        return 0
"""


def call(**changes: object) -> Call:
    shape = {"length": 33, "heads": 2, "head_dim": 8, "value_dim": 6}
    return prepare(Cell.model_validate({"mechanism": "linear", **shape, **changes}))


def theirs(folder: Path, monkeypatch: pytest.MonkeyPatch, **parts: str) -> Call:
    """A call whose fresh processes find another mechanism in their working directory: the module ``beside``."""
    lines = {"at_import": "", "at_build": "pass", "at_first_call": "pass"} | parts
    (folder / "beside.py").write_text(SOURCE.format(**lines))
    monkeypatch.chdir(folder)
    # the test's own process has no such module: only the cell names it
    cell = call().cell.model_copy(update={"mechanism": "theirs", "target": "beside.Theirs"})
    return Call(cell, *(getattr(call(), name) for name in ("mechanism", "q", "k", "v")))


def test_every_process_gives_every_stage() -> None:
    found = measure_cold_start(call(), torch.empty(0), repeats=2, steady_calls=3)
    stages = (found.interpreter_ms, found.import_torch_ms, found.import_mechanism_ms, found.build_ms)
    for values in (*stages, found.first_call_ms):
        assert len(values) == 2
        assert min(values) > 0
    assert [len(calls) for calls in found.steady_calls_ms] == [3, 3]
    assert found.compile_ms[0] == found.first_call_ms[0] - sorted(found.steady_calls_ms[0])[1]
    assert found.device_ms is found.autotune_ms is found.compiler_cache is None


@pytest.mark.parametrize(
    ("part", "stage"), [("at_import", "import_mechanism"), ("at_build", "build"), ("at_first_call", "first_call")]
)
def test_what_takes_time_is_found_in_its_stage(
    part: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = theirs(tmp_path, monkeypatch, **{part: "time.sleep(3)"})
    found = measure_cold_start(one, torch.empty(0), repeats=1, steady_calls=2)
    times = {name: getattr(found, f"{name}_ms")[0] for name in ("import_mechanism", "build", "first_call")}
    assert times[stage] >= 3000
    assert [name for name, value in times.items() if value >= 3000] == [stage]
    if stage == "first_call":
        assert found.compile_ms[0] > 2000


@pytest.mark.parametrize(
    ("part", "line", "sentence"),
    [
        ("at_import", "raise OSError('a library is missing')", "stage 'import_mechanism': .* a library is missing"),
        ("at_build", "raise IndexError('no such head')", "failed in its stage 'build': IndexError: no such head"),
        ("at_first_call", "raise ValueError('a\\nb')", "failed in its stage 'first_call': ValueError: a$"),
        ("at_build", "os._exit(3)", "ended with exit code 3 and gave no answer$"),
        ("at_import", "os.kill(os.getpid(), 9)", "ended with signal 9 and gave no answer$"),
    ],
)
def test_a_failure_is_one_sentence(
    part: str, line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ColdStartError, match=sentence) as raised:
        measure_cold_start(theirs(tmp_path, monkeypatch, **{part: line}), torch.empty(0), repeats=1)
    assert "\n" not in classify(raised.value)[1]


def test_the_environment_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_WORD", "of ours")
    seen = tmp_path / "seen.json"
    look = f"open({str(seen)!r}, 'w').write(__import__('json').dumps(dict(os.environ)))"
    measure_cold_start(theirs(tmp_path, monkeypatch, at_build=look), torch.empty(0), repeats=1)
    found = json.loads(seen.read_text())
    assert {name: found.get(name) for name in os.environ} == dict(os.environ)


@pytest.mark.parametrize(
    ("compiler", "variable"), [("triton", "TRITON_CACHE_DIR"), ("torch._inductor.codecache", "TORCHINDUCTOR_CACHE_DIR")]
)
def test_a_compilers_cache_is_empty_or_filled(
    compiler: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert _cache_state(compiler) == "empty"
    (tmp_path / "cache").mkdir()
    assert _cache_state(compiler) == "empty"
    (tmp_path / "cache" / "kernel.cubin").write_text("")
    assert _cache_state(compiler) == "filled"


def test_time_of_autotuners_is_summed_over_those_that_have_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Autotuner:
        bench_time: float | None = None

    module = ModuleType("triton.runtime.autotuner")
    module.Autotuner = Autotuner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime.autotuner", module)
    idle, one, other = Autotuner(), Autotuner(), Autotuner()
    assert _autotune_ns() is None
    one.bench_time, other.bench_time = 0.25, 1.5
    assert _autotune_ns() == 1_750_000_000
    assert idle.bench_time is None


def test_no_number_of_a_cold_start_may_be_infinite() -> None:
    found = measure_cold_start(call(), torch.empty(0), repeats=1, steady_calls=1)
    with pytest.raises(ValueError, match="finite"):
        ColdStart.model_validate(found.model_dump() | {"compile_ms": [float("inf")]})
