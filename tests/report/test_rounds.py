"""Rounds: drift is named where there is one, and a time that launches decide is marked."""

import numpy as np
import pytest

from linbench.record import Round, Status
from linbench.report.page import write_report
from linbench.report.points import make_points
from linbench.report.rounds import rounds_section, sentence, shift, shifts, within

NAMES = ("softmax", "linear", "linformer", "performer", "longformer", "retnet", "gla", "based")


def timed_again(first, factors, status=Status.OK, **speed):
    """The record with one more round for each factor."""
    rounds = [
        Round(
            run=first.run,
            time=first.time,
            cell_key=first.cell.key,
            code=first.code,
            index=index,
            order=0,
            status=status,
            reason=None if status is Status.OK else "others",
            elapsed_s=0.1,
            speed=first.speed.model_copy(
                update={"samples_ms": [factor * sample for sample in first.speed.samples_ms], **speed}
            ),
        )
        for index, factor in enumerate(factors, 1)
    ]
    return first.model_copy(update={"rounds": rounds})


def scattered(record, drift, seed=3):
    """Eight cells whose second and third rounds lie apart by chance, the third shifted by ``drift``."""
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.005, size=(len(NAMES), 2)))
    return [
        timed_again(record(name, ms=1.0 + place), [one, drift * two])
        for place, (name, (one, two)) in enumerate(zip(NAMES, noise, strict=True))
    ]


def test_a_round_that_is_slower_everywhere_is_a_drift_and_a_scattered_one_is_none(record):
    found = shifts(scattered(record, 1.06))
    assert [index for index, one in found.items() if one.drifts] == [2]
    assert found[2].low < 1.06 < found[2].high
    assert not any(one.drifts for one in shifts(scattered(record, 1.0)).values())


def test_a_shift_too_small_to_name_is_no_drift():
    assert not shift([1.004, 1.0041, 1.0039, 1.004]).drifts
    assert shift([1.0]) is None


def test_the_section_tells_ratios_and_what_was_set_aside(record):
    records = scattered(record, 1.06)
    records[0] = timed_again(record("softmax", ms=1.0), [1.0, 1.06], discarded_rounds=2)
    (grid,) = rounds_section(make_points(records, [])).grids
    assert [row[0] for row in grid.rows] == [
        "Round 1",
        "Round 2 over round 1",
        "Round 3 over round 1",
        "Second half of a process over its first",
    ]
    assert grid.rows[2][1].startswith("1.06")
    assert [row[4] for row in grid.rows] == ["", "no", "yes", "no"]
    assert [row[5] for row in grid.rows] == ["0", "2", "2", ""]
    assert sentence(records).endswith("(drift in round 3).")


def test_without_a_second_round_there_is_nothing_to_say(record):
    plain = [record(name) for name in NAMES]
    assert rounds_section(make_points(plain, [])) is None
    assert sentence(plain) is None


def test_samples_that_rise_inside_a_process_are_seen(record):
    rising = [record(name, ms=[1.0 + 0.01 * i for i in range(20)]).speed for name in NAMES]
    assert within(rising).drifts
    assert not within([record(name).speed for name in NAMES]).drifts
    assert within([record("linear", ms=[1.0] * 4).speed]) is None


def test_a_noisy_record_counts_as_its_quiet_round(record):
    noisy = timed_again(record(ms=9, status="noisy"), [1 / 9])
    (point,) = make_points([noisy], []).pooled
    assert (point.status, point.reason) == (Status.OK, "")
    assert point.latency_ms.value == pytest.approx(1, rel=0.01)


def test_cells_of_one_server_are_one_observation(record):
    """Two families in three rounds are three observations, not six."""
    records = [timed_again(record(inputs=name, ms=2.0), [1.1, 0.9]) for name in ("gaussian", "local")]
    (point,) = make_points(records, []).pooled
    assert [len(samples) for samples in point.samples_ms] == [40, 40, 40]


@pytest.mark.parametrize(("graph", "bound"), [([0.5, 0.6], True), ([0.9, 0.95], False), ([], False)])
def test_a_cell_is_launch_bound_where_kernels_run_too_small_a_part_of_its_time(record, graph, bound):
    plain = record("linear", ms=[0.97] * 12)
    speed = plain.speed.model_copy(update={"host_ms": [1.0, 1.01, 0.99], "graph_ms": graph})
    (point,) = make_points([plain.model_copy(update={"speed": speed})], []).pooled
    assert point.launch_bound is bound
    (on_cpu,) = make_points([plain], []).pooled
    assert (on_cpu.launch_overhead, on_cpu.launch_bound) == (None, False)


def test_both_pages_have_the_section(record, run, tmp_path):
    write_report(scattered(record, 1.0), [run()], tmp_path, "title")
    for name in ("index.html", "report.md"):
        assert "Do the rounds agree?" in (tmp_path / name).read_text()
