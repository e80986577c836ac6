"""The mechanisms of linbench through their kernels: outputs and gradients are those of the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative

from linbench import registry

NAMES = ("based", "cosformer", "hedgehog", "kda", "lightning", "linear", "log_linear", "mamba", "mamba2")
NAMES += ("performer", "retnet", "rfa", "rwkv4", "rwkv7", "taylor")
SHORT = {"kda": 20, "mamba": 18, "rwkv4": 18, "rwkv7": 20}
"""Tokens where the interpreter is slow: it walks elementwise scans one by one, and chunks of 16 tokens."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_triton_is_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    value_dim = 10 if name == "rwkv4" else 14  # its keys weigh values of their own channel
    shape = {"heads": 3, "key_dim": 10, "value_dim": value_dim, "causal": True}
    mechanism = registry.build(name, implementation="triton", **shape).to(device)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 3, SHORT.get(name, 70), width, generator=generator).to(device, dtype).requires_grad_()
        for width in (10, 10, value_dim)
    )
    extras = mechanism.make_extras(q, k, v, generator)
    given = [q, k, v, *extras.values(), *mechanism.parameters()]
    out = mechanism(q, k, v, **extras)
    toward = torch.randn(out.shape, generator=generator).to(device, dtype)
    found = torch.autograd.grad(out, given, toward)
    exact = registry.build(name, implementation="reference", **shape).double()
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wide_extras = {key: x.detach().cpu().double().requires_grad_() for key, x in extras.items()}
    expected_out = exact(*wide, **wide_extras)
    expected = torch.autograd.grad(
        expected_out, [*wide, *wide_extras.values(), *exact.parameters()], toward.cpu().double()
    )
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    assert relative(out, expected_out) <= bound
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    for gradient, exact_gradient in zip(found, expected, strict=True):
        assert relative(gradient, exact_gradient, at_least=0.01 * joint) <= bound
