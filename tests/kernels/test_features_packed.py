"""Feature maps of packed sequences and shared heads, W in pieces, and how few heads fill a device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from feature_oracle import LEVELLED, MAPS, Case, over
from linbench_kernels.device import INTERPRETED
from linbench_kernels.features import State, attention, launch, step
from linbench_kernels.features.configs import Task, Tiles, config, filled, kept_rows
from oracle import relative
from packing import borders

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
LENGTHS = (0, 1, 65, 0)
H200 = 132
"""Multiprocessors."""
PERFORMER = Task("forward", "sm_90", 2, 128, 128, "positive", 256, 1, False, True)


@pytest.mark.parametrize("feature", MAPS)
def test_packed_sequences_are_each_on_its_own(feature: str, device: torch.device) -> None:
    case = Case(feature, lengths=LENGTHS, key_dim=9, value_dim=11, projections=7, dtype=torch.float64)
    assert over(case, device, TOLERANCE[case.dtype]) == {}


@pytest.mark.parametrize("feature", ["turned", "hyperbolic", "softmaxes"])
def test_packed_sequences_from_nothing_in_low_precision(feature: str, device: torch.device) -> None:
    """Shared heads besides, in a layout of their own."""
    case = Case(feature, heads=4, groups=2, lengths=(5, 20), initial=False, layout="BNH", dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[case.dtype]) == {}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("feature", ["unit", "positive", "fourier"])
def test_heads_that_share_queries_keys_and_maps(feature: str, groups: int, device: torch.device) -> None:
    case = Case(feature, heads=4, groups=groups, tokens=9, key_dim=7, value_dim=11, projections=5)
    assert over(case, device, TOLERANCE[case.dtype]) == {}


def test_gradients_of_shared_heads_have_their_layout(device: torch.device) -> None:
    case = Case("fourier", batch=2, heads=2, groups=1, tokens=6, layout="BNH", initial=False, value_dim=70)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    out, _ = attention(**x, **case.settings)
    for tensor, gradient in zip(x.values(), torch.autograd.grad(out.sum(), list(x.values())), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize("feature", ["unit", "positive", "softmaxes"])
def test_steps_of_shared_heads_go_on_with_the_state(feature: str, device: torch.device) -> None:
    case = Case(feature, heads=4, groups=2, tokens=8, key_dim=9, projections=7, dtype=torch.float64)
    x, settings = case.operands(device), case.settings
    sums, level = x.pop("initial_state"), x.pop("initial_level", None)
    out, after = attention(**x, **settings, initial_state=State(sums, level), return_state=True)
    fixed = {name: x[name] for name in ("query_map", "key_map") if name in x}
    parts = {name: x[name][:, :, :5] for name in "qkv"}
    _, state = attention(**parts, **fixed, **settings, initial_state=State(sums, level), return_state=True)
    assert state is not None
    assert after is not None
    rows = [step(*(x[name][:, :, token] for name in "qkv"), state, **fixed, **settings) for token in range(5, 8)]
    assert relative(torch.stack(rows, 2), out[:, :, 5:].cpu()) <= TOLERANCE[torch.float64]
    assert relative(state.sums, after.sums.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("feature", [*LEVELLED, "softmaxes", "fourier"])
def test_a_map_that_is_read_in_pieces(feature: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(task: Task) -> Tiles:
        return dataclasses.replace(config(task), depth=16)

    monkeypatch.setattr(launch, "config", kept)
    case = Case(feature, tokens=20, key_dim=37, value_dim=9, layout="BNH")
    assert over(case, device, TOLERANCE[torch.float32]) == {}
    low = dataclasses.replace(case, dtype=torch.bfloat16, initial=False, heads=1)
    assert over(low, device, TOLERANCE[torch.bfloat16]) == {}


def test_a_map_is_kept_where_half_of_the_shared_memory_holds_it() -> None:
    def rows(**changed: Any) -> int:
        return kept_rows(dataclasses.replace(PERFORMER, **changed))

    assert rows() == 128  # and what rounding takes from it: 128 KiB
    assert rows(maps=2) == 64
    assert rows(key_dim=256) == 128
    assert rows(feature="softmaxes", maps=2) == 128
    assert rows(feature="softmaxes", maps=2, arch="sm_80") == 64
    assert rows(operand_bytes=4) == 64
    assert rows(operand_bytes=4, kernel="keys") == 32
    assert rows(key_dim=256, projections=64) == 256
    assert not config(dataclasses.replace(PERFORMER, maps=2)).tma


@pytest.mark.parametrize(("heads", "columns"), [(1, 16), (14, 16), (15, 16), (29, 16), (30, 32), (10**6, 32), (0, 16)])
def test_fewer_heads_get_narrower_blocks(heads: int, columns: int) -> None:
    assert filled(config(PERFORMER), 128, heads, H200).columns == columns
    assert filled(config(PERFORMER), 128, heads, 1).columns == (32 if heads else columns)


def test_narrower_blocks_than_the_values_are_of_no_use() -> None:
    chosen = config(dataclasses.replace(PERFORMER, feature="unit", maps=0, value_dim=16))
    assert filled(chosen, 16, 1, H200).columns == 16


def test_what_cannot_be_packed_or_shared_is_refused(device: torch.device) -> None:
    x = Case("unit", batch=2, tokens=5, initial=False).operands(device)
    ends = borders((2, 3), device)
    with pytest.raises(ValueError, match="in one batch"):
        attention(**x, feature="unit", **ends)
    one = {name: tensor[:1] for name, tensor in x.items()}
    with pytest.raises(ValueError, match="initial_state is"):
        attention(**one, feature="unit", initial_state=State(x["q"].new_zeros(1, 2, 13, 21)), **ends)
    with pytest.raises(ValueError, match="G that divides H"):
        attention(x["q"], x["k"], torch.cat([x["v"], x["v"][:, :1]], 1), feature="unit")
