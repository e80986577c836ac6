import pytest

from linbench.report.crossover import bracket, crossovers
from linbench.report.points import make_points
from linbench.stats import Estimate

LENGTHS = (1024, 2048, 4096, 8192)


def crossing(record, times, exact=(1, 2, 4, 8), **cell):
    """The crossover of a mechanism with ``times`` milliseconds at LENGTHS against softmax with ``exact``."""
    records = [record("softmax", n, ms=ms) for n, ms in zip(LENGTHS, exact, strict=False)]
    records += [record("linear", n, ms=ms, **cell) for n, ms in zip(LENGTHS, times, strict=False)]
    (group,) = make_points(records, []).by_setting.values()
    (found,) = crossovers(group)
    return found


def test_bracket_is_the_last_slower_and_the_first_faster_length(record):
    found = crossing(record, (4, 4, 3, 3))
    assert (found.kind, found.low, found.high) == ("bracket", 2048, 4096)
    assert found.finding == "Passes exact softmax between 2k and 4k"
    assert found.short == "2k – 4k"


def test_undecided_length_widens_the_bracket(record):
    found = crossing(record, (4, 2.0, 3, 3))
    assert found.ratios[2048].sign == 0
    assert (found.kind, found.low, found.high) == ("bracket", 1024, 4096)


def test_faster_from_the_shortest_length(record):
    found = crossing(record, (0.5, 0.5, 0.5, 0.5))
    assert (found.kind, found.low, found.high) == ("always", None, 1024)
    assert found.finding == "Faster than exact softmax from 1k, the shortest length compared"


def test_no_crossover_names_the_longest_length_compared(record):
    found = crossing(record, (9, 9, 9, 9))
    assert (found.kind, found.high) == ("never", None)
    assert found.finding == "No crossover up to 8k"


def test_falling_behind_again_is_no_crossover_and_says_where_it_was_faster(record):
    found = crossing(record, (4, 1, 1, 20))
    assert found.finding == "No crossover up to 8k, although faster at 2k, 4k"


def test_tie_at_the_longest_length_is_no_crossover(record):
    assert crossing(record, (4, 4, 8, 8.0)).finding == "No crossover up to 8k, too close to call there"


def test_faster_after_a_tie_has_no_lower_end(record):
    found = crossing(record, (1.0, 2.0, 3, 3))
    assert (found.kind, found.low, found.high) == ("bracket", None, 4096)
    assert found.short == "from 4k"


def test_only_lengths_with_both_are_compared(record):
    found = crossing(record, (4, 4, 3, 3), exact=(1, 2))
    assert found.finding == "No crossover up to 2k"


def test_mechanism_without_a_time_is_unknown(record):
    found = crossing(record, (4, 4), status="crash")
    assert (found.kind, found.ratios, found.short) == ("unknown", {}, "not compared")


def test_fastest_exact_implementation_of_each_length_is_the_line(record):
    records = [record("softmax", n, ms=ms) for n, ms in ((1024, 1), (2048, 9))]
    records += [record("softmax", n, ms=ms, implementation="sdpa") for n, ms in ((1024, 5), (2048, 2))]
    records += [record("linear", n, ms=3) for n in (1024, 2048)]
    (group,) = make_points(records, []).by_setting.values()
    (found,) = crossovers(group)
    assert found.kind == "never"
    assert found.ratios[2048].value == pytest.approx(1.5, rel=1e-3)


def test_without_softmax_there_is_nothing_to_pass(record):
    (group,) = make_points([record("linear"), record("retnet")], []).by_setting.values()
    assert crossovers(group) == []


def test_a_single_sample_decides_nothing(record):
    assert crossing(record, ([0.1], [0.1], [0.1], [0.1])).kind == "never"


def test_bracket_ignores_the_order_of_its_lengths():
    slower, faster = (Estimate(1.0, low, high, 0.95, 9, 1.0) for low, high in ((1.5, 2.0), (0.2, 0.5)))
    assert bracket({4096: faster, 1024: slower, 2048: slower}) == ("bracket", 2048, 4096)


def test_mechanism_without_such_a_form_is_no_answer(record):
    exact = [record("softmax", length, ms=10.0) for length in (256, 512)]
    missing = [record("linear", length, status="unsupported") for length in (256, 512)]
    points = make_points([*exact, *missing], [])
    assert [crossovers(group) for group in points.by_setting.values()] == [[]]
