import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from linbench.stats import (
    Estimate,
    divided,
    median_interval,
    pooled_median,
    ratio_of_medians,
    scaling_exponent,
    student_quantile,
)


@pytest.mark.parametrize("count", [6, 7, 10, 20, 37, 200, 1001])
def test_ranks_of_the_interval_are_those_of_the_binomial_distribution(count):
    samples = np.arange(1, count + 1)
    estimate = median_interval(samples)
    rank = int(scipy_stats.binom.ppf(0.025, count, 0.5))
    below = scipy_stats.binom.cdf(rank - 1, count, 0.5)
    assert (estimate.low, estimate.high) == (rank, count + 1 - rank)
    assert estimate.coverage == pytest.approx(1 - 2 * below, abs=1e-9)
    assert estimate.value == np.median(samples)


@pytest.mark.parametrize("count", [8, 15, 40])
def test_interval_of_the_median_agrees_with_scipys_quantile_test(count):
    samples = np.random.default_rng(count).gamma(2.0, size=count)
    interval = scipy_stats.quantile_test(samples, p=0.5).confidence_interval(0.95)
    estimate = median_interval(samples)
    assert (estimate.low, estimate.high) == (interval.low, interval.high)


@pytest.mark.parametrize(("count", "coverage"), [(1, 0.0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_too_few_samples_give_their_range_and_say_what_it_is_worth(count, coverage):
    estimate = median_interval(range(count))
    assert (estimate.low, estimate.high, estimate.minimum) == (0, count - 1, 0)
    assert estimate.coverage == pytest.approx(coverage)


@pytest.mark.parametrize("count", [6, 10, 30])
def test_interval_of_the_median_covers_the_true_median(count):
    draws = np.random.default_rng(1).lognormal(size=(1500, count))
    hits = [estimate.low <= 1.0 <= estimate.high for estimate in map(median_interval, draws)]
    assert np.mean(hits) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize(("above", "below"), [(10, 10), (15, 40), (31, 8)])
def test_interval_of_the_ratio_covers_the_true_ratio(above, below):
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(600):
        estimate = ratio_of_medians([2 * rng.lognormal(sigma=0.3, size=above)], [rng.lognormal(sigma=0.3, size=below)])
        hits.append(estimate.low <= 2.0 <= estimate.high)
    # the percentile bootstrap of a median is known to be a little short for small samples
    assert np.mean(hits) >= 0.92


def test_equal_medians_are_rarely_called_different():
    rng = np.random.default_rng(3)
    signs = [ratio_of_medians([rng.gamma(3, size=20)], [rng.gamma(3, size=20)]).sign for _ in range(600)]
    assert np.mean(np.abs(signs)) <= 0.07


@pytest.mark.parametrize("count", [6, 9, 24, 25])
def test_order_statistic_draws_have_the_distribution_of_the_usual_bootstrap(count):
    rng = np.random.default_rng(4)
    samples = rng.gamma(2.0, size=count)
    usual = np.median(rng.choice(samples, size=(100_000, count)), axis=1)
    estimate = ratio_of_medians([samples], [np.ones(10)])
    # the bootstrap of a constant is that constant, so that the ratio's interval is the bootstrap's own
    for bound, level in ((estimate.low, 0.025), (estimate.high, 0.975)):
        assert abs(np.mean(usual <= bound) - level) < 0.03 or np.quantile(usual, level) == pytest.approx(
            bound, rel=0.05
        )


def test_ratio_of_tiny_samples_is_decided_only_where_a_rank_test_could():
    assert ratio_of_medians([[9.0]], [[1.0, 1.1, 1.2]]).sign == 0
    assert ratio_of_medians([[9.0, 9.1, 9.2]], [[1.0, 1.1, 1.2]]).sign == 0
    assert ratio_of_medians([[9.0, 9.1, 9.2]], [[1.0, 1.1, 1.2, 1.3, 1.4]]).sign == 1
    overlapping = ratio_of_medians([[1.0, 1.3, 9.2, 9.3]], [[1.0, 1.1, 1.2, 1.4]])
    assert (overlapping.sign, overlapping.count) == (0, 4)


def test_pooled_median_widens_with_the_spread_between_processes():
    rng = np.random.default_rng(5)
    close = pooled_median([1 + 0.01 * rng.standard_normal(30) for _ in range(5)])
    apart = pooled_median([centre + 0.01 * rng.standard_normal(30) for centre in (1.0, 1.0, 1.5, 2.0, 2.0)])
    assert close.high - close.low < 0.05
    assert apart.low <= 1.05
    assert apart.high >= 1.95
    assert apart.value == pytest.approx(1.5, abs=0.02)


def test_pooled_median_of_one_process_is_its_order_statistic_interval():
    samples = np.random.default_rng(6).random(17)
    assert pooled_median([samples]) == median_interval(samples)


def test_groups_of_different_sizes_are_pooled_without_padding():
    estimate = pooled_median([[5.0] * 3, [5.0] * 8, [5.0] * 20])
    assert (estimate.value, estimate.count) == (5.0, 31)
    assert (estimate.low, estimate.high) == pytest.approx((5.0, 5.0))


def test_a_quotient_of_estimates_covers_the_true_quotient():
    generator = np.random.default_rng(11)
    inside = []
    for _ in range(400):
        tops, bottoms = (np.exp(generator.normal(np.log(true), 0.05, 25)) for true in (3.0, 2.0))
        found = divided(median_interval(tops), median_interval(bottoms))
        inside.append(found.low <= 1.5 <= found.high)
        assert found.low <= found.value <= found.high
    assert np.mean(inside) >= 0.95


def test_a_quotient_by_an_estimate_that_is_sure_has_the_reach_of_the_other():
    top = median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    sure = Estimate(2.0, 2.0, 2.0, 0.95, 9, 2.0)
    found = divided(top, sure)
    assert (found.low, found.value, found.high) == pytest.approx((top.low / 2, top.value / 2, top.high / 2))


@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
@pytest.mark.parametrize("freedom", [1, 2, 2.7, 4, 11.3, 60])
def test_students_quantile_is_scipys(probability, freedom):
    assert student_quantile(probability, freedom) == pytest.approx(scipy_stats.t.ppf(probability, freedom), rel=1e-4)


def processes(rng, count, between, within=0.02, samples=30):
    """Samples of processes that each have a level of their own, as memory layouts give them."""
    return [math.exp(rng.normal(0, between)) * rng.lognormal(sigma=within, size=samples) for _ in range(count)]


@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_interval_over_processes_covers_the_true_median(count, between):
    rng = np.random.default_rng(11)
    estimates = [pooled_median(processes(rng, count, between)) for _ in range(800)]
    hits = [estimate.low <= 1.0 <= estimate.high for estimate in estimates]
    assert np.mean(hits) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 800)


@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("above", "below"), [(2, 2), (3, 3), (5, 3)])
def test_the_same_thing_in_other_processes_is_rarely_called_different(above, below, between):
    rng = np.random.default_rng(12)
    signs = [ratio_of_medians(processes(rng, above, between), processes(rng, below, between)).sign for _ in range(800)]
    assert np.mean(np.abs(signs)) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 800)


def test_a_difference_larger_than_the_spread_between_processes_is_found():
    rng = np.random.default_rng(13)
    found = [
        ratio_of_medians([1.2 * group for group in processes(rng, 3, 0.02)], processes(rng, 3, 0.02)).sign
        for _ in range(300)
    ]
    assert np.mean(np.array(found) == 1) >= 0.9


def test_same_samples_give_the_same_interval():
    groups = [np.random.default_rng(7).random(12), np.random.default_rng(8).random(9)]
    assert pooled_median(groups) == pooled_median(groups)
    assert ratio_of_medians(groups, groups[:1]) == ratio_of_medians(groups, groups[:1])


@pytest.mark.parametrize("function", [median_interval, lambda empty: pooled_median([empty])])
def test_no_samples_have_no_median(function):
    with pytest.raises(ValueError, match="no samples"):
        function([])


def test_sign_needs_the_whole_interval_on_one_side():
    ratios = [Estimate(1.0, low, high, 0.95, 9, 1.0).sign for low, high in ((0.5, 0.9), (0.9, 1.1), (1.1, 2.0))]
    assert ratios == [-1, 0, 1]


def test_scaling_exponent_of_a_power_law_is_its_power():
    lengths = np.array([1024, 4096, 65536])
    assert scaling_exponent(lengths, 3e-7 * lengths**1.75) == pytest.approx(1.75)
    slope = scipy_stats.linregress(np.log([1, 2, 4, 9]), np.log([3, 1, 7, 8])).slope
    assert scaling_exponent([1, 2, 4, 9], [3, 1, 7, 8]) == pytest.approx(slope)


@pytest.mark.parametrize(("lengths", "values"), [([], []), ([4], [1]), ([4, 4], [1, 2]), ([1, 2], [0, 3])])
def test_scaling_exponent_needs_two_positive_points(lengths, values):
    assert scaling_exponent(lengths, values) is None
