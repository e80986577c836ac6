"""Every defect is caught by the property that names it, with a reason that says so, and by nothing unconcerned."""

from __future__ import annotations

from pathlib import Path

import pytest

from linbench.conformance.finding import Finding, Verdict
from linbench.conformance.kit import PROPERTIES, Examination, examine

HERE = Path(__file__).parent
SOUND = ("Sound", "SoundBothWays", "Spectral", "SeesFutureKeys", "Banded")
DEFECTS = {
    "unsound_results.LeaksTheFuture": ("causality", "another future of everything from 1"),
    "unsound_results.LeaksValues": ("causality", "another future of v from 1"),
    "unsound_results.LeaksMoreThanRounding": ("causality", "float64, another future"),
    "unsound_results.WrongTail": ("forms agree", "float64 B=2 H=3 N=1 D=5 M=7"),
    "unsound_results.WrongScaleBackward": ("gradients", "gradient of q, float64"),
    "unsound_results.NoBackward": ("gradients", "no graph behind it"),
    "unsound_results.StepOffByOne": ("step", "70 tokens"),
    "unsound_results.PrefillStopsShort": ("prefill agrees", "70 of 75 tokens"),
    "unsound_results.StepsOnlyOnce": ("prefill agrees", "a second step from the state"),
    "unsound_results.WrongRows": ("rows", "rows last, 0"),
    "unsound_results.IgnoresASetting": ("settings", "power=2"),
    "unsound_results.Overflows": ("extremes", "NaN or infinity in output: float32, logits of 1e3"),
    "unsound_results.LosesTheDtype": ("bf16 and fp16", "the output of bfloat16 inputs is torch.float32"),
    "unsound_results.SumsInNarrow": ("bf16 and fp16", "× exact attention's error"),
    "unsound_results.WidensTheOutput": ("shape", "instead of float32 [2, 3, 1, 7]"),
    "unsound_results.FailsInTheDepths": ("queries and keys", "nor refused in a sentence"),
    "unsound_memory.UnseededWeights": ("same seed", "noise differs between two builds"),
    "unsound_memory.UnseededExtras": ("same seed", "extra gate differs"),
    "unsound_memory.HardSeed": ("other seed", "geometry.seed=7"),
    "unsound_memory.IgnoresStrides": ("strides", "an offset slice"),
    "unsound_memory.WritesPartly": ("unwritten memory", "memory full of NaN"),
    "unsound_memory.Remembers": ("no memory", "called before"),
    "unsound_memory.MixesTheBatch": ("batch", "of 3 alone"),
    "unsound_memory.TouchesTheGradient": ("operands intact", "writes to the gradient that it is given"),
    "unsound_claims.StateForgotten": ("state bytes", "state_bytes says 2 × 216"),
    "unsound_claims.QuadraticMemory": ("growth of memory", "at N=4096; exponent, claimed N"),
    "unsound_claims.UnspokenSpectrum": ("causality", "another future"),
    "unsound_claims.InflatedCost": ("work done", "claimed over run"),
    "unsound_claims.HiddenCost": ("work done", "products run over claimed"),
    "unsound_claims.FractionalCost": ("cost model", "whole numbers"),
    "unsound_claims.FreeTraffic": ("cost model", "is below q, k, v and o"),
    "unsound_claims.GrowsFaster": ("growth of work", "of N 1.000"),
    "unsound_claims.NotStochastic": ("rows sum to one", "constant values"),
    "unsound_claims.NotLinear": ("linear in values", "2 v − 3 w"),
    "unsound_claims.KnowsPositions": ("order", "in another order"),
    "unsound_claims.CountsTokens": ("duplicates", "each beside itself"),
    "unsound_claims.WrongLimit": ("exact limit", "{'window': 35}"),
    "unsound_claims.Diverges": ("convergence", "the error does not fall: 32:"),
    "unsound_claims.ClaimsNothing": ("kind", "neither an exact_limit nor a convergence"),
    "unsound_claims.FalselyExact": ("kind", "against softmax"),
}
ALSO_CAUGHT_BY = {
    "unsound_results.StepOffByOne": {"prefill agrees"},
    "unsound_results.WrongTail": {"settings", "bf16 and fp16", "other seed", "extremes", "rows sum to one"},
    "unsound_results.WrongScaleBackward": {"finite differences"},
    "unsound_results.NoBackward": {"finite differences", "work done"},
    "unsound_memory.TouchesTheGradient": {"finite differences"},
}


@pytest.fixture(autouse=True)
def _beside_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def found(target: str, property_: str) -> Finding:
    return examine(Examination(target.rpartition(".")[2].lower(), target=target, quick=True), property_)


@pytest.mark.parametrize("target", DEFECTS)
def test_a_defect_is_caught_with_its_reason(target: str) -> None:
    property_, words = DEFECTS[target]
    finding = found(target, property_)
    assert finding.failed
    assert words in (finding.reason or "")


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_mechanism_passes(name: str) -> None:
    findings = {known: found(f"sound_mechanisms.{name}", known) for known in PROPERTIES}
    assert {known: finding.reason for known, finding in findings.items() if finding.failed} == {}


def test_every_property_catches_something_and_applies_to_something_sound() -> None:
    caught_by = {property_ for property_, _ in DEFECTS.values()}
    assert caught_by | {also for others in ALSO_CAUGHT_BY.values() for also in others} == set(PROPERTIES)
    for property_ in PROPERTIES:
        verdicts = (found(f"sound_mechanisms.{name}", property_).verdict for name in SOUND)
        assert any(verdict is Verdict.PASSED for verdict in verdicts), property_


@pytest.mark.slow
@pytest.mark.parametrize("target", DEFECTS)
def test_a_defect_is_caught_by_nothing_that_it_does_not_concern(target: str) -> None:
    caught = {property_: finding.reason for property_ in PROPERTIES if (finding := found(target, property_)).failed}
    assert set(caught) == {DEFECTS[target][0]} | ALSO_CAUGHT_BY.get(target, set()), caught
