"""Drawing inputs: shapes, dtypes, seeds, parameters, and what a bad request is told."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.inputs import draw, families, parameters, unsupported

CONFIGS = Path(__file__).parents[2] / "configs"
DRAWN = ("gaussian", "smooth", "clustered", "local")


def cell(inputs, **fields):
    defaults = {"length": 48, "batch": 2, "heads": 3, "head_dim": 10, "value_dim": 7}
    return Cell(mechanism="softmax", inputs=inputs, **{**defaults, **fields})


@pytest.mark.parametrize("inputs", DRAWN)
@pytest.mark.parametrize("length", [1, 2, 77])
@pytest.mark.parametrize("head_dim", [1, 9])
def test_shapes_are_those_of_the_cell_and_every_number_is_finite(inputs, length, head_dim):
    q, k, v = draw(cell(inputs, length=length, head_dim=head_dim))
    assert q.shape == k.shape == (2, 3, length, head_dim)
    assert v.shape == (2, 3, length, 7)
    for tensor in (q, k, v):
        assert tensor.is_contiguous()
        assert tensor.isfinite().all()


@pytest.mark.parametrize("inputs", DRAWN)
def test_the_seed_decides_everything(inputs):
    first, again, other = draw(cell(inputs, seed=4)), draw(cell(inputs, seed=4)), draw(cell(inputs, seed=5))
    for name, a, b, c in zip("qkv", first, again, other, strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


@pytest.mark.parametrize("inputs", DRAWN)
def test_nothing_but_shape_inputs_and_seed_changes_the_numbers(inputs):
    torch.manual_seed(1)
    first = draw(cell(inputs))
    torch.manual_seed(2)
    second = draw(cell(inputs, causal=True, implementation="reference", device="cuda", **{"pass": "backward"}))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("inputs", DRAWN)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_holds_the_fp32_draw_rounded(inputs, dtype):
    drawn = draw(cell(inputs))
    for tensor, cast in zip(drawn, draw(cell(inputs, dtype=dtype)), strict=True):
        assert cast.dtype is getattr(torch, dtype)
        assert torch.equal(cast, tensor.to(cast.dtype))


def test_inputs_are_not_the_numbers_that_a_mechanism_draws_from_the_same_seed():
    q, _, _ = draw(cell("gaussian", seed=3))
    features = torch.randn(q.numel(), generator=torch.Generator().manual_seed(3))
    assert torch.corrcoef(torch.stack([features, q.flatten()]))[0, 1].abs() < 5 / q.numel() ** 0.5


@pytest.mark.parametrize("inputs", families())
def test_configs_hold_every_parameter_and_its_default(inputs):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"inputs/{inputs}.yaml"))
    assert config == {inputs: {"_target_": families()[inputs].replace(":", "."), **parameters(inputs)}}


def test_the_error_config_holds_the_defaults_of_the_measure():
    from linbench.measure.judge import judge_error

    signature = inspect.signature(judge_error).parameters
    config = OmegaConf.load(CONFIGS / "measure/error.yaml").error
    assert {name: signature[name].default for name in config if name != "_target_"} == {
        "full_up_to_tokens": config.full_up_to_tokens,
        "rows": config.rows,
        "gradient_tokens": config.gradient_tokens,
        "seeds": config.seeds,
    }


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown inputs 'gausian'; choose from gaussian, smooth, clustered, local"):
        draw(cell("gausian"))


@pytest.mark.parametrize(
    ("inputs", "given", "told"),
    [
        ("gaussian", {"tau": 2}, r"inputs.gaussian.tau=2: .*parameters of gaussian: sharpness$"),
        ("gaussian", {"sharpness": 0}, "inputs.gaussian.sharpness=0: input should be greater than 0"),
        ("smooth", {"sharpness": float("inf")}, "inputs.smooth.sharpness=inf: input should be a finite number"),
        ("smooth", {"waves": 1.5}, "inputs.smooth.waves=1.5: .*parameters of smooth: sharpness, waves$"),
        ("clustered", {"clusters": 0}, "inputs.clustered.clusters=0: .*parameters of clustered: sharpness, clusters$"),
        ("local", {"width": -3}, "inputs.local.width=-3: .*parameters of local: sharpness, width$"),
        ("minilm", {"layer": 1}, "minilm.layer=1: input should be 0, 3 or 5; parameters of minilm: layer, text$"),
    ],
)
@pytest.mark.parametrize("ask", [draw, unsupported])
def test_bad_parameters_name_the_value_and_the_choices(inputs, given, told, ask):
    with pytest.raises(UsageError, match=told):
        ask(cell(inputs, inputs_parameters=given))


@pytest.mark.parametrize("inputs", DRAWN)
def test_drawn_families_give_every_cell(inputs):
    assert unsupported(cell(inputs, length=1 << 20)) is None


def test_a_family_of_someone_else_is_found_by_its_path():
    own = cell("gaussian", inputs_parameters={"sharpness": 3})
    foreign = own.model_copy(update={"inputs_target": "linbench.inputs.gaussian.gaussian"})
    assert torch.equal(draw(own)[0], draw(foreign)[0])
    assert unsupported(foreign.model_copy(update={"inputs": "mine"})) is None
    with pytest.raises(UsageError, match=r"inputs 'mine' cannot be loaded from 'linbench.inputs.gaussian.mine'"):
        draw(own.model_copy(update={"inputs": "mine", "inputs_target": "linbench.inputs.gaussian.mine"}))


def test_names_are_known_without_torch():
    script = "import sys, linbench.inputs as i; i.families(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
