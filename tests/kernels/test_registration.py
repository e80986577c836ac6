"""The operators are registered in full: schema, shapes for tracing, gradients, and what of them can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linbench_kernels.additive import attention, step
from linbench_kernels.additive.operator import attention_op, direct, step_op
from oracle import Case
from torch._subclasses.fake_tensor import FakeTensorMode

CASES = [
    Case(tokens=5, key_dim=3, value_dim=2),
    Case(tokens=5, key_dim=3, value_dim=2, decay="token", entering=True, skip=True, layout="BNH"),
    Case(tokens=5, key_dim=3, value_dim=2, feature="elu_plus_one", normalised=True),
    Case(lengths=(3, 0, 2), groups=1, key_dim=3, value_dim=2, decay="token"),
]
NAMES = ("q", "k", "v", "log_decay", "entering", "skip", "initial_state", "cu_seqlens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_attention(case: Case, keep_state: bool, device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()} | case.packing(device)
    operands = [x.get(name) for name in NAMES]
    scale = case.settings["scale"]
    torch.library.opcheck(attention_op, (*operands, scale, case.feature, case.normalised, keep_state))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    q, k, v = (x[name][:, :, 0] for name in "qkv")
    torch.library.opcheck(step_op, (q, k, v, x["initial_state"], None, None, None, 0.5, "identity", False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_one_graph_holds_forward_and_backward(case: Case, device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    options = {**case.settings, **case.packing(device), "return_state": True}
    for found, expected in zip(results(compiled, x, options), results(attention, x, options), strict=True):
        assert torch.equal(found, expected)


def results(function: Callable[..., Any], x: dict[str, torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    out, state = function(**x, **options)
    return [out, state, *torch.autograd.grad([out.sum(), state.sum()], list(x.values()))]


@pytest.mark.filterwarnings("ignore")
def test_one_graph_holds_a_step(device: torch.device) -> None:
    x = Case(tokens=1, heads=4, groups=2, decay="head").operands(device)
    row = {name: x[name][:, :, 0] for name in "qkv"}
    state = x["initial_state"].clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(**row, state=state, log_decay=x["log_decay"])
    assert torch.equal(found, step(**row, state=x["initial_state"], log_decay=x["log_decay"]))
    assert torch.equal(state, x["initial_state"])


def test_the_dispatcher_is_left_out_only_where_nothing_asks_for_it(device: torch.device) -> None:
    x = torch.ones(2, device=device)
    assert direct(x, None, torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not direct(x)
    assert not direct(mode.from_tensor(x))
    assert torch.func.vmap(lambda row: row * direct(row))(x[None]).sum() == 0


def test_what_a_step_changes_is_known_to_autograd(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    state = x["initial_state"]
    before = state._version
    step(*(x[name][:, :, 0] for name in "qkv"), state)
    assert state._version == before + 1


def test_gradients_of_gradients_are_refused(device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in Case(tokens=3).operands(device).items()}
    (gradient,) = torch.autograd.grad(attention(**x)[0].sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()
