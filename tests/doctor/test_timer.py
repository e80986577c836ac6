"""The bias of the clock: what passes, and what is called wrong."""

from __future__ import annotations

import pytest

from linbench.doctor.timer import judge
from linbench.protocol import KnownKernel


def kernel(nominal_us: float, bias_us: float, overshoot_us: float = 0.05) -> KnownKernel:
    """Eleven samples, one of which was interrupted while the clock was read."""
    lengths = [nominal_us + overshoot_us * (1 + i % 3) for i in range(11)]
    measured = [length + bias_us for length in lengths]
    return KnownKernel(nominal_us=nominal_us, lengths_us=lengths, measured_us=[measured[0] + 4000, *measured[1:]])


@pytest.mark.parametrize(
    ("nominal_us", "bias_us", "wrong"),
    [
        (10, 0.2, False),
        (10, 0.95, False),
        (10, 1.05, True),
        (10, -1.05, True),
        (100, 0.95, False),
        (100, 1.05, True),
        (1000, 1.05, False),
        (1000, 9.5, False),
        (1000, 10.5, True),
        (1000, -10.5, True),
    ],
)
def test_a_microsecond_passes_and_a_hundredth_of_a_millisecond(nominal_us: float, bias_us: float, wrong: bool) -> None:
    (finding,) = judge("cpu", [kernel(nominal_us, bias_us)])
    assert (finding.advice is not None) is wrong
    assert f"{abs(bias_us):.2f} µs" in finding.seen
    assert ("−" in finding.seen) is (bias_us < 0)


def test_what_the_kernel_itself_took_longer_is_no_bias() -> None:
    (finding,) = judge("cpu", [kernel(10, 0.1, overshoot_us=5)])
    assert finding.advice is None
