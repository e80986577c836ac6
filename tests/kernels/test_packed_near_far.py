"""Packed sequences of the levels, the polynomial and the window: each is as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linbench_kernels import log_linear, second_order, window
from oracle import relative
from packing import borders
from torch import Tensor

LENGTHS = (0, 1, 70, 0, 64, 21, 1)
TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)


def normal(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def drawn(device: torch.device, dtype: torch.dtype, *, key_dim: int, value_dim: int) -> dict[str, Tensor]:
    """q, k and v of all sequences, in the layout of a projection."""
    widths = {"q": key_dim, "k": key_dim, "v": value_dim}
    x = {name: normal(width + ord(name), 1, sum(LENGTHS), 2, width) for name, width in widths.items()}
    return {name: tensor.to(device, dtype).transpose(1, 2) for name, tensor in x.items()}


def each(x: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The operands of every sequence that has a token, in fp64."""
    parts = {name: tensor.cpu().double().split(LENGTHS, 2) for name, tensor in x.items()}
    return [{name: part[s] for name, part in parts.items()} for s, length in enumerate(LENGTHS) if length]


def assert_packed_is_apart(
    operator: Callable[..., Tensor], x: dict[str, Tensor], tolerance: float, **options: Any
) -> None:
    """The results, and the gradients of all operands through them."""
    given = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in x.items()}
    device = x["v"].device
    out = operator(**given, **options, **borders(LENGTHS, device, torch.int64))
    expected = torch.cat(
        [operator(**{n: t.to(device) for n, t in part.items()}, **options).cpu() for part in each(wide)], 2
    )
    toward = normal(1, *out.shape).to(out.dtype)
    found = torch.autograd.grad(out, list(given.values()), toward.to(device))
    right = torch.autograd.grad(expected, list(wide.values()), toward.double())
    errors = {"o": relative(out, expected)}
    errors |= {name: relative(a, b) for name, a, b in zip(given, found, right, strict=True)}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


@DTYPES
def test_levels_begin_anew_with_every_sequence(dtype: torch.dtype, device: torch.device) -> None:
    x = drawn(device, dtype, key_dim=9, value_dim=12)
    precise = torch.promote_types(dtype, torch.float32)
    x["log_decay"] = -0.1 * normal(5, 1, 2, sum(LENGTHS)).abs().to(device, precise)
    x["level_weights"] = normal(6, 1, 2, sum(LENGTHS), 5).abs().to(device, dtype)
    assert_packed_is_apart(log_linear.attention, x, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("causal", [True, False])
def test_windows_end_with_their_sequence(causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = drawn(device, dtype, key_dim=9, value_dim=12)
    x["beside"] = normal(5, 1, 2, sum(LENGTHS), 12).to(device, dtype)
    x["beside_logs"] = normal(6, 1, 2, sum(LENGTHS)).to(device, torch.promote_types(dtype, torch.float32))
    assert_packed_is_apart(window.attention, x, TOLERANCE[dtype], window=19, causal=causal)


@DTYPES
def test_the_polynomial_has_a_state_for_every_sequence(dtype: torch.dtype, device: torch.device) -> None:
    """The state that comes out is seen through the sequence that goes on from it."""
    x = drawn(device, dtype, key_dim=9, value_dim=12)
    assert_packed_is_apart(rows_of_the_polynomial, x, TOLERANCE[dtype])
    packing = borders(LENGTHS, device)
    _, _, states = second_order.attention(**x, scale=0.3, return_state=True, **packing)
    assert states is not None
    out, logs, after = second_order.attention(**x, scale=0.3, initial_state=states, return_state=True, **packing)
    twice = [{name: torch.cat((tensor, tensor), 2).to(device) for name, tensor in part.items()} for part in each(x)]
    for result, found in enumerate((out, logs)):
        right = [second_order.attention(**part, scale=0.3)[result] for part in twice]
        expected = torch.cat([tensor[:, :, tensor.shape[2] // 2 :] for tensor in right], 2)
        assert relative(found, expected.cpu()) <= TOLERANCE[dtype]
    assert after is not None
    assert relative(after, (2 * states).cpu().double()) <= TOLERANCE[dtype]


def rows_of_the_polynomial(**x: Tensor) -> Tensor:
    return second_order.attention(**x, scale=0.3)[0]


@DTYPES
def test_near_and_far_keys_of_packed_sequences(dtype: torch.dtype, device: torch.device) -> None:
    """As based has them: queries lag behind the keys of the polynomial, and sequences that are shorter have no row."""
    x = drawn(device, dtype, key_dim=9, value_dim=12)
    assert_packed_is_apart(near_and_far, x, TOLERANCE[dtype])


def near_and_far(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """A window of 30, and the polynomial of the other keys where there are any."""
    if cu_seqlens is None and q.shape[2] <= 30:
        return window.attention(q, k, v, window=30)
    beside, logs, _ = second_order.attention(q, k, v, scale=0.3, delay=30, cu_seqlens=cu_seqlens)
    return window.attention(q, k, v, window=30, beside=beside, beside_logs=logs, cu_seqlens=cu_seqlens)
