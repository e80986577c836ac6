"""The page in a browser: the first screen, filters and sorting."""

from browser import choose, see, texts


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
