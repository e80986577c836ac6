"""Change points on simulated series: at their level without a step, found where there is one, deaf to outliers."""

import numpy as np
import pytest

from linbench.gate.statistics import LEVEL
from linbench.history.steps import FEWEST, steps, steps_of_all, strongest

SERIES = 200


def noise(generator, count, kind):
    """Multiplicative noise of about 2 %."""
    if kind == "normal":
        return np.exp(generator.normal(0, 0.02, count))
    if kind == "loaded":  # every fifth night is slower, by up to a half
        extra = 0.5 * generator.random(count) * (generator.random(count) < 0.2)
        return np.exp(generator.normal(0, 0.02, count)) * (1 + extra)
    return np.exp(0.02 * generator.standard_t(2, count))


@pytest.mark.parametrize("kind", ["normal", "loaded", "heavy"])
def test_without_a_step_the_level_is_kept(kind):
    generator = np.random.default_rng(11)
    found = [strongest(noise(generator, 14, kind)).p <= 0.05 for _ in range(SERIES)]
    assert np.mean(found) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / SERIES)


def test_the_probability_is_uniform_without_a_step():
    generator = np.random.default_rng(12)
    found = np.sort([strongest(generator.normal(size=17)).p for _ in range(SERIES)])
    distance = np.abs(found - (np.arange(SERIES) + 0.5) / SERIES).max()
    assert distance <= 1.36 / np.sqrt(SERIES)  # Kolmogorov's bound at 5 %


def test_among_many_series_without_a_step_hardly_one_has_one():
    generator = np.random.default_rng(13)
    rounds = [steps_of_all([noise(generator, 15, "normal") for _ in range(8)]) for _ in range(25)]
    assert np.mean([any(one) for one in rounds]) <= LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / 25)


@pytest.mark.parametrize(
    ("kind", "size", "reach"), [("normal", 1.05, 1), ("normal", 0.9, 1), ("heavy", 1.2, 1), ("loaded", 1.2, 3)]
)
def test_a_step_is_found_where_it_is(kind, size, reach):
    """Slow nights right before a step look like its beginning: under load it is found less exactly."""
    generator = np.random.default_rng(14)
    hits = []
    for _ in range(60):
        values = noise(generator, 24, kind) * np.where(np.arange(24) < 13, 1.0, size)
        found = steps(values, 0.05)
        hits.append(bool(found) and min(abs(step.index - 13) for step in found) <= reach)
    assert np.mean(hits) >= 0.8


def test_two_steps_are_found_apart():
    generator = np.random.default_rng(15)
    values = noise(generator, 36, "normal") * np.repeat([1.0, 1.3, 0.8], [10, 14, 12])
    assert [step.index for step in steps(values, 0.05)] == [10, 24]


def test_one_bad_night_is_no_step():
    values = [1.0 + 0.001 * (index % 7) for index in range(20)]
    values[9] = 9.0
    assert steps(values, 0.05) == []


def test_order_does_not_matter_to_scale_and_equal_values_are_no_step():
    values = np.random.default_rng(16).lognormal(size=19)
    assert strongest(values) == strongest(np.log(values) * 7)
    assert strongest([2.0] * 15).p == 1.0


def test_too_few_points_have_no_step():
    assert strongest([1.0] * (2 * FEWEST - 1)) is None
    assert steps([1.0, 1.0, 9.0, 9.0], 1.0) == []


def test_a_step_is_the_same_at_either_end():
    values = [1.0, 1.01, 1.02, *np.random.default_rng(17).normal(2.0, 0.01, 16)]
    first, last = strongest(values), strongest(values[::-1])
    assert (first.index, last.index) == (3, 16)
    assert first.p == pytest.approx(last.p, abs=0.01)
