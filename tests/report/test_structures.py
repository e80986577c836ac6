"""Spectra and attention maps: every number of a block in its place, and nothing where no block has any."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from linbench.record import AttentionMap, MapPicture, Structure
from linbench.report.figures import make_look
from linbench.report.points import make_points
from linbench.report.structures import shaded, structure_charts

EXACT = [[0.75, 0.25, 0.0], [0.1, 0.3, 0.6]]


def picture(weights):
    return MapPicture(queries=[0, 5], keys=[0, 3, 7], weights=weights, exact_weights=EXACT)


def block(weights=None, values=(1.0, 0.25), entropy=1.5, **changed):
    numbers = dict.fromkeys(AttentionMap.model_fields, 2.0)
    numbers |= {"rows": 10, "rows_total": 10, "per_channel": False, "top": 16, "entropy_nats": entropy}
    numbers |= {"exact_entropy_nats": 1.25, "top_overlap": 0.5, "total_variation": 0.375, "effective_rank": 3.5}
    numbers |= {"singular_values": list(values), "exact_singular_values": [1.0, 0.5, 0.125]}
    attention = AttentionMap(**numbers | {"picture": picture(weights)} if weights else numbers | {"picture": None})
    ranks = dict.fromkeys(("output_effective_rank", "output_numerical_rank"), 2.0)
    ranks |= dict.fromkeys(("exact_effective_rank", "exact_numerical_rank"), 2.0)
    whole = {"protocol": 3, "rows": 10, "rows_total": 10, "largest_rank": 5, **ranks, "attention": attention}
    return Structure(**whole | {"output_singular_values": [1.0], "exact_singular_values": [1.0, 0.5]} | changed)


def charts(record, blocks):
    records = [record(name).model_copy(update={"structure": one}) for name, one in blocks.items()]
    points = make_points(records, [])
    return {chart.slug: chart for chart in structure_charts(points, make_look(points))}


def test_a_spectrum_has_every_singular_value_by_its_number(record):
    found = charts(record, {"linear": block(), "performer": block(values=(1.0, 0.5, 0.0625))})
    (panel,) = found["map-spectrum"].panels
    seen = {(entry.point.series.mechanism, entry.across.value): entry.value.value for entry in panel.content.entries}
    expected = {("linear", 1): 1.0, ("linear", 2): 0.25}
    assert seen == expected | {("performer", 1): 1.0, ("performer", 2): 0.5, ("performer", 3): 0.0625}
    assert panel.content.frame()["exact"] == [1.0, 0.5, 0.125]
    assert [len(panel.content.entries) for panel in found["output-spectrum"].panels] == [2]


def test_maps_stand_beside_that_of_softmax_with_their_figures(record):
    weights = [[0.5, 0.5, 0.0], [-0.1, 0.4, 0.7]]
    found = charts(record, {"linear": block(weights, entropy=None), "longformer": block(EXACT), "gla": block()})
    (panel,) = found["attention-maps"].panels
    exact, first, second = panel.content.frame()["tiles"]
    assert (exact["series"], exact["weights"], exact["lines"]) == (None, EXACT, ["entropy 1.25 nats, rank 2.0"])
    assert (first["series"].mechanism, first["weights"]) == ("linear", weights)
    assert first["lines"] == ["entropy –, rank 3.5", "top 16 found 50%"]
    assert (second["series"].mechanism, second["keys"]) == ("longformer", [0, 3, 7])
    assert [entry.value.value for entry in panel.content.entries] == [0.375, 0.375]


def test_shades_keep_signs_and_reach_one():
    found = shaded([[0.04, -0.16], [0.0, 0.01]])
    assert found == pytest.approx(np.array([[0.5, -1.0], [0.0, 0.25]]))
    assert not shaded([[0.0, 0.0]]).any()


def test_every_tile_of_a_file_is_drawn(record):
    found = charts(record, {name: block(EXACT) for name in ("linear", "gla", "performer", "rwkv6", "mesa")})
    (panel,) = found["attention-maps"].panels
    axes = Figure().add_axes((0, 0, 1, 1))
    panel.content.draw(axes)
    assert len(axes.images) == 6
    assert panel.height > charts(record, {"gla": block(EXACT)})["attention-maps"].panels[0].height


def test_records_without_values_have_no_such_figures(record):
    bare = block(values=(), output_singular_values=[], attention=None)
    assert not any(chart.panels for chart in charts(record, {"linear": bare, "gla": None}).values())
