"""Pages of every kind in a browser: narrow, on paper, full of failures, of one cell, of none, packed."""

import pytest
from browser import see, texts


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(opened, small, width):
    browser = opened(small, width=width)
    for slug in ("crossover", "latency", "pareto", "skill"):
        see(browser, slug)
    assert browser.js("document.documentElement.scrollWidth") == width


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


def test_large_data_is_packed_and_read_all_the_same(opened, small, monkeypatch):
    monkeypatch.setattr("linbench.report.page.LARGEST_PLAIN", 100)
    browser = opened(small)
    assert browser.js("document.getElementById('data').type") == "text/plain"
    assert len(texts(browser, "#leagues details:first-child tbody tr")) == 6
