"""The page in a browser: filters, sorting, pointing, keys, downloads, printing; nothing complains, nothing leaves."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
from browser import PROGRAM, Browser

from linbench.record import Peaks
from linbench.report.page import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


@pytest.fixture
def opened(browser, tmp_path, run, monkeypatch):
    """Writes a report, opens its page, and finds nothing to complain of when all is done."""

    def write(records, runs=None, **options):
        # the page draws its figures itself; those of the files take most of the time of a report
        monkeypatch.setattr("linbench.report.page.save_files", lambda *_: None)
        page = write_report(records, [run()] if runs is None else runs, tmp_path / "report", "A title")
        browser.open(page, **options)
        return browser

    yield write
    assert browser.complaints() == []
    assert all(url.startswith("file:///") for url in browser.requests())
    assert len(browser.requests()) == 1


@pytest.fixture
def small(sweep):
    return sweep(lengths=(1024, 2048, 4096, 8192))


def texts(browser, selector):
    return browser.js(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def choose(browser, label, value):
    """Change a filter as a person does."""
    browser.js(
        f"""(() => {{
        const labels = [...document.querySelectorAll(".choice")];
        const choice = labels.find((one) => one.firstChild.textContent === {label!r});
        const select = choice.querySelector("select");
        select.value = [...select.options].find((one) => one.textContent === {value!r}).value;
        select.dispatchEvent(new Event("change"));
    }})()"""
    )


def see(browser, slug):
    """Scroll to a figure and wait until it is drawn."""
    browser.js(f"document.querySelector('[data-chart={slug}]').scrollIntoView()")
    browser.wait(f"document.querySelector('[data-chart={slug}] .plot')?.data?.length > 0")


def test_the_first_screen_has_the_answer_and_the_table(opened, small):
    browser = opened(small)
    assert texts(browser, ".answers h3") == [
        "cpu, float32, non-causal, forward",
        "cpu, float32, causal, forward",
    ]
    assert "On this Intel Xeon (cpu), fp32, non-causal, forward, D = 64" in texts(browser, ".answers section")[0]
    rows = texts(browser, "#leagues details:first-child tbody tr")
    assert len(rows) == 6
    assert browser.js("document.querySelector('#leagues table').getBoundingClientRect().top") < 800


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened, small, width):
    browser = opened(small, width=width)
    for slug in ("crossover", "latency", "pareto", "skill"):
        see(browser, slug)
    assert browser.js("document.documentElement.scrollWidth") == width


def test_a_filter_of_settings_leaves_their_cards_tables_and_panels(opened, small):
    browser = opened(small)
    assert len(texts(browser, "[data-chart=latency] figcaption > span:first-child")) == 2
    choose(browser, "Mask", "causal")
    for selector in (".answers section:not([hidden]) h3", "[data-chart=latency] figcaption > span:first-child"):
        assert texts(browser, selector) == ["cpu, float32, causal, forward"]
    assert texts(browser, "#leagues summary") == ["cpu, float32, causal, forward, gaussian inputs"]
    assert "1 of 2 settings" in texts(browser, "#shown")[0]


def test_device_dtype_pass_and_inputs_are_filters(opened, record):
    records = [
        record(name, 1024, device=device, dtype=dtype, pass_=pass_, inputs=inputs)
        for name in ("softmax", "linear")
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
        for pass_ in ("forward", "forward_backward")
        for inputs in ("gaussian", "needle")
    ]
    browser = opened(records)
    for label, value in (
        ("Device", "cuda"),
        ("Dtype", "bfloat16"),
        ("Pass", "forward + backward"),
        ("Inputs", "needle"),
    ):
        choose(browser, label, value)
    assert texts(browser, "#leagues summary") == ["cuda, bfloat16, non-causal, forward + backward, needle inputs"]
    choose(browser, "Device", "cpu")
    assert "Nothing was run with these filters." in texts(browser, "#leagues")[0]


def test_mechanisms_and_lengths_are_filters(opened, small):
    browser = opened(small)
    see(browser, "latency")
    before = browser.js("document.querySelector('[data-chart=latency] .plot').data.map((one) => one.x.length)")
    browser.js("document.querySelector('.mechanisms input[value=linear]').click()")
    choose(browser, "From", "2k")
    see(browser, "latency")
    after = browser.js("document.querySelector('[data-chart=latency] .plot').data.map((one) => one.x.length)")
    assert (before, after) == ([4] * 6, [3] * 5)
    assert not any(row.startswith("linear") for row in texts(browser, "#leagues details:first-child tbody tr"))
    choose(browser, "Table at", "2k")
    assert "At 2k tokens" in texts(browser, "#leagues details:first-child")[0]
    browser.js("[...document.querySelectorAll('#filters > button')].at(-1).click()")
    assert len(texts(browser, "#leagues details:first-child tbody tr")) == 6


def test_a_heading_sorts_by_value_and_then_the_other_way(opened, sweep):
    browser = opened(sweep(masks=(False,)))
    column = "#leagues tbody td:nth-child(4)"
    button = "document.querySelectorAll('#leagues th button')[3]"
    orders = []
    for _ in range(2):
        browser.js(f"{button}.focus()")
        browser.press("Enter")
        orders.append([text for text in texts(browser, column) if text != "–"])
    factors = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    values = [float(text.split()[0].replace(",", "")) * factors[text.split()[1]] for text in orders[0]]
    assert values == sorted(values)
    assert len(set(values)) > 2
    assert orders[1] == orders[0][::-1]
    assert browser.js(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"


def test_pointing_shows_the_value_its_interval_and_the_record(opened, small):
    browser = opened(small)
    see(browser, "latency")
    place = browser.js(
        """(() => {
        const mark = document.querySelector("[data-chart=latency] .plot .points path").getBoundingClientRect();
        return [mark.x + mark.width / 2, mark.y + mark.height / 2];
    })()"""
    )
    browser.point_at(place[0] - 30, place[1])
    browser.point_at(*place)
    browser.wait("document.querySelector('[data-chart=latency] .hovertext') !== null")
    shown = browser.js("document.querySelector('[data-chart=latency] .hoverlayer').textContent")
    first = min(
        (one for one in small if one.status == "ok"), key=lambda one: (one.cell.mechanism != "softmax", one.time)
    )
    assert "softmax" in shown
    assert "1k tokens: 924 µs [920, 960]" in shown
    assert f"record night/{first.cell.key}" in shown


def test_arrow_keys_read_out_one_point_after_the_other(opened, small):
    browser = opened(small)
    see(browser, "latency")
    browser.js("document.querySelector('[data-chart=latency] .plot').focus()")
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.press(key)
        told += texts(browser, "[data-chart=latency] figure:first-child .readout")
    assert told[0].startswith("softmax; 1k tokens: ")
    assert told[1].startswith("softmax; 2k tokens: ")
    assert told[2].startswith("linear; 2k tokens: ")
    assert "record night/" in told[2]


def test_every_figure_offers_its_csv_png_and_svg(opened, small, tmp_path):
    browser = opened(small)
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(browser.downloads))
    for slug, suffix, start in (
        ("latency", "csv", b"panel,"),
        ("error", "png", b"\x89PNG"),
        ("pareto", "svg", b"<svg"),
    ):
        index = ("csv", "png", "svg").index(suffix)
        browser.js(
            f"document.querySelectorAll('[data-chart={slug}] figure:first-child .files button')[{index}].click()"
        )
        found = _downloaded(browser.downloads, f"{slug}-*.{suffix}")
        assert found.read_bytes().startswith(start)
    for figure in browser.js(
        "[...document.querySelectorAll('figure')].map((one) => one.querySelectorAll('.files button').length)"
    ):
        assert figure == 3
    (of_page,) = browser.downloads.glob("latency-*.csv")
    with (tmp_path / "report" / "figures" / "latency.csv").open(newline="") as file:
        expected = [row for row in csv.reader(file) if row[0] in ("panel", "cpu, float32, non-causal, forward")]
    with of_page.open(newline="") as file:
        assert _numbers(csv.reader(file)) == _numbers(expected)


def _downloaded(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := [path for path in folder.glob(pattern) if path.stat().st_size]):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)
    return found[0]


def _numbers(rows):
    """Rows whose numbers are equal however they are written."""
    return [
        [float(cell) if cell.replace(".", "").replace("e-", "").isdigit() else cell for cell in row] for row in rows
    ]


def test_colours_follow_the_scheme_of_the_reader(opened, small):
    browser = opened(small, dark=True)
    see(browser, "latency")
    dark = browser.js("document.querySelector('[data-chart=latency] .plot').data[0].line.color")
    browser.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.wait(f"document.querySelector('[data-chart=latency] .plot').data[0].line.color !== {dark!r}")


def test_paper_has_every_figure_and_no_controls(opened, small):
    browser = opened(small)
    browser.js("dispatchEvent(new Event('beforeprint'))")
    browser.call("Emulation.setEmulatedMedia", media="print")
    drawn = browser.js("[...document.querySelectorAll('figure .plot')].map((one) => Boolean(one.data))")
    assert len(drawn) > 10
    assert all(drawn)
    assert browser.js("getComputedStyle(document.getElementById('filters')).display") == "none"
    assert browser.js("[...document.querySelectorAll('#leagues details')].every((one) => one.querySelector('table'))")


def test_a_run_full_of_failures_says_so(opened, record):
    statuses = ("oom", "timeout", "crash", "incorrect", "unsupported", "compile_error", "impossible")
    records = [
        record(name, 1024 * 2**i, status=status) for name in ("softmax", "linear") for i, status in enumerate(statuses)
    ]
    browser = opened(records)
    assert "Nothing was timed here" in texts(browser, ".answers")[0]
    assert all("it was" in row for row in texts(browser, "#leagues tbody tr"))
    assert texts(browser, "figure") == []


def test_one_cell_makes_a_page(opened, record):
    browser = opened([record("linear")])
    assert len(texts(browser, "#leagues tbody tr")) == 1
    see(browser, "latency")


def test_no_record_at_all_makes_a_page(opened):
    assert "There are no records." in texts(opened([], runs=[]), "header")[0]


def test_text_of_records_is_shown_as_it_is(opened, record):
    nasty = "<img src=x onerror=alert(1)>"
    browser = opened([record("softmax"), record(f"a{nasty}", ms=2), record("b", status="oom", reason=nasty)])
    assert any(nasty in row for row in texts(browser, "#leagues tbody tr"))
    see(browser, "latency")
    assert browser.js("document.querySelectorAll('img').length") == 0


def test_launch_bound_cells_have_a_ring(opened, record, run):
    records = []
    for name, host in (("softmax", 1.0), ("linear", 3.0)):
        made = record(name, device="cuda", ms=[1.0] * 10)
        speed = made.speed.model_copy(update={"host_ms": [host] * 5})
        records.append(made.model_copy(update={"speed": speed}))
    browser = opened(records, [run(peaks={})])
    see(browser, "latency")
    names = browser.js("document.querySelector('[data-chart=latency] .plot').data.map((one) => one.name)")
    assert names.count("launch-bound") == 1
    assert "launch-bound" in texts(browser, "#leagues tbody tr")[1]


def test_large_data_is_packed_and_read_all_the_same(opened, small, monkeypatch):
    monkeypatch.setattr("linbench.report.page.LARGEST_PLAIN", 100)
    browser = opened(small)
    assert browser.js("document.getElementById('data').type") == "text/plain"
    assert len(texts(browser, "#leagues details:first-child tbody tr")) == 6


def test_the_share_of_the_roofline_is_a_figure(opened, record, run):
    from linbench.record import Cost

    peaks = Peaks(
        threads=1,
        copy_bytes_per_s={"65536": 1e10},
        product_flops_per_s={"float32": 1e11},
        product_shapes={},
        method="by hand",
    )
    cost = {"cost": Cost(flops=10**7, min_bytes=10, state_bytes=4096)}
    browser = opened(
        [record("linear", n, ms=4.0).model_copy(update=cost) for n in (1024, 2048)], [run(peaks={"cpu": peaks})]
    )
    see(browser, "roofline")
    assert "%" in browser.js("document.querySelector('[data-chart=roofline] .plot').data[0].text[0]")
