"""The captured inputs: what the file holds, which part of it a cell gets, and that it is a trained model's."""

import inspect
import math
from itertools import combinations
from typing import get_args

import pytest
import torch
from safetensors import safe_open

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.inputs import captured, draw, unsupported
from linbench.measure.error import measure_error

LAYERS = (0, 3, 5)


def cell(**fields):
    held = {"length": 512, "batch": 2, "heads": 6, "head_dim": 32, "value_dim": 32}
    return Cell(mechanism="softmax", inputs="minilm", **{**held, **fields})


@pytest.fixture
def stored():
    with safe_open(captured.DATA / "minilm.safetensors", framework="pt") as file:
        yield file


def test_the_file_holds_what_the_module_says(stored):
    shape = (6, 6, 512, 32)
    source = captured.stored()
    assert (source.texts, source.heads, source.tokens, source.key_dim) == shape
    assert source.layers == LAYERS
    assert set(stored.keys()) == {f"layer{layer}.{name}" for layer in LAYERS for name in "qkv"}
    for name in stored.keys():  # noqa: SIM118 (not a mapping)
        assert stored.get_tensor(name).shape == shape
        assert stored.get_tensor(name).dtype is torch.float16
    choices = inspect.signature(captured.minilm, eval_str=True).parameters["layer"].annotation
    assert get_args(choices) == LAYERS
    assert (captured.DATA / "minilm.safetensors").stat().st_size < 11_000_000


def test_the_file_says_where_it_is_from(stored):
    metadata = stored.metadata()
    assert metadata["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (metadata["model_license"], metadata["text_license"]) == ("Apache-2.0", "PSF-2.0")
    assert metadata["logits"] == "q·k/√32"
    assert {"package", "weights_sha256", "text", "text_sha256", "captured", "transformers"} <= metadata.keys()
    readme = (captured.DATA / "README.md").read_text(encoding="utf-8")
    python = metadata["text"].split()[3].rstrip(",")
    for fact in (metadata["package"].split()[1], metadata["transformers"], f"Python {python}", "Apache-2.0", "PSF-2.0"):
        assert fact in readme


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cell_gets_the_first_texts_and_tokens_and_evenly_spaced_heads(stored, layer):
    drawn = draw(cell(length=100, batch=1, heads=3, inputs_parameters={"layer": layer}, dtype="float16"))
    for name, tensor in zip("qkv", drawn, strict=True):
        assert torch.equal(tensor, stored.get_tensor(f"layer{layer}.{name}")[:1, [0, 2, 4], :100])


def test_layers_texts_and_heads_differ():
    middle, last = (draw(cell(inputs_parameters={"layer": layer})) for layer in (3, 5))
    assert not torch.equal(middle[0], last[0])
    q = middle[0]
    assert not torch.equal(q[0], q[1])
    texts = [draw(cell(batch=1, inputs_parameters={"text": text}))[0] for text in range(6)]
    assert torch.equal(torch.cat(texts[:2]), q)
    assert all(not torch.equal(one, other) for one, other in combinations(texts, 2))
    assert all(not torch.equal(q[0, head], q[0, head + 1]) for head in range(5))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_trained_model_attends_far_from_evenly(layer):
    q, k, v = draw(cell(inputs_parameters={"layer": layer}))
    log_weights = (q @ k.transpose(-1, -2) / math.sqrt(32)).log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights).sum(-1).mean()
    assert entropy < math.log(512) - 0.5
    assert measure_error(v, q, k, v, causal=False, reading="error").trivial_error > 0.2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 1024}, "minilm holds 512 tokens, not 1024"),
        ({"batch": 7}, "minilm holds 6 texts, not 7"),
        ({"batch": 2, "inputs_parameters": {"text": 5}}, "minilm holds 6 texts, not 2 from text 5 on"),
        ({"head_dim": 64}, "minilm has head_dim 32, not 64"),
        ({"value_dim": 16}, "minilm has value_dim 32, not 16"),
    ],
)
def test_what_the_capture_does_not_hold_is_unsupported_with_the_reason(fields, reason):
    assert unsupported(cell(**fields)) == reason
    with pytest.raises(UsageError, match=f"inputs=minilm: {reason}"):
        draw(cell(**fields))


def test_what_it_holds_is_supported():
    assert all(unsupported(cell(heads=heads, length=7, batch=1)) is None for heads in (1, 2, 3, 6))


@pytest.mark.parametrize("heads", [4, 8, 12])
def test_heads_that_do_not_divide_are_an_error_with_the_choices(heads):
    with pytest.raises(UsageError, match=f"heads={heads}: inputs=minilm holds 6 heads; choose from 1, 2, 3, 6"):
        unsupported(cell(heads=heads))
