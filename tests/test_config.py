"""Bad input becomes one sentence that names the value and the choices; good input multiplies."""

from __future__ import annotations

from typing import Any

import pytest

from linbench.config import parse
from linbench.errors import UsageError

OPTIONS = {
    "mechanism": ["linear", "performer"],
    "inputs": ["gaussian"],
    "measure": ["memory", "speed"],
    "device": ["cpu"],
}


def raw(**changes: Any) -> dict[str, Any]:
    """A composed configuration, as Hydra would hand it over."""
    base: dict[str, Any] = {
        "mechanism": {"performer": {"_target_": "linbench.mechanisms.performer.Performer", "features": [64, 256]}},
        "inputs": {"gaussian": {"_target_": "linbench.inputs.gaussian.gaussian", "sharpness": 1.0}},
        "measure": {"speed": {"_target_": "linbench.measure.clock.measure_speed", "budget_s": 3}},
        "device": {"cpu": {"_target_": "torch.device", "threads": None}},
        "implementation": "torch",
        "length": [1024, 4096],
        "batch": 1,
        "heads": 8,
        "head_dim": 64,
        "value_dim": None,
        "dtype": "float32",
        "causal": [False, True],
        "pass": "forward",
        "seed": 0,
        "time_limit_s": 60,
        "results_dir": "results",
        "resume": True,
        "rounds": 3,
        "retries": 2,
        "shard": {"index": 0, "count": 1},
    }
    return base | changes


def test_a_value_and_a_list_of_one_are_the_same() -> None:
    assert parse(raw(length=1024), OPTIONS) == parse(raw(length=[1024]), OPTIONS)


def test_repeats_in_a_list_count_once() -> None:
    assert parse(raw(length=[512, 1024, 512]), OPTIONS).axes.length == [512, 1024]


def test_a_tuned_entry_that_was_not_chosen_is_left_out() -> None:
    tuned = {**raw()["mechanism"], "linear": {"epsilon": 1}}
    assert [choice.name for choice in parse(raw(mechanism=tuned), OPTIONS).mechanisms] == ["performer"]


def test_missing_keys_are_named() -> None:
    broken = raw()
    del broken["heads"]
    with pytest.raises(UsageError, match="'heads' is missing"):
        parse(broken, OPTIONS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lenght": 5}, ["'lenght'", "did you mean 'length'", "results_dir"]),
        ({"length": "abc"}, ["length=abc", "integer"]),
        ({"length": -4}, ["length=-4", "greater than or equal to 1"]),
        ({"length": 10.5}, ["length=10.5", "integer"]),
        ({"length": []}, ["length=[]", "empty"]),
        ({"batch": True}, ["batch=True", "number"]),
        ({"heads": [4, 0]}, ["heads=0", "greater than or equal to 1"]),
        ({"dtype": "int8"}, ["dtype=int8", "bfloat16"]),
        ({"pass": "sideways"}, ["pass=sideways", "forward_backward"]),
        ({"causal": "maybe"}, ["causal=maybe", "boolean"]),
        ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
        ({"time_limit_s": [1, 2]}, ["time_limit_s=[1, 2]", "one value"]),
        ({"time_limit_s": 0}, ["time_limit_s=0", "greater than 0"]),
        ({"results_dir": ""}, ["results_dir="]),
        ({"shard": {"index": 3, "count": 3}}, ["shard.index=3", "0 to 2"]),
        ({"shard": {"index": 0, "total": 3}}, ["shard.total=3"]),
        ({"mechanism": {}}, ["mechanism=[]", "linear, performer"]),
        ({"mechanism": {"foo": {"x": 1}}}, ["'foo'", "linear, performer"]),
        ({"mechanism": "linear"}, ["mechanism=linear", "linear, performer"]),
        ({"mechanism": {"linear": 3}}, ["mechanism.linear=3"]),
        ({"mechanism": {"linear": {"_target_": "a.B", "x": []}}}, ["mechanism.linear.x=[]"]),
        ({"measure": {"speed": {"_target_": "a.b", "budget_s": [1, 2]}}}, ["measure.speed.budget_s=[1, 2]", "axis"]),
    ],
)
def test_bad_input_is_one_sentence_with_the_value_and_the_choices(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(raw(**changes), OPTIONS)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
