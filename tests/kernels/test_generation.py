"""Prompts and tokens through kernels: one state for kernels and torch, and every way gives what the reference gives."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from oracle import relative
from torch import Tensor

from linbench import registry
from linbench.cell import Cell, Pass
from linbench.conformance.causality import tensors_of
from linbench.mechanisms.base import Mechanism, extras_at, extras_until
from linbench.protocol import MeasureRequest
from linbench.record import Status
from linbench.worker import measure

NAMES = [name for name in sorted(registry.BUILT_IN) if "triton" in registry.load(name).generating()]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.slow if dtype is torch.float64 else ()) for dtype in BOUND], ids=str
)
SIZES = {"heads": 2, "key_dim": 10}
FIXED: dict[str, dict[str, Any]] = {"cosformer": {"max_length": 500}, "based": {"feature_dim": 6, "window": 20}}
"""What has no default that suits."""


def value_dim(name: str) -> int:
    """Another width than that of the keys, where a mechanism lets it be."""
    return 10 if name == "rwkv4" else 12


def build(name: str, implementation: str, device: torch.device) -> Mechanism:
    sizes = {**SIZES, "value_dim": value_dim(name)}
    return registry.build(name, implementation=implementation, causal=True, seed=3, **sizes, **FIXED.get(name, {})).to(
        device
    )


def draw(
    mechanism: Mechanism, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k and v of one sequence, and extras; the same numbers in every implementation."""
    generator = torch.Generator().manual_seed(5)
    about = mechanism.geometry
    widths = (about.key_dim, about.key_dim, about.value_dim)
    qkv = [torch.randn(1, SIZES["heads"], tokens, x, generator=generator).to(device, dtype) for x in widths]
    with torch.no_grad():
        return qkv, mechanism.make_extras(*qkv, generator)


@torch.no_grad()
def prefilled(mechanism: Mechanism, tokens: int, qkv: list[Tensor], extras: dict[str, Tensor]) -> tuple[Tensor, Any]:
    q, k, v = (x[:, :, :tokens] for x in qkv)
    return mechanism.prefill(q, k, v, **extras_until(extras, tokens))


@torch.no_grad()
def stepped(
    mechanism: Mechanism, state: Any, first: int, qkv: list[Tensor], extras: dict[str, Tensor]
) -> tuple[Tensor, Any]:
    """The tokens from the first on, and the last state; the given one stays as it was."""
    state, rows = copy.deepcopy(state), []
    for token in range(first, qkv[0].shape[2]):
        row, state = mechanism.step(*(x[:, :, token] for x in qkv), state, **extras_at(extras, token))
        rows.append(row)
    return torch.stack(rows, 2), state


def truth(name: str, qkv: list[Tensor], extras: dict[str, Tensor]) -> Tensor:
    exact = build(name, "reference", torch.device("cpu")).double()
    wide = {key: x.cpu().double() for key, x in extras.items()}
    with torch.no_grad():
        return exact.reference(*(x.cpu().double() for x in qkv), **wide)


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [1, 66])
def test_a_prefill_and_the_steps_after_it_are_the_reference(
    name: str, prompt: int, dtype: torch.dtype, device: torch.device
) -> None:
    mechanism = build(name, "triton", device)
    qkv, extras = draw(mechanism, prompt + 4, dtype, device)
    out, state = prefilled(mechanism, prompt, qkv, extras)
    rows, _ = stepped(mechanism, state, prompt, qkv, extras)
    expected = truth(name, qkv, extras)
    assert out.dtype == rows.dtype == dtype
    assert relative(out, expected[:, :, :prompt]) <= BOUND[dtype]
    assert relative(rows, expected[:, :, prompt:]) <= BOUND[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_steps_from_the_beginning_are_the_rows_and_the_state_of_a_prefill(name: str, device: torch.device) -> None:
    mechanism = build(name, "triton", device)
    qkv, extras = draw(mechanism, 9, torch.float32, device)
    out, state = prefilled(mechanism, 9, qkv, extras)
    rows, last = stepped(mechanism, mechanism.initial_state(1, device, torch.float32), 0, qkv, extras)
    assert relative(rows, out.cpu()) <= 1e-5
    assert_same_state(last, state, 1e-5)


def assert_same_state(found: Any, expected: Any, bound: float) -> None:
    """Of one make: type, shapes, dtypes, and numbers but for rounding."""
    assert type(found) is type(expected)
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert [(x.shape, x.dtype) for x, _ in pairs] == [(y.shape, y.dtype) for _, y in pairs]
    assert max(relative(x, y.cpu()) for x, y in pairs) <= bound


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_torch_and_kernels_go_on_from_each_others_states(name: str, dtype: torch.dtype, device: torch.device) -> None:
    ways = [build(name, implementation, device) for implementation in ("triton", "torch")]
    qkv, extras = draw(ways[0], 39, dtype, device)
    (_, ours), (_, theirs) = (prefilled(way, 37, qkv, extras) for way in ways)
    assert_same_state(ours, theirs, BOUND[dtype])
    expected = truth(name, qkv, extras)[:, :, 37:]
    for way, state in ((ways[0], theirs), (ways[1], ours)):
        rows, last = stepped(way, state, 37, qkv, extras)
        assert relative(rows, expected) <= BOUND[dtype]
        assert_same_state(last, stepped(ways[0], ours, 37, qkv, extras)[1], BOUND[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_its_state_in_place_and_allocates_no_other(name: str, device: torch.device) -> None:
    mechanism = build(name, "triton", device)
    assert mechanism.steps_in_place
    qkv, extras = draw(mechanism, 9, torch.float32, device)
    _, state = prefilled(mechanism, 8, qkv, extras)
    places, before = [x.data_ptr() for x in memory(state)], [x.clone() for x in memory(state)]
    _, after = mechanism.step(*(x[:, :, 8] for x in qkv), state, **extras_at(extras, 8))
    assert [x.data_ptr() for x in memory(after)] == places
    assert not all(torch.equal(x, y) for x, y in zip(memory(state), before, strict=True))


def memory(state: Any) -> list[Tensor]:
    """All tensors of a state, whether what they hold counts or not."""
    if isinstance(state, Tensor):
        return [state]
    if dataclasses.is_dataclass(state):
        return memory([getattr(state, field.name) for field in dataclasses.fields(state)])
    return [x for part in state for x in memory(part)] if isinstance(state, list | tuple) else []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pass_", ["prefill", "decode"])
def test_a_cell_of_generation_passes_its_check(name: str, pass_: Pass, device: torch.device) -> None:
    """Through the worker, which decodes from the state of a prefill of the other tokens."""
    shape = {"length": 33, "batch": 1, "heads": 2, "head_dim": 16, "value_dim": 16, "causal": True}
    changed = {"pass": pass_, "device": device.type, "implementation": "triton"}
    cell = Cell.model_validate({"mechanism": name, "hyperparameters": FIXED.get(name, {}), **shape, **changed})
    outcome = measure(MeasureRequest(cell=cell, measures={}, threads=1, memory_limit_bytes=None), lambda _: None)
    assert outcome.status is Status.OK, outcome.reason
    assert outcome.check is not None
    assert outcome.check.rows == (1 if pass_ == "decode" else 33)
