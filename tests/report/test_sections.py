"""Growth, targets, fits, ranks and papers: right numbers where there are any, no section where there are none."""

import math

import pytest

from linbench.record import AttentionMap, ColdStart, Cost, Fit, Kernel, Structure
from linbench.report.frame import records_frame
from linbench.report.growth import claimed_exponent, fitted_exponent, growth_section
from linbench.report.page import write_report
from linbench.report.papers import PAPERS, paper_sections
from linbench.report.points import make_points
from linbench.report.sections import (
    cold_start_section,
    fit_section,
    kept_section,
    map_section,
    rank_section,
    target_section,
)

FIT = Fit(
    protocol=2, steps=3, selected_step=2, learning_rate=0.1, parameters=1234, own_parameters=5,
    first_loss=1.0, last_loss=0.5, initial_error=0.5, initial_skill=0.25,
    fitted_error=0.125, fitted_skill=0.875, trivial_error=1.0,
)  # fmt: skip
STRUCTURE = Structure(
    protocol=1, rows=9, rows_total=9, largest_rank=8, output_effective_rank=2.5, output_numerical_rank=3.0,
    exact_effective_rank=7.5, exact_numerical_rank=8.0,
)  # fmt: skip


def points(records, runs=()):
    return make_points(records, list(runs))


def test_exponent_of_a_power_is_its_power():
    lengths = [64, 1024, 2048, 4096, 8192, 16384]
    found = fitted_exponent(lengths, [3e-9 * n**1.5 for n in lengths])
    assert found.value == pytest.approx(1.5)
    assert (found.low, found.high) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (found.first, found.last) == (1024, 16384)  # 64 is too far below the longest


def test_no_exponent_of_two_lengths_or_of_nothing_used():
    assert fitted_exponent([1024, 2048], [1.0, 2.0]) is None
    assert fitted_exponent([1024, 2048, 4096], [0.0, 1.0, 2.0]) is None


def test_n_log_n_claims_a_little_more_than_one():
    expected = math.log(4096 * math.log(4096) / (1024 * math.log(1024))) / math.log(4)
    assert claimed_exponent("N log N", 1024, 4096) == pytest.approx(expected)
    assert claimed_exponent("N^2", 1024, 4096) == 2


def test_growth_stands_beside_its_claim(record):
    cost = Cost(flops=1, min_bytes=1, claimed_time="N log N", claimed_memory="N")
    records = [
        record("hyena", n, ms=n * 1e-3, increment_bytes=4 * n).model_copy(update={"cost": cost})
        for n in (1024, 2048, 4096, 8192)
    ]
    (grid,) = growth_section(points(records)).grids
    (row,) = grid.rows
    assert row[0] == "hyena"
    assert row[2].startswith("1.00 [")
    assert row[3].startswith("N log N (1.1")
    assert row[4:] == ["1.00 [1.00, 1.00]", "N", "1k to 8k"]


def test_sections_show_their_blocks_and_are_absent_without_them(record):
    plain = record("linear", 64)
    for section in (growth_section, target_section, fit_section, rank_section, map_section):
        assert section(points([plain])) is None
    assert paper_sections(points([plain])) == []
    error = plain.error.model_copy(update={"target_error": 0.2, "target_trivial_error": 0.8})
    full = plain.model_copy(update={"fit": FIT, "structure": STRUCTURE, "error": error})
    fitted = ["linear", "0.500", "0.125", "0.250", "0.875", "1,234"]
    assert fit_section(points([full])).grids[0].rows == [[*fitted, "2 of 3"]]
    of_protocol_1 = full.model_copy(update={"fit": FIT.model_copy(update={"selected_step": None})})
    assert fit_section(points([of_protocol_1])).grids[0].rows == [[*fitted, "3 of 3"]]
    assert rank_section(points([full])).grids[0].rows == [["linear", "2.5", "3.0", "7.5", "8.0", "8"]]
    assert target_section(points([full])).grids[0].rows == [["linear", "0.200", "0.750", "0.300"]]


def test_memory_that_is_kept_stands_beside_that_of_a_call(record):
    plain = record("linear", 64, increment_bytes=2**20)
    assert kept_section(points([plain])) is None
    kept = {"saved_for_backward_bytes": 3 * 2**20, "state_bytes": 512, "state_tokens": 64, "total_peak_bytes": 2**30}
    full = plain.model_copy(update={"memory": plain.memory.model_copy(update=kept)})
    row = ["linear", "1 MiB", "3 MiB", "512 B at 64", "1 GiB", "–", "–"]
    assert kept_section(points([full])).grids[0].rows == [row]
    frame = records_frame([plain, full], [])
    assert frame["memory_saved_for_backward_bytes"].tolist()[1] == 3 * 2**20
    assert frame["memory_state_tokens"].isna().tolist() == [True, False]


def test_stages_of_a_cold_start_are_medians_over_its_processes(record):
    plain = record("linear", 64)
    assert cold_start_section(points([plain])) is None
    block = ColdStart(
        interpreter_ms=[9, 20, 30], import_torch_ms=[900, 1000, 5000], import_mechanism_ms=[1, 2, 3],
        build_ms=[4, 5, 6], first_call_ms=[70, 80, 90], steady_calls_ms=[[8, 1], [9, 1], [7, 30]],
        compile_ms=[65, 75, 71], compiler_cache=["empty", "filled", "filled"],
    )  # fmt: skip
    full = plain.model_copy(update={"cold_start": block})
    row = ["20.0 ms", "1.00 s", "2.00 ms", "–", "5.00 ms", "80.0 ms", "7.50 ms", "71.0 ms", "–"]
    assert cold_start_section(points([full])).grids[0].rows == [["linear", *row, "empty, filled, filled", "3"]]
    frame = records_frame([plain, full], [])
    assert frame["cold_start_steady_call_ms"].tolist()[1] == 7.5
    assert frame["cold_start_first_call_ms"].isna().tolist() == [True, False]


def test_maps_stand_beside_those_of_softmax_and_reasons_below_them(record):
    block = AttentionMap(
        rows=9, rows_total=9, per_channel=False, residual=0.0, row_sum_mean=1.0, row_sum_min=0.5, row_sum_max=1.5,
        negative_mass=0.25, exact_entropy_nats=2.0, total_variation=0.75, top=4, top_overlap=0.5, effective_rank=3.0,
        numerical_rank=4.0, exact_effective_rank=6.0, exact_numerical_rank=7.0, distance_tokens=12.4,
        exact_distance_tokens=20.6,
    )  # fmt: skip
    found = record("linear", 64).model_copy(update={"structure": STRUCTURE.model_copy(update={"attention": block})})
    lacking = record("galerkin", 64).model_copy(
        update={"structure": STRUCTURE.model_copy(update={"attention_reason": "it is not linear in v"})}
    )
    section = map_section(points([found, lacking]))
    assert section.grids[0].rows == [
        ["linear", "– (2.00)", "0.75", "–", "50%", "0.5 … 1.5", "25.0%", "3.0 (6.0)", "12 (21)"]
    ]
    assert section.notes[-1] == "Without a map: galerkin (it is not linear in v)."


def paper_records(record):
    def run(name):
        return {"run": f"20260101T000000Z-{name}-0000"}

    speed = [
        record("softmax", 2048, ms=26.0, **run("paper_linformer")),
        record(
            "linformer", 2048, ms=10.0, increment_bytes=100, hyperparameters={"rank": 128}, **run("paper_linformer")
        ),
        record("softmax", 2048, implementation="math", increment_bytes=610, **run("paper_linformer")),
        record("softmax", 512, ms=8.0, **run("paper_nystrom")),
        record("nystrom", 512, ms=7.0, hyperparameters={"landmarks": 64}, **run("paper_nystrom")),
    ]
    kernel = Kernel(protocol=1, pairs=3, draws=4, relative_mse=0.01, expected_relative_mse=0.02)
    variant = {"features": 16, "kernel": "positive", "orthogonal": True}
    performer = record("performer", 64, hyperparameters=variant, **run("paper_performer"))
    reformer = record("reformer", 64, hyperparameters={"rounds": 4}, **run("paper_reformer"))
    error = reformer.error.model_copy(update={"target_error": 0.25, "target_trivial_error": 0.8})
    return [
        *speed,
        performer.model_copy(update={"kernel": kernel}),
        reformer.model_copy(update={"error": error}),
        record("based", 64, hyperparameters={"order": 2}, **run("paper_based")),
        record("rala", 64, **run("paper_rala")).model_copy(update={"structure": STRUCTURE}),
    ]


def test_ours_stands_beside_what_the_paper_printed(record):
    sections = {section.slug: section for section in paper_sections(points(paper_records(record)))}
    assert set(sections) == {paper.sweep for paper in PAPERS}
    assert sections["paper_linformer"].grids[0].rows == [["2k", "2.60× / 2.60×"]]
    assert sections["paper_linformer"].grids[1].rows == [["2k", "6.10× / 6.10×"]]
    assert sections["paper_nystrom"].grids[0].rows[0][3] == "0.875× / 0.875×"
    assert sections["paper_performer"].grids[1].rows == [["16", "0.0100 / 0.0200"]]
    assert sections["paper_reformer"].grids[0].rows == [["4", "0.250", "92.5 %", "99.9 %", "99.9 %", "99.6 %"]]
    assert sections["paper_based"].grids[0].rows == [["2", "0.300"]]
    assert sections["paper_rala"].grids[0].rows[0][2:4] == ["2.5", "3.0"]


def test_both_pages_carry_the_sections(record, tmp_path):
    folder = write_report(paper_records(record), [], tmp_path, "papers").parent
    for name in ("index.html", "report.md"):
        text = (folder / name).read_text()
        for paper in PAPERS:
            assert paper.heading in text
        assert "2.60× / 2.60×" in text
