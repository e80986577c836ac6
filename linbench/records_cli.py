"""The verbs that only read records: report, compare, advise, export. Never a device, never torch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from linbench.errors import UsageError
from linbench.verbs import VERBS, Parser

if TYPE_CHECKING:
    from linbench.record import Frontier, Record, Run


def report(argv: list[str]) -> int:
    """Records → report."""
    from linbench.store import read_all, read_frontiers, results_files

    parser = Parser(prog="linbench report", description=VERBS["report"])
    parser.add_argument("paths", nargs="*", default=["results"], help="results files or folders (default: results)")
    parser.add_argument("--output", help="folder to write (default: all.report, beside the results)")
    parser.add_argument("--title", help="heading of the page")
    options = parser.parse_args(argv)
    gc.disable()  # this process ends with the page, and looking for garbage among its records takes as long as they do
    paths = [Path(path) for path in options.paths]
    beside = paths[0] if paths[0].is_dir() else paths[0].parent
    folder = Path(options.output) if options.output else beside / "all.report"
    files = results_files(paths)
    runs, records = read_all(files)
    frontiers = read_frontiers(files)
    page = write_page(runs, records, frontiers, folder, options.title or f"linbench: {', '.join(options.paths)}")
    print(f"{tally(records)}{f'; {len(frontiers)} frontiers' if frontiers else ''}. Report: {page}")
    return 0


def compare(argv: list[str]) -> int:
    """Records, twice → what differs."""
    from linbench.comparing import compare_all

    parser = Parser(prog="linbench compare", description=VERBS["compare"])
    meant = "a results file or folder, the name of a run, a commit (7 digits at least) or a machine"
    parser.add_argument("first", metavar="A", help=meant)
    parser.add_argument("second", metavar="B", help="the same; its times are shown over those of A")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs, commits and machines lie")
    parser.add_argument("--force", action="store_true", help="compare other devices or timers all the same")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    return compare_all(options.first, options.second, options.results, force=options.force, as_json=options.json)


def advise(argv: list[str]) -> int:
    """Records and bounds → the mechanism to take."""
    from linbench.advise import Asked, read_bytes
    from linbench.advise import advise as answer
    from linbench.advise_table import show
    from linbench.hydra_front import options as choices
    from linbench.report.points import make_points
    from linbench.store import read_all, results_files

    parser = Parser(prog="linbench advise", description=VERBS["advise"])
    parser.add_argument("paths", nargs="*", default=["results"], help="results files or folders (default: results)")
    parser.add_argument("--length", type=int, help="tokens (default: a table over all that were measured)")
    parser.add_argument("--causal", action="store_true", help="tokens see only earlier ones")
    passes = ["forward", "backward", "forward_backward", "prefill", "decode"]
    parser.add_argument("--pass", dest="pass_", default="forward", choices=passes)
    for name, words in {"device": "cpu or cuda", "machine": "a folder of results/", "dtype": "as bfloat16"}.items():
        parser.add_argument(f"--{name}", help=words)
    for name in ("batch", "heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max-error", type=float, help="relative error on the worst family of inputs, as 0.1")
    parser.add_argument("--max-memory", type=read_bytes, help="peak beyond the inputs, as 2GiB")
    found = vars(parser.parse_args(argv))
    paths, found["max_memory_bytes"] = found.pop("paths"), found.pop("max_memory")
    runs, records = read_all(results_files([Path(path) for path in paths]))
    points = make_points(records, runs)
    show(answer(points, Asked(**found), choices("mechanism")), points)
    return 0


def export(argv: list[str]) -> int:
    """Records → a file for another tool."""
    from linbench.export import FORMATS, export
    from linbench.store import read_all, results_files

    parser = Parser(prog="linbench export", description=VERBS["export"])
    parser.add_argument("paths", nargs="*", default=["results"], help="results files or folders (default: results)")
    parser.add_argument("--output", type=Path, required=True, help="file to write; a folder for asv")
    told = "; ".join(f"{name}: {words}" for name, (_, words) in FORMATS.items())
    parser.add_argument("--format", help=f"{told} (default: by the suffix .csv, .parquet, .tex)".replace("%", "%%"))
    options = parser.parse_args(argv)
    runs, records = read_all(results_files([Path(path) for path in options.paths]))
    form = export(records, runs, options.output, options.format)
    print(f"{tally(records)}. Written as {form}: {options.output}")
    return 0


def tally(records: Sequence[Record]) -> str:
    """How many cells there are of each status."""
    counts: dict[str, int] = {}
    for record in records:
        counts[str(record.best_status)] = counts.get(str(record.best_status), 0) + 1
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(records)} cells: {parts}"


def write_page(
    runs: Sequence[Run], records: Sequence[Record], frontiers: Sequence[Frontier], folder: Path, title: str
) -> Path:
    """The report of records; a folder that cannot be written is told as bad input."""
    from linbench.report.page import write_report

    try:
        return write_report(records, runs, folder, title, frontiers)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {folder}: {error.strerror or error}") from error
