"""Brackets of crossovers are halved by lengths that are measured next, around the length at which two laws meet."""

import pytest

from linbench import sweep
from linbench.config import Axes, Choice, Config, Shard
from linbench.plan import Step
from linbench.prospect import Prospect
from linbench.refining import NARROW, further_cells, middle, refined
from linbench.report.crossover import Crossover, crossovers
from linbench.report.points import make_points
from linbench.sweep import Plan

MEETING = 3000
LAWS_MS = {
    "softmax": lambda n: n**2 / MEETING,
    "linear": lambda n: n,
    "performer": lambda n: 9.0 * n,  # never faster
    "gla": lambda n: 1e-3,  # always faster
}
CONFIG = Config(
    mechanisms=[Choice(name="softmax")],
    inputs=[Choice(name="gaussian")],
    measures=[Choice(name="speed")],
    devices=[Choice(name="cpu")],
    axes=Axes(
        implementation=["torch"], length=[1024], batch=[1], heads=[2], head_dim=[8], value_dim=[None],
        dtype=["float32"], causal=[False], pass_=["forward"], seed=[0],
    ),
    time_limit_s=60, results_dir="nowhere", resume=False, rounds=1, retries=0, shard=Shard(),
)  # fmt: skip


@pytest.fixture
def measured(record, run):
    """A plan whose cells have the times that the laws say."""

    def fill(plan):
        for step in plan.steps:
            cell = step.cell
            made = record(cell.mechanism, ms=LAWS_MS[cell.mechanism](cell.length))
            plan.finished[cell.key] = made.model_copy(update={"cell": cell})
        return plan

    def make(lengths=(1024, 2048, 4096, 8192), **cell):
        steps = [
            Step(record(name, length, **cell).cell, Prospect(), 1.0, None) for name in LAWS_MS for length in lengths
        ]
        return fill(Plan(steps, {}, run().environment, {}, CONFIG, 2**30))

    make.fill = fill
    return make


def bracket(plan, mechanism):
    points = make_points(plan.records, [])
    (group,) = points.by_setting.values()
    (found,) = [one for one in crossovers(group) if one.series.mechanism == mechanism]
    return found.low, found.high


def test_only_what_has_a_bracket_gets_a_length_with_all_exact_attention(measured):
    cells = further_cells(measured())
    assert {(cell.mechanism, cell.length) for cell in cells} == {("softmax", 2816), ("linear", 2816)}


def test_every_inputs_of_the_upper_end_are_measured_again(measured, record):
    plan = measured()
    other = measured(inputs="needle")
    plan.steps += other.steps
    plan.finished |= other.finished
    assert {(cell.mechanism, cell.inputs) for cell in further_cells(plan)} == {
        (name, inputs) for name in ("softmax", "linear") for inputs in ("gaussian", "needle")
    }


def test_bisections_close_in_on_where_the_laws_meet_and_end(measured, monkeypatch):
    monkeypatch.setattr(sweep, "_prospects", lambda cells, *_: ([Prospect() for _ in cells], []))
    plan, widths = measured(), []
    for _ in range(9):
        before = plan
        plan = measured.fill(refined(before, runner=None))
        low, high = bracket(plan, "linear")
        assert low <= MEETING <= high
        widths.append(high - low)
        if plan is before:
            break
    assert widths == sorted(widths, reverse=True)
    # two narrow parts at most, with a length between them that is too close to call: samples scatter by a hundredth
    assert widths[-1] <= 2 * NARROW * high
    assert len(plan.steps) <= 16 + 2 * 7
    assert len({step.cell.key for step in plan.steps}) == len(plan.steps)


@pytest.mark.parametrize(
    ("low", "high", "known", "expected"),
    [
        (1024, 2048, (), 1408),
        (100, 120, (), 110),
        (960, 1024, (), None),
        (1024, 2048, (1408,), 1728),
        (None, 9, (), None),
    ],
)
def test_a_middle_is_about_round_and_inside(low, high, known, expected):
    found = Crossover(None, None, dict.fromkeys(known), "bracket", low, high)
    assert middle(found) == expected
