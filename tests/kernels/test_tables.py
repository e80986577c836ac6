"""Where configurations come from, in one order; every one of the checked-in tables computes what it should."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from linbench_kernels import additive, tables
from linbench_kernels.additive import launch
from linbench_kernels.additive.configs import Config, Task, config
from linbench_kernels.autotune import autotune
from linbench_kernels.choices import Choice, noted, replaced
from linbench_kernels.device import INTERPRETED
from oracle import Case, errors

TASK = Task("forward", "sm_90", 2, 64, 64, "none", False, True)
FILES = sorted((Path(tables.__file__).parent / "tuned").glob("*.json"))
VARIANTS = {
    "plain": {},
    "head": {"decay": "head", "fixed": ("log_decay",)},
    "token": {"decay": "token"},
    "weights": {"decay": "token", "entering": True, "skip": True},
    "features": {"feature": "elu_plus_one", "normalised": True, "initial": False},
}
"""Those of ``scripts/kernel_binaries/additive.py``, which the table was chosen for."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for tables: ``tuned/sm_90.json`` of the package and ``device.json`` of this device."""
    monkeypatch.setattr(tables.importlib.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(tables, "cache_file", lambda: tmp_path / "device.json")
    tables.forget()
    yield tmp_path
    monkeypatch.undo()
    tables.forget()


def entry(task: Task, **settings: object) -> dict[str, object]:
    return {"family": "additive", "task": dataclasses.asdict(task), "config": settings}


def called(device: torch.device) -> Choice:
    with noted() as choices:
        q, k, v = torch.ones(3, 1, 2, 20, 16, device=device)
        additive.attention(q, k, v)
    return choices[0]


def test_the_device_comes_before_the_table_and_the_table_before_the_rule(files: Path) -> None:
    by_rule = config(TASK)
    assert tables.source("additive", (TASK,)) == "rule"
    tables.write(files / "tuned" / "sm_90.json", "by hand", [entry(TASK, warps=2, stages=1)])
    tables.forget()
    assert config(TASK) == dataclasses.replace(by_rule, warps=2, stages=1)
    assert tables.source("additive", (TASK,)) == "by hand"
    tables.write(files / "device.json", "autotuned on X", [entry(TASK, warps=16)])
    tables.forget()
    assert config(TASK) == dataclasses.replace(by_rule, warps=16)
    assert tables.source("additive", (TASK,)) == "autotuned on X"
    other = dataclasses.replace(TASK, decay="head")
    assert tables.source("additive", (other,)) == "rule"


def test_a_choice_says_where_it_comes_from(files: Path, device: torch.device) -> None:
    assert called(device).source == "rule"
    tables.write(files / "device.json", "autotuned on X", [entry(called(device).task, chunk=16)])
    tables.forget()
    assert (called(device).source, called(device).config.chunk) == ("autotuned on X", 16)
    with replaced(lambda choice: dataclasses.replace(choice.config, chunk=32)):
        assert (called(device).source, called(device).config.chunk) == ("override", 32)


def test_an_entry_takes_the_place_of_one_for_the_same_task(tmp_path: Path) -> None:
    path = tmp_path / "a" / "table.json"
    tables.write(path, "first", [entry(TASK, warps=2), entry(dataclasses.replace(TASK, decay="head"), warps=4)])
    tables.write(path, "second", [entry(TASK, warps=8)])
    found = json.loads(path.read_text())
    assert (found["source"], [one["config"]["warps"] for one in found["entries"]]) == ("second", [4, 8])


@pytest.mark.skipif(not INTERPRETED, reason="there kernels are timed")
def test_autotuning_without_a_gpu_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="there is none"):
        autotune(lambda: called(device))


@pytest.mark.skipif(not INTERPRETED, reason="the configuration of a device is another")
def test_autotuning_keeps_what_a_clock_says_is_fastest(files: Path, device: torch.device) -> None:
    """A clock that likes chunks of 16 tokens, and tells 1% from nothing: that is noise."""
    q, k, v = torch.randn(3, 1, 1, 40, 16, generator=torch.Generator().manual_seed(1)).to(device)

    def seconds(call: object) -> float:
        with noted() as choices:
            call()
        chosen = choices[0].config
        return chosen.chunk - 0.001 * chosen.warps

    (found,) = autotune(lambda: additive.attention(q, k, v), seconds=seconds, path=files / "device.json")
    assert (found["config"]["chunk"], found["config"]["warps"]) == (16, 4)
    assert found["gain"] > 3
    with noted() as choices:
        additive.attention(q, k, v)
    assert (choices[0].config.chunk, choices[0].source) == (16, "autotuned on a clock of the caller's")


def test_autotuning_takes_nothing_that_computes_something_else(files: Path, device: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 16, generator=torch.Generator().manual_seed(1)).to(device)

    def call() -> torch.Tensor:
        with noted() as choices:
            out = additive.attention(q, k, v)[0]
        return out if choices[0].config.chunk == 64 else 2 * out

    (found,) = autotune(call, seconds=lambda _: 1.0, path=files / "device.json")
    assert (found["config"]["chunk"], found["gain"]) == (64, 1)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_table_says_how_it_was_made_and_is_of_its_class(file: Path) -> None:
    table = json.loads(file.read_text())
    assert table["source"] == "chosen by binary, not measured" or table["source"].startswith("measured on ")
    for one in table["entries"]:
        assert one["family"] == "additive"
        assert Task(**one["task"]).arch == file.stem
        assert set(one["config"]) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize(
    ("width", "variant"),
    [
        pytest.param(width, variant, marks=() if (width, variant) == (64, "token") else pytest.mark.slow)
        for width in (64, 128)
        for variant in VARIANTS
    ],
)
def test_configurations_of_a_table_compute_the_recurrence(
    width: int, variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: "sm_90")
    case = Case(tokens=70, heads=1, key_dim=width, value_dim=width, dtype=torch.bfloat16, **VARIANTS[variant])
    with noted() as choices:
        found = errors(case, device)
    assert {name: error for name, error in found.items() if not error <= 1e-2} == {}
    told = {choice.kernel: choice.source for choice in choices}
    assert told == dict.fromkeys(("forward", "backward"), "chosen by binary, not measured")
