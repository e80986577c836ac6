"""What each family promises: its sharpness, and the structure that it is named after."""

import pytest
import torch

from linbench.cell import Cell
from linbench.inputs import draw
from linbench.inputs.sharpness import logit_deviation, sharpen


def draw_family(inputs, length=768, *, head_dim=64, dtype="float32", seed=0, **given):
    fields = {"batch": 2, "heads": 3, "head_dim": head_dim, "value_dim": 24}
    return draw(
        Cell(
            mechanism="softmax", inputs=inputs, length=length, dtype=dtype, seed=seed, inputs_parameters=given, **fields
        )
    )


def logits_of(q, k):
    return q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5


def mean_entropy(q, k):
    """Nats, averaged over rows, for each batch element and head."""
    log_weights = logits_of(q, k).log_softmax(-1)
    return -(log_weights.exp() * log_weights).sum(-1).mean(-1)


@pytest.mark.parametrize("inputs", ["gaussian", "smooth", "clustered", "local"])
@pytest.mark.parametrize("sharpness", [0.25, 1.0, 3.5])
@pytest.mark.parametrize("length", [2, 31, 768])
def test_sharpness_is_the_deviation_of_the_logits_of_every_head(inputs, sharpness, length):
    q, k, _ = draw_family(inputs, length, sharpness=sharpness)
    deviation = logits_of(q, k).std((-2, -1), correction=0)
    # exact up to the roundings of fp32
    torch.testing.assert_close(deviation, torch.full_like(deviation, sharpness), rtol=1e-5, atol=0)


@pytest.mark.parametrize("inputs", ["gaussian", "smooth", "clustered", "local"])
def test_sharpness_survives_rounding_to_bfloat16(inputs):
    q, k, _ = draw_family(inputs, dtype="bfloat16", sharpness=2.0)
    deviation = logits_of(q, k).std((-2, -1), correction=0)
    torch.testing.assert_close(deviation, torch.full_like(deviation, 2.0), rtol=2**-7, atol=0)


def test_the_deviation_of_logits_is_exact_also_when_they_are_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 57, 6, generator=generator) * torch.arange(1, 7) + 3
    k = torch.randn(2, 57, 6, generator=generator) - 5
    torch.testing.assert_close(logit_deviation(q, k), logits_of(q, k).std((-2, -1), correction=0))


def test_a_single_token_is_left_as_drawn():
    q, k = torch.ones(1, 1, 5), torch.ones(1, 1, 5)
    assert torch.equal(sharpen(q, k, 3.0)[0], torch.ones(1, 1, 5))


@pytest.mark.parametrize("inputs", ["gaussian", "smooth", "clustered", "local"])
def test_values_have_unit_variance(inputs):
    variances = [draw_family(inputs, seed=seed)[2].square().mean() for seed in range(8)]
    # clusters and sinusoids leave only some hundreds of independent numbers in each draw
    assert torch.stack(variances).mean() == pytest.approx(1, abs=0.1)


def test_gaussian_q_k_and_v_are_independent():
    q, k, v = draw_family("gaussian", length=4000, head_dim=24)
    columns = torch.cat([x.flatten(0, 2).double() for x in (q, k, v)], dim=-1)
    correlations = torch.corrcoef(columns.T) - torch.eye(72)
    assert correlations.abs().max() < 5.5 / len(columns) ** 0.5  # 2556 pairs: six deviations would be a defect


@pytest.mark.parametrize("waves", [1, 4])
def test_smooth_is_of_low_rank_and_slow(waves):
    for tensor in draw_family("smooth", waves=waves):
        singular = torch.linalg.svdvals(tensor.double())
        assert singular[..., 2 * waves - 1].min() > 1e-3 * singular.max()
        assert singular[..., 2 * waves].max() < 1e-5 * singular.max()
        steps = tensor.diff(dim=2).norm() / tensor.norm()
        assert steps < 2 * torch.pi * waves / 768


@pytest.mark.parametrize("clusters", [5, 16])
def test_clustered_attention_stays_in_its_cluster_wherever_that_is(clusters):
    q, k, v = draw_family("clustered", clusters=clusters)
    # two tokens share a cluster when their keys are alike; cosines are near 0.8 within and near 0 without
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    same = unit @ unit.transpose(-1, -2) > 0.5
    assert same.double().mean() == pytest.approx(1 / clusters, rel=0.1)
    weights = logits_of(q, k).softmax(-1)
    assert (weights * same).sum(-1).mean() > 0.9
    positions = torch.arange(768)
    distance = (positions[:, None] - positions).abs()
    assert (weights * (distance <= 64)).sum(-1).mean() < 0.25  # a window of this width holds 0.16 of the tokens
    # the values of a cluster are alike too, so that finding it is what matters
    assert (weights.float() @ v - v).square().mean() < 0.3


@pytest.mark.parametrize(("width", "length"), [(64, 2048), (16, 1024)])
def test_local_attention_stays_in_its_band(width, length):
    q, k, _ = draw_family("local", length, width=width)
    positions = torch.arange(length)
    band = (positions[:, None] - positions).abs() <= width
    mass = (logits_of(q, k).softmax(-1) * band).sum(-1).mean(-1)
    assert mass.mean() > 0.9
    assert mass.min() > 0.8  # of the six draws of frequencies; the band holds 0.06 of the tokens or fewer


def test_local_attention_stays_in_its_band_at_a_quarter_of_a_million_tokens():
    q, k, _ = draw(
        Cell(mechanism="softmax", inputs="local", length=1 << 18, batch=1, heads=1, head_dim=64, value_dim=1)
    )
    rows = torch.tensor([100, 131_072, 262_000])
    weights = (q[0, 0, rows] @ k[0, 0].T / 8).softmax(-1)
    band = (rows[:, None] - torch.arange(1 << 18)).abs() <= 64
    assert ((weights * band).sum(-1) > 0.9).all()


def test_sharper_inputs_attend_to_fewer_tokens():
    entropies = [mean_entropy(*draw_family("gaussian", sharpness=sharpness)[:2]).mean() for sharpness in (0.5, 1, 2, 4)]
    assert entropies == sorted(entropies, reverse=True)
