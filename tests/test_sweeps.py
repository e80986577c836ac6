"""The sweeps that come with linbench: each composes, asks for what exists, and together they leave nobody out."""

from __future__ import annotations

from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from linbench import registry
from linbench.cell import Cell
from linbench.config import GROUPS, config_dir, parse
from linbench.hydra_front import options
from linbench.plan import expand
from linbench.report.papers import PAPERS

SWEEPS = sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))


@cache
def cells(sweep: str) -> list[Cell]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", [f"+sweep={sweep}"]), resolve=True)
    assert isinstance(raw, dict)
    raw.pop("hydra", None)
    return expand(parse({str(key): value for key, value in raw.items()}, {g: options(g) for g in GROUPS}, sweep))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_hyperparameter_of_a_sweep_is_one_that_the_mechanism_takes(sweep: str) -> None:
    asked = {(cell.mechanism, tuple(cell.hyperparameters.items())) for cell in cells(sweep)}
    for name, hyperparameters in asked:
        build = {"heads": 2, "key_dim": 8, "value_dim": 8}
        causal = registry.load(name).description.causal_forms[0]
        registry.build(name, causal=causal, **build, **dict(hyperparameters))


@pytest.mark.parametrize("sweep", ["all_mechanisms", "fit"])
def test_the_sweep_of_all_mechanisms_leaves_none_out(sweep: str) -> None:
    assert {cell.mechanism for cell in cells(sweep)} == set(registry.BUILT_IN)


@pytest.mark.parametrize("paper", [paper.sweep for paper in PAPERS])
def test_every_paper_of_the_report_has_a_sweep_with_something_to_run(paper: str) -> None:
    runs = [cell for cell in cells(paper) if cell.causal in registry.load(cell.mechanism).description.causal_forms]
    assert runs


@pytest.mark.parametrize("sweep", SWEEPS)
def test_no_cell_is_asked_for_twice(sweep: str) -> None:
    keys = [cell.key for cell in cells(sweep)]
    assert len(set(keys)) == len(keys) > 0
