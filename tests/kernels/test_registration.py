"""The operators are registered in full: schema, shapes for tracing, gradients, and what of them can be compiled."""

from __future__ import annotations

import pytest
import torch
from linbench_kernels.additive.operator import attention_op, step_op
from oracle import Case

CASES = [
    Case(tokens=5, key_dim=3, value_dim=2),
    Case(tokens=5, key_dim=3, value_dim=2, decay="token", entering=True, skip=True, layout="BNH"),
    Case(tokens=5, key_dim=3, value_dim=2, feature="elu_plus_one", normalised=True),
]
NAMES = ("q", "k", "v", "log_decay", "entering", "skip", "initial_state")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_of_the_attention(case: Case, keep_state: bool, device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in NAMES]
    scale = case.settings["scale"]
    torch.library.opcheck(attention_op, (*operands, scale, case.feature, case.normalised, keep_state))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    q, k, v = (x[name][:, :, 0] for name in "qkv")
    torch.library.opcheck(step_op, (q, k, v, x["initial_state"], None, None, None, 0.5, "identity", False))
