"""A plan is the product of its lists, in an order that lets mechanisms take turns, with what will not be started."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from linbench.cell import Cell
from linbench.config import Axes, Choice, Config, Shard
from linbench.estimate import estimate_seconds
from linbench.plan import Skip, Step, backstop, expand, foresee, inputs_bytes
from linbench.prospect import Prospect, Rates
from linbench.record import Cost, Status


def config(**changes: Any) -> Config:
    """Two mechanisms, one of them in two variants, at three lengths, causal and not."""
    axes = {
        "implementation": ["reference", "torch"],
        "length": [96, 32, 64],
        "batch": 1,
        "heads": 3,
        "head_dim": 8,
        "value_dim": None,
        "dtype": "float32",
        "causal": [False, True],
        "pass": "forward",
        "seed": 0,
    }
    performer = Choice(
        name="performer", target="linbench.mechanisms.performer.Performer", parameters={"features": [4, 6]}
    )
    base: dict[str, Any] = {
        "mechanisms": [Choice(name="linear", target="linbench.mechanisms.linear.Linear"), performer],
        "inputs": [
            Choice(name="gaussian", target="linbench.inputs.gaussian.gaussian", parameters={"sharpness": [1.0]})
        ],
        "measures": [Choice(name="speed", target="linbench.measure.clock.measure_speed")],
        "devices": [Choice(name="cpu", target="torch.device", parameters={"threads": [None]})],
        "axes": Axes(**axes),
        "time_limit_s": 60,
        "results_dir": "results",
        "resume": True,
        "rounds": 3,
        "retries": 2,
        "shard": Shard(),
    }
    return Config(**(base | changes))


def cell(length: int = 64, **changes: Any) -> Cell:
    return Cell(mechanism="linear", length=length, heads=3, head_dim=8, value_dim=5, **changes)


def test_lists_multiply() -> None:
    cells = expand(config())
    assert len(cells) == 2 * 3 * 2 * 3  # implementations · lengths · causal · variants
    assert len({cell.key for cell in cells}) == len(cells)


def test_short_lengths_come_first_and_mechanisms_take_turns() -> None:
    cells = expand(config())
    assert [cell.length for cell in cells] == sorted(cell.length for cell in cells)
    first_length = [cell.mechanism for cell in cells if cell.length == 32]
    assert set(first_length[:4]) == {"linear", "performer"}


def test_value_dim_follows_head_dim() -> None:
    assert {cell.value_dim for cell in expand(config())} == {8}


def test_a_built_in_mechanism_needs_no_path_and_a_foreign_one_keeps_it() -> None:
    foreign = Choice(name="mine", target="my_module.Mine")
    cells = expand(config(mechanisms=[foreign, *config().mechanisms]))
    assert {(cell.mechanism, cell.target) for cell in cells} == {
        ("mine", "my_module.Mine"),
        ("linear", None),
        ("performer", None),
    }


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shards_share_the_plan_without_overlap(count: int) -> None:
    whole = Counter(cell.key for cell in expand(config()))
    shares = [expand(config(shard=Shard(index=i, count=count))) for i in range(count)]
    assert Counter(cell.key for share in shares for cell in share) == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_key_names_the_cell_and_nothing_else() -> None:
    assert cell().key == cell().key
    others = [cell(65), cell(causal=True), cell(seed=1), cell(hyperparameters={"features": 4}), cell(dtype="float64")]
    assert len({cell().key, *(other.key for other in others)}) == len(others) + 1
    assert cell(64).series() == cell(65).series() != cell(64, causal=True).series()


def test_a_cell_over_the_time_limit_is_not_started_and_says_why() -> None:
    slow = Prospect(cost=Cost(flops=10**14, min_bytes=1, state_bytes=None), code="x")
    quick = Prospect(cost=Cost(flops=10, min_bytes=1, state_bytes=None), code="x")
    steps = foresee(
        [cell(), cell()], [slow, quick], {}, measures={"speed": {}}, time_limit_s=60, memory_limit_bytes=None
    )
    assert steps[0].skip is not None
    assert steps[0].skip.status is Status.TIMEOUT
    assert "time_limit_s is 60" in steps[0].skip.reason
    assert steps[1].skip is None


def test_every_device_is_judged_by_its_own_rates() -> None:
    prospect = Prospect(cost=Cost(flops=10**14, min_bytes=1, state_bytes=None), code="x")
    rates = {"cpu": Rates(flops_per_s=1e10), "cuda": Rates(flops_per_s=1e14)}
    slow, quick = foresee(
        [cell(), cell(device="cuda")],
        [prospect, prospect],
        rates,
        measures={"speed": {}},
        time_limit_s=60,
        memory_limit_bytes=None,
    )
    assert slow.skip is not None
    assert quick.skip is None


def test_inputs_that_cannot_fit_are_not_started() -> None:
    assert inputs_bytes(cell()) == 4 * 3 * 64 * (8 + 8 + 5)
    prospect = Prospect(cost=Cost(flops=10, min_bytes=1, state_bytes=None), code="x")
    (step,) = foresee([cell()], [prospect], {}, measures={}, time_limit_s=60, memory_limit_bytes=1000)
    assert step.skip is not None
    assert step.skip.status is Status.OOM


def test_an_unsupported_cell_keeps_its_reason() -> None:
    prospect = Prospect(unsupported="linear has no sideways form", code="x")
    (step,) = foresee([cell()], [prospect], {}, measures={}, time_limit_s=60, memory_limit_bytes=None)
    assert step.skip == Skip(Status.UNSUPPORTED, "linear has no sideways form")
    assert step.estimated_s == 0


def test_the_estimate_grows_with_the_work_and_with_the_measures() -> None:
    def seconds(flops: int, **measures: dict[str, Any]) -> float:
        prospect = Prospect(cost=Cost(flops=flops, min_bytes=1, state_bytes=None), code="x", check_rows=64)
        return estimate_seconds(cell(), prospect, Rates(), measures)

    assert seconds(10**9, speed={}) < seconds(10**10, speed={})
    assert seconds(10**9) < seconds(10**9, speed={}) < seconds(10**9, speed={}, memory={}, error={"rows": 64})


@pytest.mark.parametrize("status", [Status.OOM, Status.TIMEOUT])
def test_longer_cells_of_a_failed_series_are_not_tried(status: Status) -> None:
    remaining = [
        Step(cell(n, causal=causal), Prospect(), 1.0, None) for n in (32, 128, 256) for causal in (False, True)
    ]
    stopped = dict(backstop(cell(64), status, "too much", remaining))
    assert set(stopped) == {cell(128).key, cell(256).key}
    assert all(skip.status is status and "at 64 tokens" in skip.reason for skip in stopped.values())


@pytest.mark.parametrize("status", [Status.CRASH, Status.INCORRECT, Status.OK])
def test_other_ends_stop_nothing(status: Status) -> None:
    assert not dict(backstop(cell(64), status, "", [Step(cell(128), Prospect(), 1.0, None)]))
