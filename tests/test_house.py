"""The house rules: who may import whom, what is loaded when, and that every mechanism has its papers in order."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from linbench import registry
from linbench.config import Axes, config_dir
from linbench.mechanisms.base import Geometry
from linbench.verbs import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "linbench"
MAY_NOT_IMPORT = {
    "cli": ["torch", "linbench.worker"],
    "hydra_front": ["torch", "linbench.worker"],
    "config": ["torch", "linbench.worker", "linbench.registry"],
    "cell": ["torch", "linbench.record", "linbench.plan", "linbench.registry"],
    "record": ["torch", "linbench.worker", "linbench.plan"],
    "prospect": ["torch", "linbench.worker", "linbench.plan", "linbench.registry"],
    "estimate": ["torch", "linbench.worker", "linbench.plan", "linbench.registry"],
    "execution": ["torch", "linbench.registry", "linbench.mechanisms", "linbench.measure"],
    "foresight": ["linbench.store", "linbench.report", "linbench.runner", "linbench.sweep", "linbench.worker"],
    "plan": ["torch", "linbench.worker", "linbench.registry", "linbench.mechanisms"],
    "store": ["torch", "linbench.worker", "linbench.report"],
    "runner": ["torch", "linbench.registry", "linbench.mechanisms", "linbench.measure"],
    "sweep": ["torch", "linbench.registry", "linbench.mechanisms", "linbench.measure"],
    "frontier": ["torch", "linbench.registry", "linbench.mechanisms", "linbench.measure"],
    "probing": ["linbench.store", "linbench.report", "linbench.runner", "linbench.sweep"],
    "stats": ["torch", "linbench.record", "linbench.store"],
    "worker": ["linbench.store", "linbench.report", "linbench.runner", "linbench.sweep"],
    "measure": ["linbench.store", "linbench.report", "linbench.runner", "linbench.worker"],
    "inputs": ["linbench.store", "linbench.report", "linbench.runner", "linbench.worker", "linbench.measure"],
    "mechanisms": ["linbench.store", "linbench.report", "linbench.runner", "linbench.worker", "linbench.measure"],
    "roofline": ["torch", "linbench.worker", "linbench.plan", "linbench.report", "linbench.measure"],
    "history": ["torch", "linbench.runner", "linbench.registry", "linbench.worker", "linbench.measure"],
    "doctor": ["torch", "linbench.worker", "linbench.registry", "linbench.mechanisms", "linbench.measure"],
    "report": ["torch", "linbench.runner", "linbench.registry", "linbench.worker", "linbench.store"],
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports at its top level, outside `if TYPE_CHECKING`: what loading it loads."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def every_import(path: Path) -> set[str]:
    """Modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def files(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_rooms_import_only_what_they_may(room: str) -> None:
    assert files(room), room
    for path in files(room):
        for name in imports(path):
            for banned in MAY_NOT_IMPORT[room]:
                assert f"{name}.".startswith(f"{banned}.") is False, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "statement",
    [
        "import linbench",
        "import linbench.cli, linbench.hydra_front, linbench.sweep, linbench.runner, linbench.progress",
        "import linbench.frontier, linbench.frontier_progress",
        "import linbench.store, linbench.stats, linbench.report.page",
        "import linbench.roofline, linbench.doctor",
    ],
)
def test_the_parent_stays_free_of_torch(statement: str) -> None:
    """In a fresh process: what one import drags in is invisible to the source."""
    code = f"{statement}; import sys; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_name_kernels_is_never_ours() -> None:
    """The folder has no ``__init__.py``: a package of that name that is installed comes before it on any path."""
    found = importlib.util.find_spec("kernels")
    assert found is None or str(ROOT) not in str(found.origin)


def test_kernels_import_nothing_of_linbench() -> None:
    sources = sorted((ROOT / "kernels" / "linbench_kernels").rglob("*.py"))
    assert sources
    for path in sources:
        modules = {name for name in every_import(path) if name.partition(".")[0] == "linbench"}
        assert modules == set(), path


def test_only_functions_of_linbench_import_kernels() -> None:
    """A machine without triton has mechanisms all the same."""
    for path in PACKAGE.rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & {"triton", "linbench_kernels"}, path


@pytest.mark.parametrize("folder", ["configs", "kernels", "scripts", "results", "tests"])
def test_data_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_config_and_constructor_agree_on_the_defaults(name: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(config_dir() / "mechanism" / f"{name}.yaml"))
    assert isinstance(node, dict)
    assert list(node) == [name]
    assert node[name].pop("_target_") == registry.BUILT_IN[name]
    fields = registry.load(name).hyperparameters().model_fields
    assert node[name] == {field: info.default for field, info in fields.items()}


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_mechanism_has_its_tests_and_a_description(name: str) -> None:
    assert (ROOT / "tests" / "mechanisms" / f"test_{name}.py").is_file()
    cls = registry.load(name)
    assert {"reference", "torch"} <= set(cls.implementations())
    about = cls.description
    assert re.fullmatch(r"\d{4}\.\d{5}", about.arxiv)
    assert about.causal_forms
    assert about.year >= 2017


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_mechanism_builds_in_every_form_that_it_claims(name: str) -> None:
    cls = registry.load(name)
    for causal in cls.description.causal_forms:
        for implementation in cls.implementations():
            mechanism = cls(Geometry(3, 8, 5, causal, implementation))
            assert mechanism.causal is causal


@pytest.mark.parametrize("group", ["mechanism", "inputs", "measure", "device"])
def test_every_choice_names_code_that_exists(group: str) -> None:
    for path in sorted((config_dir() / group).glob("*.yaml")):
        node = OmegaConf.load(path)
        assert list(node) == [path.stem]
        module, _, attribute = node[path.stem]["_target_"].rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), path


def test_the_readme_names_every_verb_mechanism_key_and_choice() -> None:
    text = (ROOT / "README.md").read_text()
    keys = [field.alias or name for name, field in Axes.model_fields.items()]
    keys += ["mechanism", "inputs", "measure", "device", "time_limit_s", "results_dir"]
    for word in [*VERBS, *registry.BUILT_IN, *keys, *(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))]:
        assert f"`{word}`" in text or f"linbench {word}" in text or f"+sweep={word}" in text, word


def test_nothing_committed_names_this_machine() -> None:
    """A user has neither our folders nor our notes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a checkout")
    here = str(ROOT) + "/"
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".jsonl", ".json", ".html", ""} and path.is_file():
            assert here not in path.read_text(errors="replace"), name
