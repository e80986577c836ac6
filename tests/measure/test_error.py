"""The error measure: what it says of predictions whose error is known, and how sure it is of a sample."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom

from linbench.cell import Cell
from linbench.inputs import draw
from linbench.measure.error import (
    NonFiniteOutputError,
    UndefinedError,
    measure_error,
    sample_rows,
    trivial_prediction,
)
from linbench.measure.exact import exact_attention


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small, and on a busy machine a second thread is waited for longer than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw_qkv(length, inputs="gaussian", dtype="float32", *, value_dim=8, seed=0):
    return draw(
        Cell(
            mechanism="softmax",
            length=length,
            batch=2,
            heads=3,
            head_dim=16,
            value_dim=value_dim,
            inputs=inputs,
            dtype=dtype,
            seed=seed,
        )
    )


def judge(output, q, k, v, causal=False, **options):
    return measure_error(output, q, k, v, causal=causal, reading="error", **options)


def window_attention(q, k, v, causal, width=9):
    """A sparse approximation that errs differently in every row."""
    positions = torch.arange(q.shape[2])
    distance = positions[:, None] - positions
    visible = (distance.abs() <= width) & ((distance >= 0) | (not causal))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@pytest.mark.parametrize("causal", [False, True])
def test_trivial_prediction_is_the_mean_of_the_visible_values(causal):
    _, _, v = draw_qkv(37)
    visible = torch.ones(37, 37, dtype=torch.float64)
    if causal:
        visible = visible.tril()
    expected = visible / visible.sum(-1, keepdim=True) @ v.double()
    torch.testing.assert_close(trivial_prediction(v, causal), expected)
    rows = torch.tensor([0, 5, 36])
    torch.testing.assert_close(trivial_prediction(v, causal, rows), expected[:, :, rows])


@pytest.mark.parametrize("causal", [False, True])
def test_the_trivial_prediction_has_no_skill(causal):
    q, k, v = draw_qkv(67)
    result = judge(trivial_prediction(v, causal), q, k, v, causal)
    assert result.relative_error == pytest.approx(result.trivial_error)
    assert result.skill == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_in_bfloat16_has_no_excess(causal):
    q, k, v = draw_qkv(500, dtype="bfloat16", value_dim=16)  # the width of the keys, for torch's fused kernel
    result = judge(F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v, causal)
    assert result.excess == pytest.approx(1, abs=0.05)
    assert result.skill > 0.99


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_in_fp64_has_no_error(causal):
    q, k, v = draw_qkv(300, dtype="float64")
    result = judge(F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v, causal)
    assert result.relative_error < 1e-14
    assert result.skill == pytest.approx(1, abs=1e-13)
    assert result.row_cosine_mean == pytest.approx(1, abs=1e-13)
    assert result.exact_error == 0
    assert result.excess is None


def test_figures_are_those_of_an_error_that_is_known():
    q, k, v = draw_qkv(101)
    truth = exact_attention(q, k, v, False)
    result = judge(truth * 1.25, q, k, v)
    assert result.relative_error == pytest.approx(0.25)
    assert result.row_cosine_mean == pytest.approx(1)
    assert result.row_error_quantiles == pytest.approx(dict.fromkeys(("p05", "p50", "p95", "p99", "max"), 0.25))
    assert (result.rows, result.rows_total, result.relative_error_interval) == (101, 101, None)


def test_quantiles_rank_rows_by_their_own_error():
    q, k, v = draw_qkv(100)
    truth = exact_attention(q, k, v, False)
    result = judge(truth * (1 + torch.arange(1, 101)[:, None] / 100), q, k, v)
    assert result.row_error_quantiles == pytest.approx({"p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0})


def test_opposite_and_zero_outputs():
    q, k, v = draw_qkv(50)
    truth = exact_attention(q, k, v, False)
    assert judge(-truth, q, k, v).row_cosine_mean == pytest.approx(-1)
    zero = judge(torch.zeros_like(truth), q, k, v)
    assert (zero.relative_error, zero.row_cosine_mean) == (1.0, 0.0)


def test_errors_that_are_not_numbers_are_refused():
    q, k, v = draw_qkv(40)
    output = torch.zeros_like(v)
    output[1, 2, 17, 3] = math.nan
    with pytest.raises(NonFiniteOutputError, match="1 of 1920 elements are NaN or infinite, first at row 17"):
        judge(output, q, k, v, full_up_to_tokens=0, rows=4)  # also in a row that no sample holds
    output[1, 2, 17, 3] = math.inf
    with pytest.raises(NonFiniteOutputError):
        judge(output, q, k, v)


def test_what_has_no_error_says_why():
    q, k, v = draw_qkv(1)
    single = judge(v, q, k, v)  # one token: its value is exact attention and the mean at once
    assert single.skill is None
    assert single.relative_error == pytest.approx(0, abs=1e-12)
    q, k, v = draw_qkv(30)
    with pytest.raises(UndefinedError, match="relative error is undefined"):
        judge(v, q, k, torch.zeros_like(v))


def test_a_row_of_zeros_in_the_truth_stays_finite():
    q, k, v = draw_qkv(30)
    v[:, :, 0] = 0.0
    result = judge(torch.ones_like(v), q, k, v, causal=True)
    assert math.isfinite(result.row_error_quantiles["max"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "count"), [(1, 5), (64, 64), (65, 64), (131_072, 512), (1_000_003, 7)])
def test_a_sample_is_one_row_of_each_stratum_and_stands_for_all(causal, length, count):
    positions, weights = sample_rows(length, count, torch.Generator().manual_seed(0), causal=causal)
    assert len(positions) == len(weights) == min(length, count)
    assert weights.sum() == length
    strata_ends = weights.cumsum(0)
    assert (positions < strata_ends).all()
    assert (positions >= strata_ends - weights).all()


def test_causal_samples_take_the_first_rows_with_certainty():
    positions, weights = sample_rows(100_000, 512, torch.Generator().manual_seed(0), causal=True)
    assert positions[:16].tolist() == list(range(16))
    assert (weights[:16] == 1).all()
    assert weights.max() <= 2 * 100_000 / 512 + 1


@pytest.mark.parametrize("causal", [False, True])
def test_samples_are_unbiased(causal):
    value = torch.arange(1, 5001, dtype=torch.float64).rsqrt()
    generator = torch.Generator().manual_seed(0)
    sums = []
    for _ in range(400):
        positions, weights = sample_rows(5000, 40, generator, causal=causal)
        sums.append((value[positions] * weights).sum())
    sums = torch.stack(sums)
    assert abs(sums.mean() - value.sum()) < 4 * sums.std() / math.sqrt(400)


def test_the_seed_decides_the_sample():
    q, k, v = draw_qkv(400)
    output = window_attention(q, k, v, False)
    first, again, other = (judge(output, q, k, v, full_up_to_tokens=399, rows=30, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.relative_error != other.relative_error
    assert (first.rows, first.rows_total) == (30, 400)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("inputs", ["gaussian", "clustered", "local"])
def test_the_interval_of_a_sample_covers_the_error_of_all_rows(causal, inputs):
    q, k, v = draw_qkv(900, inputs, seed=5)
    output = window_attention(q, k, v, causal)
    whole = judge(output, q, k, v, causal)
    samples = [judge(output, q, k, v, causal, full_up_to_tokens=0, rows=80, seed=seed) for seed in range(60)]
    covered = sum(low <= whole.relative_error <= high for low, high in (s.relative_error_interval for s in samples))
    # the bound that a 95 % interval misses once in ten thousand runs
    assert covered >= binom.ppf(1e-4, 60, 0.95)
    for field in ("relative_error", "trivial_error", "row_cosine_mean"):
        mean = sum(getattr(sample, field) for sample in samples) / 60
        assert mean == pytest.approx(getattr(whole, field), rel=0.03)


def test_long_inputs_are_judged_on_a_sample():
    q, k, v = draw_qkv(20_003, dtype="bfloat16")
    result = judge(v, q, k, v, causal=True)
    assert (result.rows, result.rows_total) == (512, 20_003)
    low, high = result.relative_error_interval
    assert low < result.relative_error < high


def test_the_reading_is_carried_and_nothing_is_changed():
    q, k, v = draw_qkv(33)
    before = [x.clone() for x in (q, k, v)]
    assert measure_error(v, q, k, v, causal=False, reading="distance").reading == "distance"
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, v), strict=True))
