import json
import re
from html.parser import HTMLParser

import pytest

from linbench.record import Cost, Peaks
from linbench.report.league import make_leagues
from linbench.report.page import write_report
from linbench.report.points import make_points
from linbench.report.style import PAPER, VARIABLES, mechanism_marks
from linbench.report.units import latency


@pytest.fixture
def written(tmp_path, run):
    """Writes a report of the records given and returns its page and its Markdown."""

    def write(records, runs=None, title="A title"):
        path = write_report(records, [run()] if runs is None else runs, tmp_path / "report", title)
        assert path == tmp_path / "report" / "index.html"
        assert not list(path.parent.glob(".report-*"))
        markdown = (path.parent / "report.md").read_text(encoding="utf-8")
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown):
            assert (path.parent / picture).stat().st_size > 1000
        return path.read_text(encoding="utf-8"), markdown

    return write


def payload(page):
    """What the page's script is given."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Balanced(HTMLParser):
    """Fails on a closing tag without its opening one, and collects ids and references."""

    VOID = frozenset({"meta", "br", "link", "hr", "img", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, _tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(written, sweep):
    page, _ = written(sweep())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith("#") for link in parser.links)
    assert {link.removeprefix("#") for link in parser.links} <= set(parser.ids)
    assert "http" not in page.replace("http-equiv", "")
    assert len(page) < 3e6


def test_a_policy_of_the_page_forbids_every_request(written, record):
    page, _ = written([record()])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    sources = {source for part in policy.split("; ")[1:] for source in part.split()[1:]}
    assert sources == {"'unsafe-inline'", "data:", "blob:"}


def test_every_measured_cell_is_in_the_page_and_in_markdown(written, sweep):
    records = sweep(lengths=(1024, 4096, 16384))
    page, markdown = written(records)
    medians = [latency(point.latency_ms) for point in make_points(records, []).by_inputs if point.latency_ms]
    assert len(medians) > 20
    for median in medians:
        assert median in page
        assert median.replace("[", "\\[").replace("]", "\\]") in markdown


def test_every_failure_appears_with_its_reason(written, sweep):
    records = sweep()
    page, markdown = written(records)
    failures = page[page.index('id="failures"') : page.index('id="runs"')]
    for record in records:
        if record.status != "ok":
            assert record.reason in failures
    counted = [int(count) for count in re.findall(r", (\d+) records? \(", failures)]
    assert sum(counted) == sum(record.status != "ok" for record in records) > 0
    assert "linformer has no causal form" in markdown


def test_crossover_of_constructed_data_is_stated(written, record):
    records = [record("softmax", n, ms=n / 1024) for n in (1024, 2048, 4096)]
    records += [record("linear", n, ms=3) for n in (1024, 2048, 4096)]
    page, markdown = written(records)
    assert "Passes exact softmax between 2k and 4k: linear." in page
    assert "Passes exact softmax between 2k and 4k: linear." in markdown
    assert "Fastest: softmax at 1k to 2k and linear at 4k." in page


def test_what_records_say_is_escaped(written, record):
    nasty = "<script>alert(1)</script> | `code` $x$ *b*"
    records = [record("linear", status="crash", reason=nasty), record("<b>bold|$\\alpha$", ms=1)]
    page, markdown = written(records, title="<i>title</i>")
    assert page.count("<script") == 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>bold" not in page
    assert "<i>title" not in page + markdown
    assert "<script" not in markdown
    assert "\\| \\`code\\`" in markdown


def test_mechanism_has_one_colour_in_every_figure_and_table(written, sweep):
    page, _ = written(sweep(masks=(False,), lengths=(1024, 2048, 4096)))
    series = payload(page)["series"]
    marks = mechanism_marks(one["mechanism"] for one in series)
    for number, one in enumerate(series):
        colour, _marker = marks[one["mechanism"]]
        assert one["colour"] == VARIABLES[colour]
        symbol = re.search(rf'<symbol id="s{number}".*?</symbol>', page)[0]
        assert set(re.findall(r"--c\d+", symbol)) == {one["colour"], VARIABLES[PAPER]}


def test_every_number_of_a_figure_names_its_record(written, sweep):
    records = sweep(lengths=(1024, 4096))
    page, _ = written(records)
    data = payload(page)
    known = {f"{record.run}/{record.cell.key}": record for record in records}
    for chart in data["charts"]:
        for panel in chart["panels"]:
            for series, length, *_, record, count in panel["entries"]:
                cell = known[data["records"][record]].cell
                assert (cell.mechanism, cell.length, count) == (data["series"][series]["mechanism"], length, 1)


def test_figures_are_files_with_their_numbers(written, sweep, tmp_path):
    page, _ = written(sweep(lengths=(1024, 4096), masks=(False,)))
    for chart in payload(page)["charts"]:
        files = {
            suffix: tmp_path / "report" / "figures" / f"{chart['slug']}.{suffix}" for suffix in ("png", "svg", "csv")
        }
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        assert "<svg" in files["svg"].read_text()
        rows = files["csv"].read_text().splitlines()
        assert len(rows) == 1 + sum(len(panel["entries"]) for panel in chart["panels"])


def test_long_markdown_keeps_one_table_of_each_kind(written, sweep, monkeypatch):
    monkeypatch.setattr("linbench.report.page.MOST_ROWS", 10)
    _, markdown = written(sweep(lengths=(1024, 4096)))
    assert markdown.count("<details") == 2
    assert "Of each only the one at the longest length" in markdown


@pytest.mark.parametrize(
    "status", ["oom", "timeout", "unsupported", "compile_error", "incorrect", "crash", "impossible"]
)
def test_page_where_everything_failed(written, record, status):
    page, _ = written([record(name, status=status) for name in ("softmax", "linear")])
    assert "Nothing was timed here" in page
    assert "Exact softmax attention gave no time here, so there is no crossover." in page
    assert page.count(f"it was {status}") >= 2
    assert payload(page)["charts"] == []


def test_page_of_one_cell(written, record):
    page, _ = written([record("linear", blocks=("speed", "memory", "error"))])
    assert "Exact softmax attention was not measured here" in page
    assert [chart["slug"] for chart in payload(page)["charts"]] == [
        "latency", "throughput", "memory", "error", "skill", "pareto", "memory-error",
    ]  # fmt: skip


def test_page_of_softmax_alone(written, record):
    page, _ = written([record("softmax", n, relative_error=0.0) for n in (64, 100)])
    assert "Only exact softmax attention was measured here" in page


def test_page_of_no_records(written):
    page, _ = written([], runs=[])
    assert "There are no records." in page


@pytest.mark.parametrize("block", ["speed", "memory", "error"])
def test_page_of_one_measure(written, record, block):
    records = [record(name, n, blocks=(block,)) for name in ("softmax", "linear") for n in (1024, 2048)]
    page, _ = written(records)
    expected = {"speed": ["crossover", "latency", "throughput"], "memory": ["memory"], "error": ["error", "skill"]}[
        block
    ]
    assert [chart["slug"] for chart in payload(page)["charts"]] == expected


def test_memory_of_zero_bytes_is_drawn_and_named(written, record):
    page, _ = written([record(name, n, increment_bytes=0) for name in ("softmax", "linear") for n in (1024, 2048)])
    assert "0 B" in page
    assert "lies on the lower edge, at 0" in page


def test_mixed_devices_dtypes_passes_inputs_and_seeds(written, record, run):
    records = [
        record(name, n, run=where, device=device, dtype=dtype, pass_=pass_, inputs=inputs, seed=seed)
        for name in ("softmax", "linear")
        for n in (1024, 2048)
        for where, device, dtype in (("night", "cpu", "float32"), ("day", "cuda", "bfloat16"))
        for pass_ in ("forward", "forward_backward")
        for inputs in ("gaussian", "needle")
        for seed in (0, 1)
    ]
    page, _ = written(records, [run("night", "xeon-2"), run("day", "h200")])
    assert "xeon-2, cpu, float32, non-causal, forward + backward" in page
    assert "h200, cuda, bfloat16, non-causal, forward: needle" in page
    headings = [league["heading"] for league in payload(page)["leagues"]]
    assert headings.count("xeon-2, cpu, float32, non-causal, forward, gaussian inputs") == 1


def test_best_of_a_column_is_bold_and_a_distance_wins_no_prize_for_accuracy(record):
    records = [
        record("linear", ms=1, relative_error=0.1, reading="distance", increment_bytes=9),
        record("performer", ms=2, relative_error=0.4, increment_bytes=5),
        record("linformer", ms=3, relative_error=0.5, increment_bytes=7),
    ]
    (league,) = make_leagues(make_points(records, []))
    rows = {row.variant: row for row in league.tables[0].rows}
    assert rows["linear"].best == {"latency"}
    assert rows["performer"].best == {"memory", "error", "skill"}
    assert rows["linformer"].best == frozenset()


def test_the_share_of_the_roofline_stands_in_every_table_where_a_run_has_peaks(written, record, run):
    peaks = Peaks(
        threads=1,
        copy_bytes_per_s={"65536": 1e10},
        product_flops_per_s={"float32": 1e11},
        product_shapes={},
        method="by hand",
    )
    costs = {"softmax": Cost(flops=10**8, min_bytes=10), "linear": Cost(flops=10, min_bytes=10**6)}
    records = [record(name, ms=4.0).model_copy(update={"cost": cost}) for name, cost in costs.items()]
    records += [record("performer", ms=3.0), record("linformer", status="oom")]
    page, markdown = written(records, [run(peaks={"cpu": peaks})])
    assert "Share of roofline" in markdown
    for text in (page, markdown):
        assert "25 % (flops)" in text
        assert "2.5 % (bytes)" in text
    lines = markdown.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| Mechanism | Implementation"))
    assert {line.count("|") for line in lines[first : first + 6]} == {12}


def test_without_peaks_there_is_no_column_for_the_roofline(written, record):
    page, markdown = written([record("softmax").model_copy(update={"cost": Cost(flops=5, min_bytes=5)})])
    assert "oofline" not in markdown
    assert "roofline" not in [chart["slug"] for chart in payload(page)["charts"]]


def test_few_samples_are_marked_with_a_dagger(record):
    (league,) = make_leagues(make_points([record(ms=[1.0, 1.1, 1.2])], []))
    assert league.tables[0].rows[0].latency == "1.10 ms [1.00, 1.20] †"


def test_superseded_records_and_unknown_runs_are_counted(written, record):
    old = record(ms=7, code="old", time="2026-01-01", run="lost")
    page, _ = written([old, record(ms=1, run="lost")])
    assert "1 older records are left out" in page
    assert "Nothing is known of the environment of: lost." in page


def test_second_report_leaves_no_figure_of_the_first(written, record, tmp_path):
    written([record("softmax"), record("linear")])
    assert (tmp_path / "report" / "figures" / "memory.png").exists()
    written([record("softmax", blocks=("speed",))])
    assert not (tmp_path / "report" / "figures" / "memory.png").exists()


def test_failing_report_leaves_the_one_before_it(written, record, tmp_path, monkeypatch):
    before, _ = written([record("softmax")])
    monkeypatch.setattr("linbench.report.page._html", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written([record("linear")])
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8") == before
