"""What wrappers choose can be noted and replaced, for as long as that is asked for and no longer; cells carry it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels import additive
from linbench_kernels.additive.launch import configuration
from linbench_kernels.choices import families, noted, replaced
from linbench_kernels.device import INTERPRETED

from linbench.cell import Cell
from linbench.mechanisms import fused
from linbench.protocol import MeasureRequest
from linbench.worker import measure


def call(device: torch.device, tokens: int = 20) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(1)).to(device)
    return additive.attention(q, k, v)[0]


def test_every_family_with_a_table_can_be_looked_at() -> None:
    assert {"additive", "channel_decay", "delta"} <= set(families())


def test_a_choice_is_noted_once_with_its_task(device: torch.device) -> None:
    with noted() as choices:
        call(device)
        call(device)
    (choice,) = choices
    assert (choice.family, choice.kernel) == ("additive", "forward")
    assert choice.task.key_dim == choice.task.value_dim == 16
    assert choice.settings == dataclasses.asdict(choice.config)


def test_another_configuration_computes_the_same_and_is_forgotten(device: torch.device) -> None:
    expected = call(device)
    with replaced(lambda choice: dataclasses.replace(choice.config, chunk=16, columns=16)), noted() as choices:
        found = call(device)
    assert [(choice.config.chunk, choice.config.columns) for choice in choices] == [(16, 16)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with noted() as after:
        call(device)
    assert after[0].config.chunk != 16


@pytest.mark.parametrize("tokens", [20, 4000])
def test_what_is_noted_is_what_the_family_says_when_asked(tokens: int, device: torch.device) -> None:
    """Few heads, so that a long sequence may be spread over a device in other blocks than the table has."""
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(1)).to(device)
    with noted() as choices:
        additive.attention(q, k, v)
    assert choices[0].config == configuration(q, k, v)


def test_the_tables_come_back_after_an_error(device: torch.device) -> None:
    def refuse(_: object) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError), replaced(refuse):
        call(device)
    assert call(device).isfinite().all()


@pytest.mark.parametrize(
    ("name", "pass_", "kernels"),
    [
        ("retnet", "forward", ["additive forward"]),
        ("retnet", "forward_backward", ["additive forward", "additive backward"]),
        ("gla", "prefill", ["channel_decay forward"]),
        ("deltanet", "decode", ["delta inverse", "delta forward"]),
    ],
)
def test_a_cell_says_how_its_kernels_were_compiled(
    name: str, pass_: str, kernels: list[str], device: torch.device
) -> None:
    shape = {"length": 20, "heads": 1, "head_dim": 16, "value_dim": 16, "causal": True, "pass": pass_}
    cell = Cell.model_validate({"mechanism": name, "implementation": "triton", "device": device.type, **shape})
    outcome = measure(MeasureRequest(cell=cell, measures={}, threads=1, memory_limit_bytes=None), lambda _: None)
    assert outcome.configurations is not None, outcome.reason
    assert list(outcome.configurations) == kernels
    assert all({"chunk", "columns", "warps", "stages", "tma"} <= set(x) for x in outcome.configurations.values())


def test_another_implementation_has_none() -> None:
    cell = Cell(mechanism="retnet", length=20, heads=1, head_dim=16, value_dim=16, causal=True)
    outcome = measure(MeasureRequest(cell=cell, measures={}, threads=1, memory_limit_bytes=None), lambda _: None)
    assert outcome.check is not None
    assert outcome.configurations is None


@pytest.mark.skipif(not INTERPRETED, reason="the default is another on a device")
def test_the_same_kernel_for_two_tasks_is_there_twice(device: torch.device) -> None:
    with fused.configurations("triton") as found:
        call(device)
        call(device, tokens=21)
        additive.attention(*torch.randn(3, 1, 2, 20, 24).to(device))
    assert list(found) == ["additive forward", "additive forward (2)"]
