"""Fitting lowers the held-out error where it can, repeats itself, and leaves the cell's mechanism as it was."""

import pytest
import torch

from linbench import inputs, registry
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.measure.call import Call
from linbench.measure.fit import make_layer, measure_fit, training_cell
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
    assert block.parameters == 2 * (2 * 9 * 8 + 2 * 6 * 5)
    assert block.own_parameters == 0


def test_fit_repeats_itself():
    assert measure_fit(call(), torch.empty(0), steps=3) == measure_fit(call(), torch.empty(0), steps=3)


def test_training_inputs_are_never_the_held_out_ones():
    one = call()
    for step in range(3):
        q, _, _ = inputs.draw(training_cell(one.cell, step))
        assert not torch.equal(q, one.q)


def test_captured_family_trains_on_the_other_text():
    cell = Cell(mechanism="softmax", length=16, heads=6, head_dim=32, value_dim=32, inputs="minilm")
    assert training_cell(cell, 0).inputs_parameters["text"] == 1
    with pytest.raises(UsageError, match="no other is left"):
        training_cell(cell.model_copy(update={"batch": 2}), 0)


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
