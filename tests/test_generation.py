"""The passes of generation: a prompt, and the token after it, checked and timed through the worker."""

from __future__ import annotations

import pytest

from linbench import registry
from linbench.cell import Cell, Pass, Scalar
from linbench.foresight import foresee
from linbench.protocol import ForeseeRequest, Measure, MeasureRequest
from linbench.record import Status
from linbench.worker import measure

SHORTEST: dict[str, Scalar] = {"budget_s": 0.0, "min_samples": 10, "max_samples": 10}


def causal_cell(name: str, tokens: int, pass_: Pass) -> Cell:
    fixed: dict[str, Scalar] = {"max_length": 50} if name == "cosformer" else {}
    shape = {"heads": 2, "head_dim": 16, "value_dim": 16}
    return Cell(mechanism=name, hyperparameters=fixed, length=tokens, causal=True, **shape, **{"pass": pass_})


def asked(cell: Cell, speed: bool) -> MeasureRequest:
    """The error, and the speed in the shortest time; a decode gives no error even where it is asked for."""
    measures = {"error": Measure(target="linbench.measure.judge.judge_error")}
    if speed:
        measures["speed"] = Measure(target="linbench.measure.clock.measure_speed", parameters=SHORTEST)
    return MeasureRequest(cell=cell, measures=measures, threads=1, memory_limit_bytes=None)


@pytest.mark.parametrize("name", sorted(name for name, about in registry.descriptions().items() if about["decodes"]))
@pytest.mark.parametrize("tokens", [1, 37])
def test_a_token_is_decoded_as_the_reference_says_and_timed_without_the_others(name: str, tokens: int) -> None:
    outcome = measure(asked(causal_cell(name, tokens, "decode"), speed=True), lambda _: None)
    assert outcome.status in (Status.OK, Status.NOISY), outcome.reason
    assert outcome.check is not None
    assert (outcome.check.rows, outcome.check.rows_total) == (1, tokens)
    assert outcome.speed is not None
    assert outcome.error is None


@pytest.mark.parametrize("name", ["softmax", "linear", "retnet", "based"])
def test_a_prefill_is_judged_like_a_forward(name: str) -> None:
    passes: tuple[Pass, Pass] = ("forward", "prefill")
    forward, prefill = (measure(asked(causal_cell(name, 70, one), speed=False), lambda _: None).error for one in passes)
    assert forward is not None
    assert prefill is not None
    assert prefill.relative_error == pytest.approx(forward.relative_error, rel=0.05)


@pytest.mark.parametrize(
    ("name", "causal", "told"),
    [
        ("softmax", False, "decode goes from token to token: it needs causal=true"),
        ("hyena", True, "Hyena, as it was built, does not decode"),
    ],
)
def test_what_cannot_decode_says_why(name: str, causal: bool, told: str) -> None:
    cell = causal_cell(name, 70, "decode").model_copy(update={"causal": causal})
    (prospect,) = foresee(ForeseeRequest(cells=[cell], measures={}, threads=1)).prospects
    assert told in (prospect.unsupported or "")


@pytest.mark.parametrize("pass_", ["prefill", "decode"])
def test_no_other_implementation_is_given_the_time_of_the_only_one(pass_: Pass) -> None:
    cell = causal_cell("softmax", 70, pass_).model_copy(update={"implementation": "reference"})
    (prospect,) = foresee(ForeseeRequest(cells=[cell], measures={}, threads=1)).prospects
    assert prospect.unsupported == f"softmax has one way to {pass_}, implementation=torch"


def test_kernels_with_a_state_generate_in_a_way_of_their_own() -> None:
    reasons = {}
    for implementation in ("reference", "torch", "triton"):
        cell = causal_cell("retnet", 70, "decode").model_copy(update={"implementation": implementation})
        (prospect,) = foresee(ForeseeRequest(cells=[cell], measures={}, threads=1)).prospects
        reasons[implementation] = prospect.unsupported
    assert reasons["reference"] == "retnet has 2 ways to decode, implementation=torch or triton"
    assert reasons["torch"] is None
    assert "on a GPU" in str(reasons["triton"])  # or in the interpreter, but never for want of a way


def test_a_decode_costs_what_a_step_does_and_its_prompt_comes_on_top() -> None:
    cells = [causal_cell("softmax", 4096, one) for one in ("decode", "prefill")]  # type: ignore[arg-type]
    decode, prefill = foresee(ForeseeRequest(cells=cells, measures={}, threads=1)).prospects
    assert decode.cost is not None
    assert prefill.cost is not None
    assert decode.cost.flops == 2 * 2 * 4096 * (16 + 16)
    assert decode.setup_flops == prefill.cost.flops
    assert prefill.setup_flops == 0
