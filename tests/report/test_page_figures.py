"""Figures in a browser: pointing, keys, downloads, colours, rings."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from browser import see, texts

from linbench.record import AttentionMap, Cost, MapPicture, Peaks, Structure


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


def test_the_share_of_the_roofline_is_a_figure(opened, record, run):
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


def test_a_map_names_its_queries_keys_and_weight(opened, record):
    weights = [[0.75, 0.25], [0.5, -0.125]]
    picture = MapPicture(queries=[0, 512], keys=[0, 600], weights=weights, exact_weights=[[1.0, 0.0], [0.5, 0.5]])
    numbers = dict.fromkeys(AttentionMap.model_fields, 0.5)
    numbers |= {"rows": 9, "rows_total": 1024, "per_channel": False, "top": 16, "picture": picture}
    numbers |= {"singular_values": [1.0, 0.5], "exact_singular_values": [1.0, 0.25]}
    ranks = [f"{side}_{kind}_rank" for side in ("output", "exact") for kind in ("effective", "numerical")]
    block = Structure(
        protocol=3, rows=9, rows_total=9, largest_rank=5, attention=AttentionMap(**numbers), **dict.fromkeys(ranks, 2.0)
    )
    browser = opened([record(name).model_copy(update={"structure": block}) for name in ("linear", "gla")])
    plot = "document.querySelector('[data-chart=attention-maps] .plot')"
    see(browser, "attention-maps")
    assert browser.js(f"{plot}.data.filter((one) => one.type === 'heatmap').map((one) => one.name)") == [
        "exact softmax", "gla", "linear",
    ]  # fmt: skip
    assert browser.js(f"{plot}.data[1].hovertext[1][1]") == "<b>gla</b><br>queries 512 on, keys 600 on: -0.125"
    assert browser.js(f"{plot}.data[1].z[0][0]") == 1
    browser.js("document.querySelector('.mechanisms input[value=gla]').click()")
    see(browser, "attention-maps")
    assert browser.js(f"{plot}.data.filter((one) => one.type === 'heatmap').length") == 2
    browser.js(f"{plot}.focus()")
    browser.press("ArrowRight")
    assert texts(browser, "[data-chart=attention-maps] .readout")[0].startswith("linear; 1k tokens: total variation")
    see(browser, "map-spectrum")
