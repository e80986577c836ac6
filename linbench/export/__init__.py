"""``linbench export``: records in the forms that other tools read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from linbench.errors import UsageError
from linbench.export import asv, bencher, frame, latex, pytest_benchmark
from linbench.record import Record, Run

Writer = Callable[[Sequence[Record], Sequence[Run], Path], None]
FORMATS: dict[str, tuple[Writer, str]] = {
    "csv": (frame.write_csv, "one line for every cell"),
    "parquet": (frame.write_parquet, "the same with types, for pandas, polars, DuckDB; needs pyarrow"),
    "latex": (latex.write, "a table (booktabs, graphicx) of times, memory and errors for every setting"),
    "pytest-benchmark": (pytest_benchmark.write, "JSON that `pytest-benchmark compare` reads"),
    "asv": (asv.write, "a results folder of airspeed velocity, one file for every machine and commit"),
    "bencher": (bencher.write, "Bencher Metric Format: `bencher run --adapter json --file`"),
}
SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".tex": "latex"}


def export(records: Sequence[Record], runs: Sequence[Run], path: Path, form: str | None = None) -> str:
    """Write records to a file, or a folder for ``asv``.

    Args:
        form: one of ``FORMATS``; None for what the suffix of ``path`` says.

    Returns:
        the form that was written.

    Raises:
        UsageError: no such form, nothing that it could hold, a package that it needs is missing, or the file cannot be
            written.
    """
    form = form or SUFFIXES.get(path.suffix)
    if form is None:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"export: {path} has none of the suffixes {known}; choose with --format {', '.join(FORMATS)}")
    if form not in FORMATS:
        raise UsageError(f"export: no format '{form}'; choose from {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[form][0](records, runs, path)
    except OSError as error:
        raise UsageError(f"export: {path} cannot be written: {error.strerror or error}") from error
    return form
