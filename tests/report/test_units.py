import pytest

from linbench.report import units
from linbench.report.names import length_ranges, listing
from linbench.stats import Estimate


@pytest.mark.parametrize(
    ("length", "text"), [(1, "1"), (1000, "1,000"), (1024, "1k"), (1536, "1,536"), (131072, "128k"), (2**20, "1M")]
)
def test_tokens(length, text):
    assert units.tokens(length) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00042, "420 ns"), (0.0123, "12.3 µs"), (4.561, "4.56 ms"), (999.96, "1.00 s"), (78_900, "78.9 s")],
)
def test_milliseconds(value, text):
    assert units.milliseconds(value) == text


def test_latency_has_one_unit_and_the_digits_of_its_median():
    estimate = Estimate(12.34, 11.987, 13.0, 0.95, 20, 11.0)
    assert units.latency(estimate) == "12.3 ms [12.0, 13.0]"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (65536, "64 KiB"), (1.5 * 2**30, "1.50 GiB"), (2**21 + 999, "2.00 MiB")],
)
def test_size(value, text):
    assert units.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.1234, "0.123"), (4.5e-7, "4.50e−7"), (12.34, "12.3")])
def test_error(value, text):
    assert units.error(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (0.05, "0.05"), (1e-6, "10⁻⁶"), (2e-3, "2·10⁻³"), (1e4, "10⁴")]
)
def test_power_of_ten(value, text):
    assert units.power_of_ten(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.4567, "0.457×"), (12.0, "12.0×"), (850_000, "8.5e5×")])
def test_ratio(value, text):
    assert units.ratio(value) == text


def test_skill_has_a_true_minus():
    assert units.skill(-0.02) == "−0.020"


def test_lists_and_ranges_read_as_text():
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert length_ranges([1024, 2048, 8192], [1024, 2048, 4096, 8192]) == "1k to 2k and 8k"


@pytest.mark.parametrize(
    ("value", "text"), [(0.42, "42 %"), (1.234, "123 %"), (0.042, "4.2 %"), (0.0995, "10 %"), (0.0015, "0.15 %")]
)
def test_shares_keep_two_digits(value, text):
    assert units.share(value) == text
