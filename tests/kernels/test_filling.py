"""How few heads fill a device: narrower blocks, then segments of the sequence, with the results of one pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.additive import configs, configuration, launch
from linbench_kernels.additive.configs import Plan, Task, config, filled, joint
from oracle import Case, errors

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
H200 = 132
"""Multiprocessors."""


def plan(pass_: str, heads: int, length: int = 8192, multiprocessors: int = H200) -> Plan:
    task = Task(pass_, "sm_90", 2, 128, 128, "none", False, True)
    return filled(config(task), task, heads, length, multiprocessors)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_heads_enough_for_the_device_are_left_as_they_are(pass_: str) -> None:
    task = Task(pass_, "sm_90", 2, 128, 128, "none", False, True)
    assert plan(pass_, 120) == Plan(**vars(config(task)), joint=pass_ == "backward")
    assert plan(pass_, 10**6) == plan(pass_, 120)
    assert plan(pass_, 0) == plan(pass_, 120)
    assert plan(pass_, 1, multiprocessors=1) == plan(pass_, 120)


def test_fewer_heads_get_narrower_blocks_and_then_segments() -> None:
    assert [
        (plan("forward", heads).columns, plan("forward", heads).segments) for heads in (119, 60, 59, 15, 14, 1)
    ] == [
        (64, 1),
        (64, 1),
        (32, 1),
        (32, 1),
        (32, 3),
        (32, 30),
    ]
    found = [plan("backward", heads) for heads in (40, 39, 20, 19, 5, 4)]
    assert [(one.joint, one.columns, one.segments) for one in found] == [
        (True, 64, 1),
        (False, 64, 1),
        (False, 64, 1),
        (False, 32, 1),
        (False, 32, 1),
        (False, 32, 3),
    ]


@pytest.mark.parametrize(
    ("width", "decay", "mapped", "aligned", "expected"),
    [
        (128, "none", False, True, True),
        (128, "token", False, True, True),
        (128, "none", True, True, True),
        (64, "head", True, True, False),
        (64, "none", False, False, False),
        (256, "none", False, True, False),
    ],
)
def test_keys_and_values_share_a_scan_where_registers_suffice(
    width: int, decay: str, mapped: bool, aligned: bool, expected: bool
) -> None:
    rest = (width, width, decay, mapped, aligned, mapped)
    assert joint(Task("backward", "sm_90", 2, *rest)) is expected
    assert not joint(Task("backward", "sm_80", 2, *rest))
    assert not joint(Task("backward", "sm_90", 4, *rest))
    assert not joint(Task("forward", "sm_90", 2, *rest))


@pytest.mark.parametrize(("length", "segments"), [(1, 1), (511, 1), (512, 2), (8192, 30), (10**6, 30)])
def test_a_segment_is_four_chunks_at_least(length: int, segments: int) -> None:
    assert plan("forward", 1, length).segments == segments


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Of every call, on a device that is never full with segments of one chunk."""
    kept: list[Plan] = []
    monkeypatch.setattr(launch, "multiprocessors_of", lambda _: 64)
    monkeypatch.setattr(configs, "CHUNKS_OF_A_SEGMENT", 1)
    spread = launch.spread

    def noted(*what: object) -> Plan:
        filled.cache_clear()
        kept.append(spread(*what))
        return kept[-1]

    monkeypatch.setattr(launch, "spread", noted)
    yield kept
    filled.cache_clear()


def assert_agrees(case: Case, device: torch.device) -> None:
    over = {name: error for name, error in errors(case, device).items() if not error <= TOLERANCE[case.dtype]}
    assert over == {}, case


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"decay": "head"},
        {"decay": "token", "entering": True, "skip": True},
        {"feature": "elu_plus_one", "normalised": True},
        {"feature": "relu", "normalised": True, "decay": "token", "entering": True},
    ],
)
def test_segments_are_one_pass(variant: dict, initial: bool, plans: list[Plan], device: torch.device) -> None:
    case = Case(heads=2, groups=1, tokens=210, key_dim=9, value_dim=11, initial=initial, dtype=torch.float64)
    assert_agrees(dataclasses.replace(case, **variant), device)
    assert [found.segments for found in plans] == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_in_low_precision(dtype: torch.dtype, plans: list[Plan], device: torch.device) -> None:
    assert_agrees(Case(heads=1, tokens=300, decay="token", dtype=dtype, layout="BNH"), device)
    assert all(found.segments > 1 for found in plans)


def test_segments_of_packed_sequences(plans: list[Plan], device: torch.device) -> None:
    """Of which some are empty."""
    case = Case(heads=1, lengths=(0, 1, 200, 65, 400), key_dim=9, value_dim=11, decay="token", dtype=torch.float64)
    assert_agrees(case, device)
    assert [found.segments for found in plans] == [2, 2]


@pytest.mark.parametrize("strength", [1e-3, 40.0])
def test_segments_under_weak_and_strong_decays(strength: float, plans: list[Plan], device: torch.device) -> None:
    assert_agrees(Case(heads=1, tokens=200, decay="token", strength=strength, dtype=torch.float64), device)
    assert all(found.segments == 3 for found in plans)


def test_a_sequence_too_short_for_segments_is_one_pass(plans: list[Plan], device: torch.device) -> None:
    assert_agrees(Case(heads=1, tokens=127, decay="token", dtype=torch.float64), device)
    assert [found.segments for found in plans] == [1, 1]


@pytest.mark.parametrize("case", [Case(tokens=130, decay="token", groups=1, layout="BNH"), Case(tokens=9, key_dim=23)])
def test_the_configuration_can_be_asked_for(case: Case, plans: list[Plan], device: torch.device) -> None:
    errors(case, device)
    x = case.operands(device)
    given = {name: x[name].requires_grad_() for name in ("q", "k", "v", "log_decay") if name in x}
    assert [configuration(**given), configuration(**given, backward=True)] == plans[:2]
