"""Numbers as a person reads them: tokens, time, bytes, ratios and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from linbench.stats import Estimate

_TIME_UNITS = (("s", 1e3), ("ms", 1.0), ("µs", 1e-3), ("ns", 1e-6))
_BYTE_UNITS = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"


class Bounded(Protocol):
    """A value with its interval."""

    @property
    def value(self) -> float:
        """In the unit of both bounds."""

    @property
    def low(self) -> float:
        """Lower bound."""

    @property
    def high(self) -> float:
        """Upper bound."""


def tokens(length: int) -> str:
    """1k is 1,024 tokens and 1M is 1,024 k; a length that is not a multiple is written out."""
    for suffix, size in (("M", 2**20), ("k", 2**10)):
        if length >= size and length % size == 0:
            return f"{length // size:,}{suffix}"
    return f"{length:,}"


def milliseconds(value_ms: float) -> str:
    """Three digits in the unit that suits: ``12.3 µs``, ``4.56 ms``, ``78.9 s``."""
    unit, size = _unit(value_ms, _TIME_UNITS)
    return f"{significant(value_ms / size)} {unit}"


def latency(estimate: Estimate) -> str:
    """``4.56 ms [4.50, 4.61]``: median and interval of milliseconds in one unit, to the digits of the median."""
    unit, size = _unit(estimate.value, _TIME_UNITS)
    places = _decimals(estimate.value / size)
    low, high = (f"{bound / size:,.{places}f}" for bound in (estimate.low, estimate.high))
    return f"{estimate.value / size:,.{places}f} {unit} [{low}, {high}]"


def size(value_bytes: float) -> str:
    """``0 B``, ``64 KiB``, ``1.50 GiB``."""
    unit, scale = _unit(value_bytes, _BYTE_UNITS)
    scaled = value_bytes / scale
    return f"{scaled:,.0f} {unit}" if scaled == round(scaled) else f"{significant(scaled)} {unit}"


def ratio(value: float) -> str:
    """``0.42×``; in powers of ten from 10,000 on: ``1.5e6×``."""
    return f"{value:.1e}×".replace("e+0", "e") if value >= 1e4 else f"{significant(value)}×"


def share(value: float) -> str:
    """``42 %``; below ten with two digits: ``4.2 %``, ``0.15 %``."""
    percent = 100 * value
    return f"{percent:,.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def rate(value_per_s: float) -> str:
    """``1,230,000``: three significant digits, written out, since k is 1,024 here."""
    rounded = float(f"{value_per_s:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else significant(value_per_s)


def interval(estimate: Estimate, words: Callable[[float], str]) -> str:
    """``0.42 [0.40, 0.44]``: the value with its interval, which is left out where it is but a point."""
    if estimate.low == estimate.high:
        return words(estimate.value)
    return f"{words(estimate.value)} [{words(estimate.low)}, {words(estimate.high)}]"


def near_one(ratio: Bounded | None) -> str:
    """``1.012 [0.998, 1.026]``: a ratio of which the thousandths count, with its interval; empty without one."""
    return "" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def error(value: float) -> str:
    """Three digits, in powers of ten where the number is small: ``0.123``, ``4.56e−7``, ``0``."""
    if value == 0:
        return "0"
    # a line may break after a hyphen, but not after a minus
    return f"{value:.2e}".replace("e-0", "e-").replace("-", "−") if abs(value) < 1e-3 else significant(value)


def skill(value: float) -> str:
    """Three decimals and a true minus sign; far below zero only the order of magnitude matters."""
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}").replace("-", "−")


def power_of_ten(value: float) -> str:
    """A tick of an error axis: ``10⁻³``; between powers ``2·10⁻³``; written out from 0.01 to 1,000."""
    if 0.009 < value < 2000:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**exponent)
    return f"{'' if digit == 1 else f'{digit}·'}10{str(exponent).translate(_SUPERSCRIPT)}"


def significant(value: float) -> str:
    """Three significant digits without exponent: ``0.0123``, ``1.23``, ``1,230`` keeps its units."""
    return f"{value:,.{_decimals(value)}f}"


def _unit(value: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    for unit, scale in units:
        # what would round up to 1,000 of a unit belongs to the next one
        if abs(value) >= scale * 0.9995:
            return unit, scale
    return units[-1]


def _decimals(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    # of the rounded value: 9.999 has the decimals of 10.0
    return max(0, 2 - int(f"{value:.2e}".partition("e")[2]))
