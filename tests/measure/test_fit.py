"""Fitting lowers the held-out error where it can, repeats itself, and leaves the cell's mechanism as it was."""

import copy
from itertools import combinations

import pytest
import torch

from linbench import inputs, registry
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.measure.call import Call
from linbench.measure.fit import VALIDATION_STEPS, fit, make_layer, measure_fit
from linbench.mechanisms.base import Gate
from linbench.mechanisms.softmax import Softmax

SHAPE = {"length": 48, "heads": 2, "head_dim": 8, "value_dim": 5}


def call(name="linear", **more):
    cell = Cell(mechanism=name, **{**SHAPE, **more})
    mechanism = registry.build(name, heads=2, key_dim=8, value_dim=5, causal=cell.causal)
    q, k, v = inputs.draw(cell)
    return Call(cell, mechanism, q, k, v)


def test_layer_starts_as_the_mechanism_itself():
    one = call()
    torch.testing.assert_close(make_layer(one)(one.q, one.k, one.v), one.forward())


def test_fit_brings_linear_attention_nearer_on_inputs_it_has_not_seen():
    block = measure_fit(call(inputs="smooth"), torch.empty(0), steps=200)
    assert block.fitted_error < 0.85 * block.initial_error
    assert block.last_loss < block.first_loss
    assert block.fitted_skill > block.initial_skill
    assert block.selected_validation_loss < block.initial_validation_loss
    assert 0 < block.selected_step <= 200
    assert block.parameters == 2 * (2 * 9 * 8 + 2 * 6 * 5)
    assert block.own_parameters == 0


def test_fit_repeats_itself():
    assert measure_fit(call(), torch.empty(0), steps=3) == measure_fit(call(), torch.empty(0), steps=3)


def test_other_draws_are_never_the_held_out_one():
    one = call()
    drawn = [one.q, *(inputs.draw(inputs.another_draw(one.cell, index))[0] for index in range(4))]
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))


def test_captured_texts_judge_select_or_train_and_never_two_of_these():
    cell = Cell(mechanism="softmax", length=16, heads=6, head_dim=32, value_dim=32, inputs="minilm")
    cell = cell.model_copy(update={"inputs_parameters": {"layer": 5, "text": 4}})
    others = [inputs.another_draw(cell, index).inputs_parameters for index in range(7)]
    assert [other["text"] for other in others] == [5, 0, 1, 2, 3, 0, 1]
    assert all(other["layer"] == 5 for other in others)
    with pytest.raises(UsageError, match="one at a time; set batch=1"):
        inputs.another_draw(cell.model_copy(update={"batch": 2}), 0)


def test_the_layer_that_is_judged_had_the_least_validation_loss():
    one = call(inputs="smooth")
    layer, steps = make_layer(one), 3 * VALIDATION_STEPS + 7
    start = copy.deepcopy(layer.state_dict())
    fitting = fit(layer, one.cell, one.q.device, steps=steps, learning_rate=0.01)
    assert sorted(fitting.validation) == [0, *range(VALIDATION_STEPS, steps, VALIDATION_STEPS), steps]
    assert fitting.validation[fitting.selected_step] == min(fitting.validation.values()) < fitting.validation[0]
    assert any(not torch.equal(value, start[name]) for name, value in layer.state_dict().items())


def test_a_fit_that_does_not_help_leaves_the_layer_as_it_was():
    one = call("softmax")
    layer = make_layer(one)
    start = copy.deepcopy(layer.state_dict())
    fitting = fit(layer, one.cell, one.q.device, steps=25, learning_rate=1.0)
    assert fitting.losses[-1] > fitting.losses[0]
    assert fitting.selected_step == 0
    assert all(torch.equal(value, start[name]) for name, value in layer.state_dict().items())


class Gated(Softmax):
    """The truth times a gate: fitted exactly by opening the gate."""

    def gates(self):
        return {"gate": Gate(torch.sigmoid), "log_scale": Gate(torch.nn.functional.logsigmoid, width=5, precise=True)}

    def forward(self, q, k, v, gate, log_scale):
        assert gate.shape == q.shape[:3]
        assert log_scale.shape == v.shape
        return super().forward(q, k, v) * gate[..., None] * log_scale.exp()


def test_gates_are_learned_and_the_mechanism_of_the_cell_is_not():
    one = call("softmax")
    one.mechanism = Gated(one.mechanism.geometry)
    one.mechanism.weight = torch.nn.Parameter(torch.ones(3))
    block = measure_fit(one, torch.empty(0), steps=120)
    assert block.initial_error == pytest.approx(0.75, abs=1e-5)
    assert block.fitted_error < 0.35
    assert block.own_parameters == 3
    assert torch.equal(one.mechanism.weight, torch.ones(3))
