"""Few heads of the families with scans of an order: narrower blocks fill the device, with the same results."""

from __future__ import annotations

import pytest
import torch
from channel_delta_oracle import ChannelDeltaCase
from channel_oracle import Case as ChannelCase
from delta_oracle import DeltaCase
from linbench_kernels import channel_decay, channel_delta, delta
from linbench_kernels.additive.configs import narrowed
from linbench_kernels.channel_decay import launch as channel_decay_launch
from linbench_kernels.channel_delta import launch as channel_delta_launch
from linbench_kernels.delta import launch as delta_launch
from oracle import relative
from torch import Tensor

H200 = 132
"""Multiprocessors."""


def test_blocks_are_halved_until_their_programs_fill_the_device() -> None:
    found = [narrowed(128, heads, (128,), H200) for heads in (0, 10**6, 120, 119, 60, 59, 30, 29, 15, 14, 1)]
    assert found == [128, 128, 128, 64, 64, 32, 32, 16, 16, 16, 16]
    assert narrowed(64, 1, (128,), 1) == 64


def test_what_all_programs_cut_counts_and_no_block_is_wider_than_what_it_cuts() -> None:
    assert narrowed(64, 30, (128, 128), H200) == 64
    assert narrowed(64, 29, (128, 128), H200) == 32
    assert narrowed(64, 100, (16,), H200) == 16


CASES = {
    "delta": (delta, delta_launch, DeltaCase(heads=1, tokens=37, key_dim=20, value_dim=40, decay="token")),
    "kda": (channel_delta, channel_delta_launch, ChannelDeltaCase(tokens=20, key_dim=20, value_dim=40)),
    "rwkv7": (channel_delta, channel_delta_launch, ChannelDeltaCase(key_dim=20, value_dim=40, separate=True)),
    "gla": (channel_decay, channel_decay_launch, ChannelCase(heads=1, tokens=20, key_dim=40, value_dim=36)),
}
"""The family, where it is launched, and what."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("delta", torch.float64), ("kda", torch.bfloat16), ("rwkv7", torch.float64), ("gla", torch.bfloat16)],
)
def test_results_are_the_same_in_narrow_blocks(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, launch, case = CASES[name]
    x = {name: tensor.to(dtype).requires_grad_() for name, tensor in case.operands(device).items()}
    widths: list[int] = []

    def kept(columns: int, heads: int, cut: tuple[int, ...], multiprocessors: int) -> int:
        widths.append(narrowed(columns, heads, cut, multiprocessors))
        return widths[-1]

    monkeypatch.setattr(launch, "narrowed", kept)

    def results() -> list[Tensor]:
        out, state = family.attention(**x, return_state=True)
        return [out, state, *torch.autograd.grad([out, state], list(x.values()), [out.detach(), state.detach()])]

    monkeypatch.setattr(launch, "multiprocessors_of", lambda _: 1)
    wide = results()
    before, widths[:] = max(widths), []
    monkeypatch.setattr(launch, "multiprocessors_of", lambda _: 64)
    for found, expected in zip(results(), wide, strict=True):
        assert relative(found, expected.detach().cpu()) <= (1e-13 if dtype is torch.float64 else 4e-3)
    assert set(widths) == {16}
    assert before > 16
