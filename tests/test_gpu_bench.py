"""A run on a GPU, without one: what it plans, how it goes on, what it makes of what fails, what it says at the end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from linbench_kernels.additive.configs import Config
from linbench_kernels.additive.configs import Task as AdditiveTask
from linbench_kernels.choices import Choice

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
bench, child, parent, plan, records, rivals, side_by_side, summary, timing, tuning = (
    importlib.import_module(f"gpu_bench_parts.{name}")
    for name in (
        "bench",
        "child",
        "parent",
        "plan",
        "records",
        "rivals",
        "side_by_side",
        "summary",
        "timing",
        "tuning",
    )
)
SCRIPT = [sys.executable, str(ROOT / "scripts" / "gpu_bench.py")]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *words], capture_output=True, text=True, check=False)


def options(**changes: Any) -> argparse.Namespace:
    given = {"device": "cuda", "mechanisms": None, "again": False, "output": None, "minutes": 7.0, "parts": []}
    return argparse.Namespace(**given | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing() -> None:
    done = run("correctness")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_bench: torch ")
    assert "sees no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_rehearsal_never_writes_among_the_results() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 2
    assert "needs --output" in done.stderr


def test_the_plan_needs_no_gpu() -> None:
    done = run("--dry-run", "correctness", "side_by_side")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "correctness",
        "side_by_side",
    ]


def test_the_grid_spans_what_was_asked_for_and_nothing_that_cannot_fit() -> None:
    shapes = plan.shapes()
    assert {shape.width for shape in shapes} == {64, 128}
    assert (min(x.heads for x in shapes), max(x.heads for x in shapes)) == (8, 512)
    assert (min(x.tokens for x in shapes), max(x.tokens for x in shapes)) == (512, 131072)
    assert max(shape.tensor_bytes for shape in shapes) <= 2**32
    assert len(set(shapes)) == len(shapes)
    assert all(batch * heads == shape.heads for shape in shapes for batch, heads in [shape.split])


@pytest.mark.parametrize("part", plan.PARTS)
def test_items_have_names_of_their_own_and_fit_a_run(part: str) -> None:
    items = importlib.import_module(f"gpu_bench_parts.{part}").items(plan.extent("cuda"))
    assert items
    assert len({item.key for item in items}) == len(items)
    assert all(item.part == part for item in items)
    assert all(item.expected_s <= 60 * 7 for item in items)


def test_what_matters_most_comes_first() -> None:
    assert plan.PARTS[:2] == ("correctness", "peaks")
    first = importlib.import_module("gpu_bench_parts.correctness").items(plan.extent("cuda"))[0]
    assert first.key == "retnet D=128 M=128 bfloat16 N=200"
    assert set(plan.fused_mechanisms()) >= {"linear", "retnet", "mamba2", "gla", "deltanet"}


def test_every_part_has_its_share_of_a_run_and_those_that_are_named_have_all_of_it() -> None:
    assert sum(plan.SHARES.values()) == pytest.approx(1)
    assert parent.shares(["tuning", "peaks"]) == [("tuning", 1.0), ("peaks", 1.0)]
    found = parent.shares([])
    assert dict(found[: len(plan.PARTS)]) == plan.SHARES
    assert found[len(plan.PARTS) :] == [(part, 1.0) for part in plan.PARTS]


def test_a_run_gives_parts_their_time_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Hands()
    asked: list[tuple[str, float]] = []

    def run_part(part: str, _options: object, _folder: Path, until: float) -> str | None:
        asked.append((part, round(until - clock.now)))
        clock.now += 30 if part == "correctness" else until - clock.now
        return "no such package" if part == "peaks" else None

    monkeypatch.setattr(parent, "run_part", run_part)
    monkeypatch.setattr(parent, "time", clock)
    assert parent.run(options(output=tmp_path, minutes=5.0)) == 1
    assert asked[:6] == [(part, round(300 * share)) for part, share in plan.SHARES.items()]
    assert asked[6] == ("correctness", 75)
    assert clock.now <= 300
    assert (tmp_path / "summary.md").is_file()


class Hands:
    """A clock that goes on when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now


def item(key: str = "a", **changes: Any) -> Any:
    return plan.Item("tuning", key, modules=("linbench.stats",), **changes)


def test_what_is_on_the_disk_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = records.Records(tmp_path, "tuning")
    every = [item("a"), item("b"), item("c")]
    kept.item(every[0], "ok", 1.0)
    kept.item(every[1], "failed", 1.0, "because")
    assert [x.key for x in kept.pending(every)] == ["c"]
    assert [x.key for x in kept.pending(every, again=True)] == ["b", "c"]
    monkeypatch.setattr(plan, "_code", lambda *_: "other code")
    assert [x.key for x in kept.pending(every)] == ["a", "b", "c"]


def test_a_line_that_was_cut_off_is_left_out_and_written_over(tmp_path: Path) -> None:
    kept = records.Records(tmp_path, "tuning")
    kept.item(item("a"), "ok", 1.0)
    with kept.path.open("a") as file:
        file.write('{"kind": "item", "key": "b"')
    assert [line["key"] for line in kept.read()] == ["a"]
    kept.item(item("c"), "ok", 1.0)
    assert [line["key"] for line in kept.read()] == ["a", "c"]


def given_bench(tmp_path: Path, device: str = "cpu") -> Any:
    extent = dataclasses.replace(plan.extent("cpu"), device=device)
    return bench.Bench(extent, tmp_path, time.time() + 600)


def raising(error: Exception) -> Callable[..., dict[str, Any]]:
    def fail(*_: object) -> dict[str, Any]:
        raise error

    return fail


@pytest.mark.parametrize(
    ("does", "status", "told"),
    [
        (lambda *_: {"found": 3}, "ok", None),
        (lambda *_: {"status": "wrong", "reason": "error 0.5"}, "wrong", "error 0.5"),
        (raising(bench.RefusedError("no such width")), "refused", "no such width"),
        (raising(torch.OutOfMemoryError("far too much\nand more")), "refused", "out of memory: far too much"),
        (raising(KeyError("x")), "failed", "KeyError: 'x'"),
    ],
)
def test_what_becomes_of_an_item_is_a_line(does: Any, status: str, told: str | None, tmp_path: Path) -> None:
    kept = records.Records(tmp_path, "tuning")
    assert child.one(does, item(), given_bench(tmp_path), kept, tmp_path) == status
    line = kept.items()["a"]
    assert (line["status"], line.get("reason")) == (status, told)
    assert not (tmp_path / "doing").exists()


def test_a_lost_device_is_told_apart_and_an_end_of_time_leaves_no_line(tmp_path: Path) -> None:
    kept = records.Records(tmp_path, "tuning")
    lost = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert child.one(lost, item("a"), given_bench(tmp_path), kept, tmp_path) == "poisoned"
    assert kept.items()["a"]["status"] == "failed"
    assert child.one(raising(bench.UnfinishedError()), item("b"), given_bench(tmp_path), kept, tmp_path) is None
    assert "b" not in kept.items()


@pytest.mark.parametrize(("ago_s", "status"), [(1.0, "crash"), (1000.0, "timeout")])
def test_what_kills_a_child_costs_its_own_item(
    ago_s: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = importlib.import_module("gpu_bench_parts.tuning").items(plan.extent("cuda"))
    ends = iter([-11, child.RESTART, 0])

    def dying(_part: str, _options: object, _folder: Path, _until: float, scratch: Path) -> int:
        code = next(ends)
        if code == -11:
            told = {"key": items[0].key, "began": time.time() - ago_s, "limit_s": items[0].limit_s}
            (scratch / "doing").write_text(json.dumps(told))
        return code

    monkeypatch.setattr(parent, "child", dying)
    assert parent.run_part("tuning", options(), tmp_path, time.time() + 100) is None
    (line,) = records.Records(tmp_path, "tuning").items().values()
    assert (line["key"], line["status"]) == (items[0].key, status)
    assert next(ends, None) is None


def test_a_child_that_cannot_begin_is_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeless(_part: str, _options: object, _folder: Path, _until: float, scratch: Path) -> int:
        (scratch / "said").write_text("Traceback\nImportError: no such package\n")
        return 1

    monkeypatch.setattr(parent, "child", hopeless)
    said = parent.run_part("tuning", options(), tmp_path, time.time() + 100)
    assert said == "its process ended with 1 before an item: ImportError: no such package"


class Clock:
    """Stands in for the clocks of a device: notes whom it has called, and has a time for each."""

    called: list[str]
    times_ms: ClassVar[dict[str, float]] = {"ours": 2.0, "theirs": 3.0, "long": 50.0}

    def __init__(self, _device: object) -> None:
        return

    def events(self, side: Any, _calls: int) -> float:
        self.called.append(side.name)
        return self.times_ms[side.name]

    def host(self, side: Any, expected_ms: float) -> list[float]:
        return [expected_ms + 0.5]

    def graph(self, side: Any) -> tuple[list[float], str | None]:
        return ([1.0], None) if side.name == "ours" else ([], "it cannot be captured")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(timing, "DeviceClock", Clock)
    Clock.called = []
    return Clock


def test_sides_take_turns_forth_and_back(clock: type[Clock], tmp_path: Path) -> None:
    sides = [timing.Side(name, lambda: None, "forward") for name in ("ours", "theirs", "long")]
    found = timing.timed(sides, given_bench(tmp_path, "cuda"))
    rounds = clock.called[9:]
    assert rounds[:6] == ["ours", "theirs", "long", "long", "theirs", "ours"]
    assert found["ours"] == {"samples_ms": [2.0] * timing.MOST_ROUNDS, "host_ms": [2.5], "graph_ms": [1.0]}
    assert found["theirs"]["graph_reason"] == "it cannot be captured"
    assert set(found["long"]) == {"samples_ms"}
    alone = timing.timed(sides, given_bench(tmp_path, "cuda"), device_alone=True)
    assert set(alone["ours"]) == {"samples_ms"}


def test_a_rehearsal_calls_every_side_and_has_no_time(clock: type[Clock], tmp_path: Path) -> None:
    called: list[str] = []
    sides = [timing.Side(name, lambda name=name: called.append(name), "forward") for name in "ab"]
    assert timing.timed(sides, given_bench(tmp_path)) == {"a": {"samples_ms": []}, "b": {"samples_ms": []}}
    assert called == ["a", "b", "b", "a"]
    assert clock.called == []


def given() -> Any:
    mechanism = bench.build("retnet", "torch", 2, 4, 4, torch.device("cpu"))
    return bench.draw(mechanism, 1, 9, torch.float32, torch.device("cpu"), grad=True)


def rival(form: str, make: Any, **changes: Any) -> Any:
    return rivals.Rival("retnet", "package", form, make, **changes)


def test_who_is_absent_fails_or_disagrees_is_left_out_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = given()
    off = lambda *x: 1.5 * same.ours(*x)  # noqa: E731
    found = (
        rival("fine", lambda _: same.ours),
        rival("missing", raising(ImportError("No module named 'package'"))),
        rival("failing", lambda _: raising(ValueError("not this width\nreally"))),
        rival("far", lambda _: off),
        rival("another", lambda _: off, unlike=True),
        rival("forward alone", lambda _: same.ours, backward=False),
        rivals.Rival("linear", "package", "of another", lambda _: same.ours),
    )
    monkeypatch.setattr(rivals, "rivals", lambda: found)
    toward = torch.ones(1, 9, 2, 4)
    sides = [timing.Side("ours", side_by_side.call_of(same.ours, same, toward), "forward_backward")]
    first: dict[str, float] = {}
    distances, left_out = side_by_side.add_rivals("retnet", sides, first, same, toward, given_bench(tmp_path))
    assert [side.name for side in sides] == ["ours", "package fine", "package another"]
    assert distances == {"package fine": 0.0}
    assert set(first) == {"package fine", "package another"}
    assert left_out == {
        "package missing": "absent: No module named 'package'",
        "package failing": "ValueError: not this width",
        "package far": "disagrees: relative distance 0.5",
        "package forward alone": "it has no backward",
    }


def test_a_rival_that_poisons_the_device_is_no_mere_reason() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        side_by_side.why(RuntimeError("CUDA error: unspecified launch failure"))


def test_rivals_are_named_once_and_belong_to_mechanisms_of_ours() -> None:
    known = set(importlib.import_module("linbench.registry").BUILT_IN)
    for found in (rivals.rivals(), rivals.step_rivals()):
        names = [(one.mechanism, one.name) for one in found]
        assert len(set(names)) == len(names)
        assert {one.mechanism for one in found} <= known


def choice(config: Config = Config(chunk=64, columns=64, warps=4, stages=2)) -> Choice:  # noqa: B008
    task = AdditiveTask("forward", "sm_90", 2, 128, 128, "head", False, aligned=True)
    return Choice("additive", task, config)


def test_neighbours_differ_in_one_setting_by_one_place() -> None:
    found = tuning.neighbours(choice())
    changes = [
        {key: value for key, value in dataclasses.asdict(x).items() if value != getattr(choice().config, key)}
        for x in found
    ]
    assert all(len(change) == 1 for change in changes)
    assert changes == [
        {"chunk": 32},
        {"chunk": 128},
        {"columns": 32},
        {"columns": 128},
        {"warps": 2},
        {"warps": 8},
        {"stages": 1},
        {"stages": 3},
        {"tma": True},
    ]


def test_tuning_climbs_while_that_helps_and_tries_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more stages and the fewer warps, the faster: an interval that reaches 1 is no gain."""
    tried = []

    def fake(_choice: Choice, candidate: Config, *_: object) -> dict[str, Any]:
        tried.append(candidate)
        ratio = 1 + 0.1 * (candidate.stages - 2) + 0.05 * (4 - candidate.warps)
        return {"ratio": ratio, "low": ratio - 0.02, "high": ratio + 0.02}

    monkeypatch.setattr(tuning, "trial", fake)
    trials: list[dict[str, Any]] = []
    best = tuning.climb(choice(), lambda: None, [], given_bench(tmp_path, "cuda"), trials)
    assert best["changed"]
    assert (best["best"]["stages"], best["best"]["warps"]) == (4, 2)
    assert best["ratio"] == pytest.approx(1.3)
    assert len(tried) == len(set(tried)) == len(trials)


def line(name: str, pass_: str, ours: float, **others: float) -> dict[str, Any]:
    times = {side: {"samples_ms": [x] * 9} for side, x in {"ours": ours, **others}.items()}
    sizes = {"batch": 8, "heads": 16, "tokens": 8192, "width": 128, "dtype": "bfloat16"}
    cost = {"flops": 1, "min_bytes": 10**9}
    return {
        "mechanism": name,
        "pass": pass_,
        **sizes,
        "cost": cost,
        "times": times,
        "left_out": {"helion x": "absent: no"},
    }


def test_the_summary_has_everything_and_its_conclusions_last(tmp_path: Path) -> None:
    kept = {part: records.Records(tmp_path, part) for part in plan.PARTS}
    device = {"gpus": ["Some GPU"], "driver": "1.2", "commit": "abc", "cpu": "a CPU"}
    kept["correctness"].append("session", environment=device, packages={"torch": "2.11"}, rehearsal=False)
    key = "retnet D=64 M=64 bfloat16 N=200"
    kept["correctness"].item(plan.Item("correctness", key), "ok", 1.0, errors={"o": 0.003, "dq": 0.004})
    key = "gla D=64 M=64 bfloat16 N=200"
    kept["correctness"].item(plan.Item("correctness", key), "wrong", 1.0, "too far", errors={"o": "not finite"})
    rates = {"copy_bytes_per_s": {"65536": 9e12, "1048576": 4e12}, "product_flops_per_s": {"bfloat16": 7e14}}
    kept["peaks"].item(plan.Item("peaks", "peaks"), "ok", 1.0, peaks=rates)
    kept["kernel_tests"].append("test", test="a::b", file="a", code="c", outcome="passed", elapsed_s=1)
    found = line("retnet", "forward", 0.5, **{"fla chunk": 1.5, "fla fused": 1.0})
    kept["side_by_side"].item(plan.Item("side_by_side", "x"), "ok", 1.0, **found)
    kept["side_by_side"].item(plan.Item("side_by_side", "y"), "refused", 1.0, "about 99 GiB are needed, 1 are free")
    kept["decode"].item(plan.Item("decode", "x"), "ok", 1.0, **line("retnet", "decode", 0.02, **{"fla step": 0.01}))
    told = {**tuning.named(choice(), choice().config), "best": {"chunk": 64, "columns": 64, "warps": 8}, "ratio": 1.2}
    best = [{**told, "changed": True}]
    kept["tuning"].item(item(), "ok", 1.0, mechanism="retnet", **{"pass": "forward"}, shape="s", trials=[{}], best=best)
    text = summary.page(tmp_path, plan.extent("cuda"))
    assert text.startswith("# What was found on a GPU\n\nSome GPU, driver 1.2, torch 2.11; linbench at abc.")
    assert "| `retnet` | 0.004 |" in text
    assert "| `gla` | inf |" in text
    assert "| 0.5 | – | 50% | fla fused | 1 | 2.00 (2.00 to 2.00) |" in text
    assert "warps 4 → 8" in text
    assert "- helion x: absent: no (2)" in text
    assert "correctness gla D=64 M=64 bfloat16 N=200: wrong: too far" in text
    last = text.rpartition("## In short")[2]
    assert "forward: the fastest other takes 2.00 times as long as ours in the geometric mean of 1 rows" in last
    assert "decode: the fastest other takes 0.50 times as long as ours" in last
    assert "ours is slower in 1." in last
    assert summary.anything_wrong(tmp_path)
    (proposed,) = json.loads((tmp_path / "tables.json").read_text())
    assert (proposed["family"], proposed["kernel"], proposed["ratio"]) == ("additive", "forward", 1.2)
    table = json.loads((tmp_path / "tuned" / "sm_90.json").read_text())
    assert table["source"] == "measured on Some GPU"
    (entry,) = table["entries"]
    assert (entry["task"], entry["config"]["warps"]) == (dataclasses.asdict(choice().task), 8)


def test_a_summary_of_nothing_says_so(tmp_path: Path) -> None:
    text = summary.page(tmp_path, plan.extent("cuda"))
    assert "Nothing has been run." in text
    assert not summary.anything_wrong(tmp_path)
    assert list(tmp_path.iterdir()) == []


def rehearsed(parts: list[str], folder: Path) -> dict[str, Any]:
    """The records of the parts after a rehearsal, and after a second one that has changed nothing."""
    words = [*parts, "--device", "cpu", "--output", str(folder), "--mechanisms", "retnet"]
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# A rehearsal without a GPU: nothing here is a result" in done.stdout
    kept = {part: records.Records(folder, part) for part in parts}
    before = {part: kept[part].read() for part in parts}
    assert run(*words).returncode == 0
    assert {part: kept[part].read() for part in parts} == before
    for part in parts:
        assert {line["status"] for line in kept[part].items().values()} == {"ok"}, part
        sides = itertools.chain.from_iterable(x.get("times", {}).values() for x in kept[part].items().values())
        assert all(not side["samples_ms"] for side in sides)
    return kept


def test_a_rehearsal_goes_through_parts_and_takes_them_up_where_they_ended(tmp_path: Path) -> None:
    kept = rehearsed(["correctness", "side_by_side"], tmp_path)
    first = kept["correctness"].items()["retnet D=16 M=20 float32 N=40"]
    assert set(first["errors"]) == {"o", "dq", "dk", "dv", "decoded"}
    assert first["same_bits"]
    assert set(first["configurations"]) == {"additive forward", "additive backward"}
    left_out = [x["left_out"] for x in kept["side_by_side"].items().values() if x["mechanism"] == "retnet"]
    assert len(left_out) == 2
    assert all("fla chunk_retention" in reasons for reasons in left_out)


@pytest.mark.slow
def test_a_rehearsal_of_tokens_tables_and_tests(tmp_path: Path) -> None:
    kept = rehearsed(["kernel_tests", "decode", "tuning"], tmp_path)
    assert {one["outcome"] for one in kept["kernel_tests"].read() if one["kind"] == "test"} == {"passed"}
    assert all(set(x["distances"]) >= {"ours", "linbench torch"} for x in kept["decode"].items().values())
    assert all(line["trials"] for line in kept["tuning"].items().values())
