"""Every way in which a mechanism decodes: a prefill is a forward and a state, and steps go on from there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import linbench
from linbench import registry
from linbench.cell import Cell
from linbench.conformance.causality import tensors_of
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.base import Mechanism, extras_at

CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "based": ({"window": 6}, {"window": 0}, {"window": 200}, {"feature_dim": 3, "order": 3, "window": 1}),
    "cosformer": ({"max_length": 500},),
    "efficient": ({}, {"normalization": "scaling"}),
    "log_linear": ({}, {"levels": 1}, {"levels": 4}),
    "longformer": ({"window": 20}, {"window": 0}, {"window": 12, "global_tokens": 5, "dilation": 3}),
    "nsa": (
        {},
        {"block": 8, "selected": 4, "window": 11, "compressed": 6, "stride": 2, "group": 2},
    ),
    "performer": ({}, {"kernel": "hyperbolic", "features": 20}),
    "polysketch": ({"block": 16}, {"block": 0}, {"block": 256, "power": 8}, {"block": 1, "power": 2}),
    "rfa": ({}, {"gated": True}),
}
"""Beyond one with the defaults: what takes another way through the code."""
DECODING = [name for name in sorted(registry.BUILT_IN) if registry.load(name).step is not Mechanism.step]
SETTINGS = [(name, settings) for name in DECODING for settings in CASES.get(name, ({},))]
named = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)


def build(name: str, settings: dict[str, Any], implementation: str = "torch", heads: int = 2, **widths: int) -> Any:
    """Keys of 6 and values of 5, where the mechanism lets them differ."""
    sizes = {"key_dim": 6, "value_dim": 6 if name == "rwkv4" else 5, **widths}
    return linbench.build(name, heads=heads, causal=True, implementation=implementation, seed=3, **sizes, **settings)


def draw(mechanism: Mechanism, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k and v of two elements of a batch, and extras."""
    about, generator = mechanism.geometry, torch.Generator().manual_seed(5)
    widths = (about.key_dim, about.key_dim, about.value_dim)
    shape = (3, about.heads, tokens)
    qkv = [torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths]
    with torch.no_grad():
        return qkv, mechanism.make_extras(*qkv, generator)


def first(tokens: int, qkv: list[Tensor], extras: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Those of the first tokens."""
    return [x[:, :, :tokens] for x in qkv], {name: x[:, :, :tokens] for name, x in extras.items()}


@torch.no_grad()
def stepped(
    mechanism: Mechanism, state: Any, qkv: list[Tensor], extras: dict[str, Tensor], start: int
) -> tuple[Tensor, Any]:
    """The outputs of the tokens from ``start`` on, and the last state."""
    rows = []
    for token in range(start, qkv[0].shape[2]):
        row, state = mechanism.step(*(x[:, :, token] for x in qkv), state, **extras_at(extras, token))
        rows.append(row)
    return torch.stack(rows, 2), state


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@named
@pytest.mark.parametrize("tokens", [1, 2, 64, 131])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_a_prefill_is_the_forward(name, settings, tokens, dtype, bound):
    for implementation in ("torch", "reference"):
        mechanism = build(name, settings, implementation)
        qkv, extras = draw(mechanism, tokens, dtype)
        out, _ = mechanism.prefill(*qkv, **extras)
        assert out.dtype is dtype
        assert not out.requires_grad
        with torch.no_grad():
            assert error(out, mechanism(*qkv, **extras)) < bound


@named
def test_a_prefill_takes_no_steps(name, settings, monkeypatch):
    mechanism = build(name, settings)
    qkv, extras = draw(mechanism, 9, torch.float32)
    monkeypatch.setattr(type(mechanism), "step", lambda *operands, **extras: pytest.fail("a step"))
    mechanism.prefill(*qkv, **extras)


@named
@pytest.mark.parametrize("prompt", [1, 15, 16, 64, 100])
def test_steps_after_a_prefill_are_the_rows_of_the_forward(name, settings, prompt):
    mechanism = build(name, settings)
    qkv, extras = draw(mechanism, prompt + 20, torch.float64)
    _, state = mechanism.prefill(*first(prompt, qkv, extras)[0], **first(prompt, qkv, extras)[1])
    rows, _ = stepped(mechanism, state, qkv, extras, prompt)
    with torch.no_grad():
        whole = mechanism.reference(*qkv, **extras)
    assert error(rows, whole[:, :, prompt:]) < 1e-12


@named
@pytest.mark.parametrize("tokens", [1, 16, 97])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_of_a_prefill_is_that_of_as_many_steps(name, settings, tokens, dtype):
    mechanism = build(name, settings)
    qkv, extras = draw(mechanism, tokens, dtype)
    _, state = mechanism.prefill(*qkv, **extras)
    _, expected = stepped(mechanism, mechanism.initial_state(3, qkv[0].device, dtype), qkv, extras, 0)
    assert type(state) is type(expected)
    found, wanted = (sorted(tensors_of(x), key=lambda y: (tuple(y.shape), y.double().sum())) for x in (state, expected))
    total = 3 * mechanism.state_bytes(tokens, dtype)
    assert abs(sum(x.nbytes for x in found) - total) < 64  # a count of tokens may stand beside
    assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in wanted]
    if dtype is torch.float64 and name != "polysketch":  # what lay in the rows of a finished block stays in them
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "widths", "tokens"),
    [
        ("linear", {}, {}, 1100),
        ("performer", {"features": 70}, {}, 1100),
        ("based", {"window": 6}, {}, 1100),
        ("polysketch", {"block": 16}, {}, 1100),
        ("efficient", {}, {}, 1100),
        ("efficient", {"normalization": "scaling"}, {}, 1100),
        ("gla", {}, {"heads": 3, "key_dim": 64, "value_dim": 64}, 1100),
        ("mamba2", {}, {"heads": 3, "key_dim": 64, "value_dim": 64}, 1100),
        ("log_linear", {}, {}, 1100),
        ("rfa", {"gated": True}, {}, 1100),
        ("mesa", {"iterations": 4}, {}, 600),
        ("deltanet", {}, {"heads": 70}, 75),
        ("rwkv7", {}, {"heads": 70}, 75),
        ("mamba", {}, {"heads": 3, "key_dim": 64, "value_dim": 64}, 40),
        ("rwkv4", {}, {"heads": 3, "key_dim": 6000, "value_dim": 6000}, 5),
    ],
)
def test_states_of_heads_and_runs_that_are_walked_apart_are_joined_in_their_order(name, settings, widths, tokens):
    mechanism = build(name, settings, **widths)
    qkv, extras = draw(mechanism, tokens, torch.float64)
    out, state = mechanism.prefill(*qkv, **extras)
    expected_out, expected = Mechanism.prefill(mechanism, *qkv, **extras)
    assert error(out, expected_out) < 1e-11
    assert not isinstance(state, Tensor) or state.shape == expected.shape
    for one, other in zip(tensors_of(state), tensors_of(expected), strict=True):
        if name != "polysketch" or one.shape[2] != 16:  # rows of a block that are not filled hold what they held
            assert error(one, other) < 1e-10


@named
@pytest.mark.parametrize("prompt", [1, 15, 33])
def test_a_step_may_be_taken_again_with_another_token(name, settings, prompt):
    """15 tokens lie before the end of a block of 16, at which sums change."""
    mechanism = build(name, settings)
    qkv, extras = draw(mechanism, prompt + 3, torch.float64)
    asked = first(prompt, qkv, extras)
    _, state = mechanism.prefill(*asked[0], **asked[1])
    kept = copy.deepcopy(state)
    expected, _ = stepped(mechanism, kept, qkv, extras, prompt)
    for token in (prompt + 1, prompt + 2):
        mechanism.step(*(x[:, :, token] for x in qkv), state, **extras_at(extras, token))
    rows, _ = stepped(mechanism, state, qkv, extras, prompt)
    assert torch.equal(rows, expected)


@named
def test_bf16_stays_bf16_and_a_step_errs_no_more_than_the_forward_does(name, settings):
    mechanism = build(name, settings, key_dim=16, value_dim=16)
    qkv, extras = draw(mechanism, 150, torch.bfloat16)
    asked = first(100, qkv, extras)
    out, state = mechanism.prefill(*asked[0], **asked[1])
    rows, _ = stepped(mechanism, state, qkv, extras, 100)
    assert out.dtype is rows.dtype is torch.bfloat16
    wide = copy.deepcopy(mechanism).double()
    with torch.no_grad():
        truth = wide.reference(*(x.double() for x in qkv), **{name: x.double() for name, x in extras.items()})
        fast = mechanism(*qkv, **extras)
    for found, part in ((rows, slice(100, None)), (out, slice(100))):
        assert error(found, truth[:, :, part]) <= 1.5 * error(fast[:, :, part], truth[:, :, part])


@named
@pytest.mark.parametrize("tokens", [2, 16, 131, 300])
def test_decode_flops_are_no_more_than_what_a_step_does(name, settings, tokens):
    mechanism = build(name, settings)
    qkv, extras = draw(mechanism, tokens, torch.float32)
    asked = first(tokens - 1, qkv, extras)
    _, state = mechanism.prefill(*asked[0], **asked[1])
    last = [x[:, :, tokens - 1] for x in qkv]

    def run(begin: Any) -> object:
        begin()
        with torch.no_grad():
            return mechanism.step(*last, state, **extras_at(extras, tokens - 1))

    products, everything = counted_flops(run)
    claimed = mechanism.decode_flops(cell_of(mechanism, name, tokens))
    # an outer product that joins a sum is counted as one operation for each of its numbers, and claimed as two
    written = 3 * mechanism.state_bytes(tokens, torch.float64) // 8
    assert 0 < claimed <= everything + written
    if tokens == 300:  # every window and block of the cases is full by then
        assert products <= 3 * claimed


@named
def test_decode_bytes_are_the_token_and_no_more_than_the_state_read_and_written(name, settings):
    for tokens in (1, 2, 40, 200):
        mechanism = build(name, settings)
        cell = cell_of(mechanism, name, tokens)
        least = mechanism.token_bytes(cell)
        qkv, extras = draw(mechanism, tokens, torch.float32)
        token = [x[:, :, 0] for x in (*qkv, qkv[2], *extras.values())]  # the output is as large as v
        assert least == sum(x.nbytes for x in token)
        states = [mechanism.state_bytes(length, torch.float32) for length in (tokens - 1, tokens)]
        assert least + (sum(states) > 0) <= mechanism.decode_bytes(cell) <= least + 3 * sum(states)
        assert isinstance(mechanism.decode_bytes(cell), int)


@named
def test_a_prefill_costs_a_forward_and_the_state(name, settings):
    mechanism = build(name, settings)
    cell = cell_of(mechanism, name, 77)
    as_pass = {
        pass_: cell.model_copy(update={"pass_": pass_}) for pass_ in ("forward", "prefill", "decode", "backward")
    }
    assert mechanism.pass_flops(as_pass["prefill"]) == mechanism.flops(as_pass["forward"])
    written = 3 * mechanism.state_bytes(77, torch.float32)
    assert mechanism.pass_bytes(as_pass["prefill"]) == mechanism.min_bytes(as_pass["forward"]) + written
    assert mechanism.pass_flops(as_pass["decode"]) == mechanism.decode_flops(cell)
    assert mechanism.pass_bytes(as_pass["decode"]) == mechanism.decode_bytes(cell)
    assert mechanism.pass_flops(as_pass["backward"]) == mechanism.flops(as_pass["backward"])
    assert mechanism.pass_bytes(as_pass["backward"]) == mechanism.min_bytes(as_pass["backward"])


def cell_of(mechanism: Mechanism, name: str, tokens: int) -> Cell:
    about = mechanism.geometry
    return Cell(
        mechanism=name,
        length=tokens,
        batch=3,
        heads=about.heads,
        head_dim=about.key_dim,
        value_dim=about.value_dim,
        causal=True,
    )


@pytest.mark.parametrize(("name", "settings"), [("softmax", {}), ("linear", {}), ("longformer", {}), ("efficient", {})])
def test_a_form_without_a_mask_refuses_to_decode(name, settings):
    mechanism = linbench.build(name, heads=2, key_dim=6, value_dim=5, causal=False, implementation="torch", **settings)
    qkv, _ = draw(mechanism, 4, torch.float32)
    with pytest.raises(UsageError, match="does not decode"):
        mechanism.prefill(*qkv)
    for pass_ in ("prefill", "decode"):
        cell = cell_of(mechanism, name, 4).model_copy(update={"pass_": pass_})
        for cost in (mechanism.pass_flops, mechanism.pass_bytes):
            with pytest.raises(UsageError, match="does not decode"):
                cost(cell)


@pytest.mark.parametrize(
    ("name", "told"),
    [("cosformer", "only with max_length"), ("reformer", "does not decode"), ("hyena", "does not decode")],
)
def test_a_causal_form_without_a_state_refuses_to_decode(name, told):
    mechanism = build(name, {})
    qkv, extras = draw(mechanism, 4, torch.float32)
    with pytest.raises(UsageError, match=told):
        mechanism.prefill(*qkv, **extras)


def test_costs_of_decoding_by_hand():
    """B = 3, H = 2, D = 6, M = 5, the 40th token, in fp32."""
    token = 3 * 2 * 2 * (6 + 5) * 4
    known = {
        "softmax": (3 * 2 * 2 * 40 * 11, token + 3 * 2 * 40 * 11 * 4),
        "linear": (3 * 2 * 4 * 6 * 6, token + 3 * 2 * 2 * 6 * 6 * 4),
        "retnet": (3 * 2 * 4 * 6 * 5, token + 3 * 2 * 2 * 6 * 5 * 4),
        "gla": (3 * 2 * 4 * 6 * 5, token + 3 * 2 * (6 + 2 * 6 * 5) * 4),
        "deltanet": (3 * 2 * 6 * 6 * 5, token + 3 * 2 * (1 + 2 * 6 * 5) * 4),
        "rwkv7": (3 * 2 * 8 * 6 * 5, token + 3 * 2 * (6 + 6 + 2 * 6 * 5) * 4),
    }
    for name, costs in known.items():
        mechanism = build(name, {})
        cell = cell_of(mechanism, name, 40)
        assert (mechanism.decode_flops(cell), mechanism.decode_bytes(cell)) == costs, name


class OnlySteps(Mechanism):
    """The mean of the values so far, with a step and a size of its state, as a third party may write it."""

    description = registry.load("linear").description

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        means = v.cumsum(2) / torch.arange(1, v.shape[2] + 1).to(v)[:, None]
        return means if rows is None else means[:, :, rows]

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        return torch.zeros(batch, self.geometry.heads, self.geometry.value_dim, dtype=dtype), 0

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> Any:
        total, count = state[0] + v, state[1] + 1
        return total / count, (total, count)

    def flops(self, cell: Cell) -> int:
        return cell.batch * cell.heads * cell.length * cell.value_dim

    def min_bytes(self, cell: Cell) -> int:
        return cell.batch * cell.heads * cell.length * 2 * (cell.head_dim + cell.value_dim) * cell.element_bytes

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        return self.geometry.heads * self.geometry.value_dim * dtype.itemsize


def test_a_third_party_that_has_steps_has_a_prefill_and_costs():
    mechanism = OnlySteps(build("linear", {}, "reference").geometry)
    qkv, _ = draw(mechanism, 23, torch.float64)
    out, state = mechanism.prefill(*first(20, qkv, {})[0])
    rows, _ = stepped(mechanism, state, qkv, {}, 20)
    torch.testing.assert_close(torch.cat((out, rows), 2), mechanism.reference(*qkv))
    cell = cell_of(mechanism, "linear", 23)
    assert mechanism.decode_flops(cell) == 3 * 2 * 2 * 5
    assert mechanism.decode_bytes(cell) == 3 * 2 * (2 * 11 + 2 * 5) * 4
