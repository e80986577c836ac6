"""Reports of very many records: what scripts/report_scale writes are records, and their memory is bounded."""

import importlib
import sys
from pathlib import Path

import pytest

from linbench.store import read_all, results_files

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
scale = importlib.import_module("report_scale")


def test_the_records_of_the_script_are_cells_of_their_own(tmp_path):
    scale.write(tmp_path, 900)
    runs, records = read_all(results_files([tmp_path]))
    assert (len(runs), len(records)) == (scale.MACHINES, 900)
    places = {(record.run, record.cell.dtype, record.cell.pass_, record.cell.key) for record in records}
    assert len(places) == 900


@pytest.mark.slow
def test_a_hundred_thousand_records_would_fit_into_two_gibibytes(tmp_path):
    peaks = {}
    for records in (2_000, 12_000):
        scale.write(tmp_path / str(records) / "results", records)
        peaks[records] = scale.report(tmp_path / str(records))["peak_bytes"]
    each = (peaks[12_000] - peaks[2_000]) / 10_000
    assert peaks[2_000] + 98_000 * each < scale.LIMIT_BYTES
