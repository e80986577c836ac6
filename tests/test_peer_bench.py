"""The comparison with PyPI peers: what it forecasts, how it times, what it says; and that both sides of a row agree."""

import importlib
import re
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from linbench.registry import BUILT_IN

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
peers = importlib.import_module("peers")
pair = importlib.import_module("peer_forms.pair")
timing = importlib.import_module("peer_forms.timing")

COMPARISONS = importlib.import_module("peer_forms").COMPARISONS
LIMITS = timing.Limits(rounds=3, budget_s=60, call_s=60)


def pair_of(peer, ours=torch.sin, length=5):
    """Both sides on the same leaf."""
    leaf = torch.linspace(-1, 1, length).requires_grad_()
    return pair.Pair((leaf,), ours, peer)


def comparison(make, **changes):
    return pair.Comparison("linear causal", "torch", "a form", make, 1e-4, **changes)


def row(mechanism, package, length, ratio, pass_="forward"):
    """A row with numbers, or with a reason where the ratio is None."""
    found = {"mechanism": mechanism, "package": package, "form": "f", "length": length, "pass": pass_}
    return found | ({"reason": "too slow"} if ratio is None else {"ratio": ratio})


@pytest.mark.parametrize(
    ("known", "length", "seconds"),
    [
        ([], 4096, 0.0),
        ([(128, 0.5)], 512, 2.0),
        ([(128, 0.1), (512, 1.6)], 2048, 25.6),
        ([(100, 9.0), (128, 0.1), (512, 1.6)], 1024, 6.4),
        ([(128, 3.0), (512, 2.0)], 2048, 8.0),  # never less than in proportion
    ],
)
def test_a_forecast_follows_the_power_between_the_last_two_lengths(known, length, seconds):
    forecast = timing.Forecast()
    for one in known:
        forecast.add(*one)
    assert forecast.seconds(length) == pytest.approx(seconds)


def test_sides_are_called_in_the_order_ours_peer_peer_ours():
    called = []

    def side(name):
        def operator(x):
            called.append(name)
            return x * 2

        return operator

    samples = timing.abba(pair_of(side("peer"), side("ours")), None, LIMITS)
    assert called == ["ours", "peer", "peer", "ours"] * 3
    assert [len(samples[key]) for key in ("ours_ms", "peer_ms")] == [3, 3]
    assert all(len(one) == 2 for one in samples["ours_ms"])


def test_no_round_begins_after_the_budget_but_the_first():
    limits = timing.Limits(rounds=50, budget_s=0.0, call_s=60)
    assert len(timing.abba(pair_of(torch.sin), None, limits)["ours_ms"]) == 1


def test_the_ratio_is_that_of_medians_and_lies_in_its_interval():
    ours = [[10.0, 10.0], [11.0, 9.0], [10.0, 900.0]]
    peer = [[30.0, 30.0], [29.0, 31.0], [28.0, 32.0]]
    found = timing.summary({"ours_ms": ours, "peer_ms": peer})
    assert (found["ours_median_ms"], found["peer_median_ms"], found["ratio"]) == (10.0, 30.0, 3.0)
    low, high = found["ratio_95"]
    assert low <= 3.0 <= high


def test_equal_rounds_have_an_interval_of_one_point():
    found = timing.summary({"ours_ms": [[2.0, 2.0]] * 4, "peer_ms": [[5.0, 5.0]] * 4})
    assert found["ratio_95"] == [2.5, 2.5]


def test_gradients_are_compared_too():
    one = pair_of(lambda x: x.detach().sin() + 0 * x)
    assert timing.compared(one, None, 1e-6)[0] == 0
    with pytest.raises(timing.GivenUpError, match="disagrees"):
        timing.compared(one, torch.ones(5), 1e-6)


def raising(_):
    raise IndexError("no such place\nin a second line")


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (raising, "the peer fails: IndexError: no such place$"),
        (lambda x: x / 0, "not finite"),
        (lambda x: x.sin() * 1.001, "disagrees: relative distance 1.0e-03"),
        (lambda x: x.sin() * torch.nan, "not finite"),
    ],
)
def test_a_peer_that_cannot_be_timed_is_given_up_with_a_reason(peer, said):
    with pytest.raises(timing.GivenUpError, match=said):
        timing.compared(pair_of(peer), None, 1e-4)


def test_no_call_begins_that_is_forecast_to_be_too_long_or_too_large():
    forecast = timing.Forecast([(128, 10.0)])
    with pytest.raises(timing.GivenUpError, match="would need about 160 s a call"):
        timing.measure(comparison(None), 2048, False, forecast, LIMITS)
    with pytest.raises(timing.GivenUpError, match="refuses the peer's backward"):
        timing.measure(comparison(None, differentiable=False), 2048, True, timing.Forecast(), LIMITS)
    huge = comparison(None, peer_bytes=lambda length, backward: 2.0**60)
    with pytest.raises(timing.GivenUpError, match="GiB"):
        timing.measure(huge, 2048, False, timing.Forecast(), LIMITS)


def test_a_probe_of_a_length_that_a_peer_refuses_forecasts_nothing():
    found = timing.probed(comparison(lambda length: pair_of(raising)), backward=True)
    assert found.seconds(4096) == 0


def rows_of(monkeypatch, make, **arguments):
    """The rows of one comparison at two lengths in both passes."""
    monkeypatch.setattr(peers, "COMPARISONS", (comparison(make),))
    options = {"mechanisms": None, "passes": peers.PASSES, "lengths": [7, 3], "rounds": 2, "budget": 1.0}
    return list(peers.rows(Namespace(**options | {"longest_call": 60.0} | arguments)))


def test_every_pass_and_length_is_a_row_and_lengths_rise(monkeypatch):
    rows = rows_of(monkeypatch, lambda length: pair_of(torch.sin, length=length))
    assert [(one["pass"], one["length"]) for one in rows] == [(p, n) for p in peers.PASSES for n in (3, 7)]
    assert all(one["ratio"] > 0 and one["distance"] == 0 for one in rows)
    assert all(len(peers.cells(one)) == len(peers.HEADER) for one in rows)


def test_a_missing_package_is_a_row_with_a_reason(monkeypatch):
    def make(length):
        raise ImportError("No module named 'absent'")

    rows = rows_of(monkeypatch, make)
    assert [one["reason"] for one in rows] == ["not installed: No module named 'absent'"] * 4
    assert peers.cells(rows[0])[5] == rows[0]["reason"]
    assert len(peers.cells(rows[0])) == len(peers.HEADER)


def test_mechanisms_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--mechanisms", "linear", "retnet"])
    assert peers.parsed().mechanisms == ["linear", "retnet"]
    assert rows_of(monkeypatch, raising, mechanisms=["mamba"]) == []


def test_conclusions_name_the_least_ratio_and_both_means():
    table = [
        row("a", "one", 2048, 2.0),
        row("a", "two", 2048, 8.0),
        row("b", "one", 2048, 0.5),
        row("b", "one", 4096, None),
    ]
    (said,) = peers.conclusions(table)
    assert said.startswith("forward: 3 of 4 rows have numbers; peer / ours is 0.50 at least (b, one, N=2048)")
    # (2 · 8 · 0.5)^(1/3), and (2 · 0.5)^(1/2) without the slower peer of a
    assert re.search(r"mean 2\.00, and 1\.00 over the fastest", said)


def test_conclusions_speak_of_every_pass():
    table = [row("a", "one", 2048, 3.0), row("a", "one", 2048, None, "forward_backward")]
    assert [one.split(":")[0] for one in peers.conclusions(table)] == ["forward", "forward_backward"]
    assert peers.conclusions(table)[1].endswith("no row with numbers.")


def test_comparisons_name_built_in_mechanisms_and_packages_that_the_extra_installs():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["peers"]
    installed = {re.split(r"[<>=]", one)[0] for one in extra} | {"torchscale"}
    assert {one.name for one in COMPARISONS} <= set(BUILT_IN)
    assert {one.package for one in COMPARISONS} <= installed
    keys = [(one.mechanism, one.package, one.form) for one in COMPARISONS]
    assert len(set(keys)) == len(keys)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # deprecations inside the peers
@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: f"{one.mechanism}, {one.package}, {one.form}")
def test_both_sides_agree_in_outputs_and_gradients(one):
    made = one.make(512)
    toward = pair.draw(*timing.call(made.ours, made.leaves, None)[0].shape).detach()
    if not one.differentiable:
        with pytest.raises(timing.GivenUpError, match="the peer fails: RuntimeError"):
            timing.compared(made, toward, one.tolerance)
        toward = None
    assert timing.compared(made, toward, one.tolerance)[0] < one.tolerance
