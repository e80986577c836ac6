"""The implementation `triton` where no kernel can run: a reason, and nothing in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linbench import registry
from linbench.cell import Cell
from linbench.conformance.kit import Examination
from linbench.errors import UsageError
from linbench.mechanisms import fused
from linbench.mechanisms.base import extras_at

NAMES = ("lightning", "linear", "mamba2", "retnet")
pytestmark = pytest.mark.skipif(fused.unavailable("cpu") is None, reason="kernels run here, in the interpreter")


def cell(name: str, **changes: object) -> Cell:
    shape = {"batch": 1, "heads": 2, "length": 8, "head_dim": 4, "value_dim": 4, "causal": True}
    return Cell.model_validate({"mechanism": name, "implementation": "triton", **shape, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_unsupported_with_the_reason(name: str) -> None:
    asked = cell(name)
    assert "on a GPU" in str(registry.of_cell(asked).unsupported(asked))
    plain = cell(name, implementation="torch")
    assert registry.of_cell(plain).unsupported(plain) is None


def test_a_form_without_a_kernel_is_refused() -> None:
    asked = cell("performer", causal=False)
    assert registry.of_cell(asked).unsupported(asked) == "the triton kernels have the causal form only"
    asked = cell("efficient")
    assert registry.of_cell(asked).unsupported(asked) == "the triton kernels have the non-causal form only"


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_refused_and_nothing_else_is_computed(name: str) -> None:
    mechanism = registry.of_cell(cell(name))
    q, k, v = torch.zeros(3, 1, 2, 8, 4)
    extras = mechanism.make_extras(q, k, v, torch.Generator())
    with pytest.raises(UsageError, match="on a GPU"):
        mechanism(q, k, v, **extras)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_tokens_are_refused_too(name: str) -> None:
    mechanism = registry.of_cell(cell(name))
    q, k, v = torch.zeros(3, 1, 2, 8, 4)
    extras = mechanism.make_extras(q, k, v, torch.Generator())
    state = mechanism.initial_state(1, q.device, q.dtype)
    with pytest.raises(UsageError, match="on a GPU"):
        mechanism.prefill(q, k, v, **extras)
    with pytest.raises(UsageError, match="on a GPU"):
        mechanism.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state, **extras_at(extras, 0))


def test_an_implementation_generates_in_its_own_way_alone_if_it_has_one() -> None:
    assert registry.load("retnet").generating() == ("torch", "triton")
    assert registry.load("softmax").generating() == ("torch",)
    assert registry.of_cell(cell("retnet")).steps_in_place
    assert not registry.of_cell(cell("retnet", implementation="torch")).steps_in_place
    assert not registry.of_cell(cell("retnet", implementation="reference")).steps_in_place


def test_the_kit_looks_at_what_can_run_and_refuses_what_cannot_when_it_is_asked_for() -> None:
    assert {subject.implementation for subject in Examination("retnet").subjects()} == {"torch"}
    with pytest.raises(UsageError, match=r"retnet, triton: .*on a GPU"):
        Examination("retnet", implementations=("triton",)).subjects()
    with pytest.raises(UsageError, match=r"retnet, triton: .*on a GPU"):
        Examination("retnet", implementations=("torch", "triton")).subjects()


def test_the_interpreter_is_never_measured(tmp_path: Path) -> None:
    words = ["run", "mechanism=retnet", "implementation=triton", "length=64", "causal=true", "heads=1", "head_dim=8"]
    done = subprocess.run(
        [sys.executable, "-m", "linbench", *words],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "interpreter are never measured" in done.stdout + done.stderr
    assert "latency" not in done.stdout
