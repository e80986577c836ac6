"""Every configuration in the table computes the same, with tiles by pointer and by descriptor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.additive import launch
from linbench_kernels.additive.configs import Config, Task, config
from linbench_kernels.device import INTERPRETED
from oracle import Case, errors

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def assert_agrees(case: Case, device: torch.device) -> None:
    over = {name: error for name, error in errors(case, device).items() if not error <= TOLERANCE[case.dtype]}
    assert over == {}, case


def with_descriptors(task: Task) -> Config:
    return dataclasses.replace(config(task), tma=task.aligned)


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tiles_by_descriptor(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Config] = []

    def kept(task: Task) -> Config:
        chosen.append(with_descriptors(task))
        return chosen[-1]

    monkeypatch.setattr(launch, "config", kept)
    assert_agrees(Case(tokens=70, key_dim=24, value_dim=40, decay="token", dtype=dtype, layout="BNH"), device)
    assert [c.tma for c in chosen] == [True, True]
    assert_agrees(Case(tokens=9, key_dim=23, value_dim=40, dtype=dtype), device)
    assert [c.tma for c in chosen[2:]] == [False, False]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_defaults_of_every_architecture(
    arch: str, width: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(tokens=70, heads=1, key_dim=width, value_dim=width - 8, dtype=dtype)
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, decay="token", entering=True), device)
    assert_agrees(dataclasses.replace(case, feature="elu_plus_one", normalised=True, initial=False), device)
