"""One token after the other is what all of them at once are."""

from __future__ import annotations

import pytest
import torch
from linbench_kernels.additive import attention, step
from oracle import Case, relative

CASES = [
    Case(tokens=6, key_dim=20, value_dim=70),
    Case(tokens=6, decay="head", key_dim=130, value_dim=9),
    Case(tokens=6, decay="token", entering=True, skip=True, layout="BNH"),
    Case(tokens=6, feature="elu_plus_one", normalised=True, decay="token", value_dim=70),
    Case(tokens=6, heads=6, groups=2, decay="token", entering=True, skip=True),
]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_recurrence(case: Case, device: torch.device) -> None:
    x = case.operands(device)
    settings = case.settings
    expected, expected_state = case.expected({n: t.cpu().double() for n, t in x.items()})
    state = x.pop("initial_state")
    rows = [
        step(**{n: t if t.ndim == 1 else t[:, :, token] for n, t in x.items()}, state=state, **settings)
        for token in range(case.tokens)
    ]
    assert relative(torch.stack(rows, 2), expected) <= 1e-5
    assert relative(state, expected_state) <= 1e-5


def test_a_prompt_and_then_steps(device: torch.device) -> None:
    case = Case(tokens=70, decay="token", dtype=torch.bfloat16, initial=False)
    x = case.operands(device)
    whole, _ = attention(**x, scale=0.3)
    _, state = attention(**{n: t[:, :, :69] for n, t in x.items()}, scale=0.3, return_state=True)
    assert state is not None
    row = step(**{n: t[:, :, 69] for n, t in x.items()}, state=state, scale=0.3)
    assert row.dtype is torch.bfloat16
    assert relative(row, whole[:, :, 69].cpu()) <= 1e-2
