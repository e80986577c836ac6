"""Files of captured inputs: what a cell gets, grouped heads, other texts, and what is refused."""

import re

import pytest
import torch
from safetensors.torch import save_file

from linbench import inputs
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.inputs import traces


@pytest.fixture
def stored(tmp_path):
    """Three texts of 40 tokens, two layers, six heads that share two of keys, D = 5 and M = 3."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3, 6, 40, 5), "k": (3, 2, 40, 5), "v": (3, 2, 40, 3)}
    tensors = {
        f"layer{layer}.{name}": torch.randn(shape, generator=generator).half()
        for layer in (1, 4)
        for name, shape in shapes.items()
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"model": "made up"})
    return path, tensors


def cell(path, *, parameters=None, **fields):
    held = {"length": 40, "batch": 1, "heads": 6, "head_dim": 5, "value_dim": 3}
    return Cell(
        mechanism="softmax", inputs="trace", inputs_parameters={"file": str(path), **(parameters or {})},
        **{**held, **fields},
    )  # fmt: skip


def test_a_cell_gets_the_last_layer_and_keys_of_its_heads(stored):
    path, tensors = stored
    q, k, v = inputs.draw(cell(path, heads=3, length=33, batch=2, parameters={"text": 1}, dtype="float16"))
    assert torch.equal(q, tensors["layer4.q"][1:, [0, 2, 4], :33])
    assert torch.equal(k, tensors["layer4.k"][1:, [0, 0, 1], :33])
    assert torch.equal(v, tensors["layer4.v"][1:, [0, 0, 1], :33])


def test_the_layer_may_be_chosen_and_another_changes_the_inputs(stored):
    path, tensors = stored
    q, _, _ = inputs.draw(cell(path, parameters={"layer": 1}))
    assert torch.equal(q, tensors["layer1.q"][:1].float())
    with pytest.raises(UsageError, match=r"layer=2: .* holds the layers 1, 4"):
        inputs.draw(cell(path, parameters={"layer": 2}))


def test_other_texts_select_and_fit(stored):
    path, _ = stored
    others = [inputs.another_draw(cell(path, parameters={"text": 2}), index) for index in range(3)]
    assert [other.inputs_parameters["text"] for other in others] == [0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 41}, "model.safetensors holds 40 tokens, not 41"),
        ({"batch": 4}, "model.safetensors holds 3 texts, not 4"),
        ({"head_dim": 8}, "model.safetensors has head_dim 5, not 8"),
        ({"value_dim": 5}, "model.safetensors has value_dim 3, not 5"),
    ],
)
def test_what_the_file_does_not_hold_is_unsupported_with_the_reason(stored, fields, reason):
    assert inputs.unsupported(cell(stored[0], **fields)) == reason


def test_heads_that_do_not_divide_are_an_error_with_the_choices(stored):
    with pytest.raises(UsageError, match=r"heads=4: inputs=model.safetensors holds 6 heads; choose from 1, 2, 3, 6"):
        inputs.unsupported(cell(stored[0], heads=4))


def test_a_missing_or_foreign_file_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"inputs=trace needs inputs.trace.file=FILE"):
        inputs.unsupported(cell(""))
    with pytest.raises(UsageError, match=re.escape(f"no file {tmp_path / 'none.safetensors'}")):
        inputs.unsupported(cell(tmp_path / "none.safetensors"))
    with pytest.raises(UsageError, match="there is no file"):
        inputs.fingerprint(cell(tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of tensors")
    with pytest.raises(UsageError, match=r"is no file of captured q, k, v"):
        inputs.unsupported(cell(broken))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(UsageError, match=r"is no file of captured q, k, v"):
        inputs.unsupported(cell(other))
    mixed = tmp_path / "mixed.safetensors"
    save_file({f"layer0.{name}": torch.zeros(1, 3 if name == "q" else 2, 4, 5) for name in "qkv"}, mixed)
    with pytest.raises(UsageError, match="do not belong together"):
        inputs.unsupported(cell(mixed))


def test_a_changed_file_has_another_fingerprint(stored):
    path, tensors = stored
    before = inputs.fingerprint(cell(path))
    save_file({name: x + 1 for name, x in tensors.items()}, path)
    traces.opened.cache_clear()
    assert inputs.fingerprint(cell(path)) != before
    assert inputs.fingerprint(Cell(mechanism="softmax", length=8)) is None
