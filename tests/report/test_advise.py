"""Advice: the fastest that keeps to the bounds, what is too close to call, and what nobody measured."""

import pytest

from linbench.advise import Asked, advise, read_bytes
from linbench.advise_table import show
from linbench.errors import UsageError
from linbench.report.points import make_points


@pytest.fixture
def points(record, run):
    """Four mechanisms at three lengths: speed, memory and error fall apart."""
    shapes = {"softmax": (2.0, 2, 4e-7, 64), "performer": (1.0, 1, 0.4, 8), "longformer": (1.5, 1, 0.05, 16)}
    shapes["linear"] = (0.5, 1, 1.2, 2)
    records = []
    for length in (1024, 2048, 4096):
        for mechanism, (ms, power, error, mebibytes) in shapes.items():
            scale = length / 1024
            records.append(
                record(
                    mechanism,
                    length,
                    ms=ms * scale**power,
                    relative_error=error,
                    increment_bytes=int(mebibytes * 2**20 * scale),
                    reading="distance" if mechanism == "linear" else "error",
                )
            )
    return make_points(records, [run()])


def names(candidates):
    return [one.point.series.mechanism for one in candidates]


def test_the_fastest_is_advised_with_its_gain_over_exact_attention(points):
    (found,) = advise(points, Asked(causal=False, length=2048), ["softmax", "mamba"])
    assert names(found.ranked) == ["linear", "performer", "longformer", "softmax"]
    assert found.speedup.value == pytest.approx(8.0)
    assert found.unmeasured == ["mamba"]
    assert {length: series.mechanism for length, series in found.neighbours.items()} == {1024: "linear", 4096: "linear"}


def test_bounds_on_error_and_memory_refuse_with_the_number(points):
    asked = Asked(causal=False, length=1024, max_error=0.1, max_memory_bytes=20 * 2**20)
    (found,) = advise(points, asked)
    assert names(found.ranked) == ["linear", "longformer"]
    refusals = {one.point.series.mechanism: one.refusal for one in found.refused}
    assert refusals == {"performer": "error 0.400 is over 0.100", "softmax": "64 MiB are more than 20 MiB"}


def test_without_a_length_there_is_an_answer_for_every_one(points):
    found = advise(points, Asked(causal=False, max_error=0.01))
    assert [one.length for one in found] == [1024, 2048, 4096]


def test_what_is_too_close_to_call_is_named(record, run):
    records = [record("softmax", 256, ms=1.0), record("linear", 256, ms=1.001)]
    (found,) = advise(make_points(records, [run()]), Asked(causal=False))
    assert [series.mechanism for series in found.level] == ["linear"]


def test_the_worst_family_of_inputs_decides(record, run):
    records = [
        record("performer", 256, relative_error=0.05),
        record("performer", 256, relative_error=0.6, inputs="peaked"),
        record("softmax", 256, ms=3.0, relative_error=1e-7),
    ]
    (found,) = advise(make_points(records, [run()]), Asked(causal=False, max_error=0.1))
    assert names(found.ranked) == ["softmax"]
    assert found.refused[0].refusal == "error 0.600 is over 0.100"


def test_a_failure_is_refused_with_its_reason(record, run):
    records = [record("softmax", 256, ms=3.0), record("linear", 256, status="oom", reason="9 GiB are too many")]
    (found,) = advise(make_points(records, [run()]), Asked(causal=False))
    assert found.refused[0].refusal == "oom: 9 GiB are too many"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked(causal=True), "no record fits; there are xeon-2 cpu float32 full forward D=64"),
        (Asked(causal=False, length=8192), "nothing was measured at 8k tokens; there are 1k, 2k, 4k"),
    ],
)
def test_what_nobody_measured_is_said_with_what_there_is(points, asked, said):
    with pytest.raises(UsageError, match=said):
        advise(points, asked)


@pytest.mark.parametrize(
    ("text", "expected"), [("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("500MB", 5 * 10**8), ("7", 7)]
)
def test_sizes_are_read(text, expected):
    assert read_bytes(text) == expected


@pytest.mark.parametrize("text", ["two", "3 potatoes", "-1GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is no size; write a number with one of"):
        read_bytes(text)


def test_one_length_is_told_in_sentences_and_several_in_a_table(points, capsys):
    show(advise(points, Asked(causal=False, length=1024, max_error=0.1), ["mamba"]), points)
    printed = capsys.readouterr().out
    assert "Take linear: 500 µs" in printed
    assert "as fast as exact softmax attention" in printed
    assert "Not measured here: mamba." in printed
    show(advise(points, Asked(causal=False)), points)
    printed = capsys.readouterr().out
    assert printed.count("linear") >= 3
    assert "4.00×" in printed
