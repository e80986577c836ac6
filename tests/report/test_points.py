import pandas as pd
import pytest

from linbench.record import Cost, Peaks, Status
from linbench.report.frame import records_frame
from linbench.report.names import series_names, setting_names
from linbench.report.pareto import common_length, front
from linbench.report.points import make_points
from linbench.report.style import COLOURS, KNOWN, make_styles, mechanism_marks


def test_families_and_seeds_are_pooled_for_speed_but_not_for_error(record):
    records = [
        record("linear", inputs=inputs, seed=seed, ms=ms, relative_error=wrong)
        for inputs, seed, ms, wrong in (("gaussian", 0, 1, 0.2), ("gaussian", 1, 3, 0.4), ("needle", 0, 2, 0.9))
    ]
    points = make_points(records, [])
    (pooled,) = points.pooled
    assert pooled.latency_ms.value == pytest.approx(2, rel=1e-2)
    errors = {point.inputs: point.relative_error for point in points.by_inputs}
    assert errors["gaussian"].value == pytest.approx(0.3)
    assert (errors["gaussian"].low, errors["gaussian"].high) == (0.2, 0.4)
    assert errors["needle"].value == 0.9


def test_noisy_records_count_only_where_there_are_no_better_ones(record):
    noisy = record(ms=9, status="noisy", seed=1)
    (alone,) = make_points([noisy], []).pooled
    assert (alone.status, alone.latency_ms.value) == (Status.NOISY, pytest.approx(9, rel=0.01))
    (both,) = make_points([noisy, record(ms=1)], []).pooled
    assert (both.status, both.latency_ms.value) == (Status.OK, pytest.approx(1, rel=0.01))


def test_newer_code_supersedes_older_records_of_the_same_cell_only(record):
    old = record(ms=1, code="old", time="2026-01-01")
    other = record("linear", code="old", time="2026-01-01")
    new = record(ms=5, code="new", time="2026-02-01")
    points = make_points([new, old, other], [])
    assert points.superseded == (old,)
    assert sorted(point.latency_ms.value for point in points.pooled)[1] == pytest.approx(5, rel=0.01)


def test_machines_are_different_settings(record, run):
    runs = [run("a", "xeon-2"), run("b", "epyc-64")]
    points = make_points([record(run="a"), record(run="b")], runs)
    names = setting_names(points.settings)
    assert sorted(names.values()) == [
        "epyc-64, cpu, float32, non-causal, forward",
        "xeon-2, cpu, float32, non-causal, forward",
    ]


def test_series_are_named_by_what_differs(record):
    records = [record("performer", hyperparameters={"features": f, "kind": "elu"}) for f in (64, 256)]
    records += [record("softmax", implementation=name) for name in ("torch", "sdpa")] + [record("linear")]
    names = series_names(make_points(records, []).series)
    found = [name.replace("\u00a0", " ") for name in names.values()]
    assert found == ["softmax · sdpa", "softmax · torch", "linear", "performer(features=64)", "performer(features=256)"]


def test_mechanism_keeps_its_colour_whatever_else_is_in_the_report():
    few, many = mechanism_marks(["performer"]), mechanism_marks(["performer", "softmax", "abc", "zzz"])
    assert few["performer"] == many["performer"]
    assert many["abc"] == mechanism_marks(["abc"])["abc"]


def test_forty_mechanisms_look_different():
    marks = mechanism_marks([*KNOWN, *(f"plug{index}" for index in range(40))])
    assert len(set(marks.values())) == len(marks) == 46
    assert {colour for colour, _ in marks.values()} > set(COLOURS)


def test_variants_share_the_colour_and_look_different(record):
    records = [
        record("performer", hyperparameters={"features": features}, implementation=implementation)
        for features in range(8, 16)
        for implementation in ("torch", "triton")
    ]
    styles = make_styles(make_points(records, []).series)
    assert len({(style.colour, style.marker) for style in styles.values()}) == 1
    assert len(set(styles.values())) >= 14


def test_front_holds_what_nothing_beats_on_both_and_no_distance(record):
    records = [
        record(name, ms=ms, relative_error=wrong, reading=reading)
        for name, ms, wrong, reading in (
            ("fast", 1, 0.9, "error"),
            ("middle", 2, 0.5, "error"),
            ("beaten", 3, 0.6, "error"),
            ("softmax", 9, 0.0, "error"),
            ("other", 0.1, 0.1, "distance"),
        )
    ]
    points = make_points(records, []).by_inputs
    assert [point.series.mechanism for point in front(points, lambda point: point.latency_ms)] == [
        "fast",
        "middle",
        "softmax",
    ]


def test_common_length_is_the_longest_that_most_series_have(record):
    records = [
        record(name, n) for name, lengths in (("a", (1, 2, 4)), ("b", (1, 2)), ("c", (1, 2, 4, 8))) for n in lengths
    ]
    assert common_length(make_points(records, []).pooled) == 2


def test_frame_has_a_row_for_each_record_failures_included(sweep, run):
    records = sweep()
    frame = records_frame(records, [run()])
    assert len(frame) == len(records)
    assert list(frame["status"]) == [record.status for record in records]
    assert frame.loc[frame["status"] == "ok", "latency_ms"].notna().all()
    assert frame.loc[frame["status"] == "timeout", "latency_ms"].isna().all()
    assert set(frame["machine"]) == {"xeon-2"}


def test_parameters_that_are_not_set_are_not_named(record):
    (setting,) = make_points([record(device_parameters={"threads": 2, "memory_limit_bytes": None})], []).settings
    assert setting.device == "cpu(threads=2)"


def test_the_table_has_the_floor_and_the_share_of_each_record(record, run):
    peaks = Peaks(
        threads=1,
        copy_bytes_per_s={"65536": 1e10},
        product_flops_per_s={"float32": 1e11},
        product_shapes={},
        method="by hand",
    )
    timed = record(ms=[4.0, 5.0, 6.0]).model_copy(update={"cost": Cost(flops=10**8, min_bytes=10)})
    frame = records_frame([timed, record("linear")], [run(peaks={"cpu": peaks})])
    known, unknown = frame[["roofline_floor_ms", "roofline_bound", "roofline_share"]].to_dict("records")
    assert known == {"roofline_floor_ms": pytest.approx(1.0), "roofline_bound": "flops", "roofline_share": 0.2}
    assert pd.isna(list(unknown.values())).all()


def test_a_point_has_the_share_of_its_median_record(record, run):
    peaks = {
        "threads": 1,
        "copy_bytes_per_s": {"65536": 1e10},
        "product_flops_per_s": {"float32": 1e11},
        "product_shapes": {},
        "method": "by hand",
    }
    cost = {"cost": Cost(flops=10**8, min_bytes=10)}
    records = [record(ms=[ms] * 3, seed=seed).model_copy(update=cost) for seed, ms in enumerate((2.0, 10.0, 5.0))]
    records.append(record(ms=[1.0] * 3, seed=9, run="old").model_copy(update=cost))  # its run has no peaks
    points = make_points(records, [run(peaks={"cpu": peaks}), run("old")])
    (point,) = points.pooled
    assert point.roofline(points.environments).share == pytest.approx(0.2)
    assert point.roofline({}) is None
