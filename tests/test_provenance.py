"""The hash of a mechanism's source changes with its code, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from linbench import provenance
from linbench.provenance import source_hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plug-in package of three modules, of which the first imports the second."""
    folder = tmp_path / "plugged"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mechanism.py").write_text("from plugged import helper\n\nVALUE = helper.VALUE\n")
    (folder / "helper.py").write_text('"""Helps."""\n\nVALUE = 1\n')
    (folder / "unrelated.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("plugged")]:
        del sys.modules[name]


def fresh_hash() -> str:
    """As a new process would find it."""
    importlib.invalidate_caches()
    for cached in (provenance._path, provenance._imports, provenance._module_hash):
        cached.cache_clear()
    return source_hash(["plugged.mechanism"])


@pytest.mark.parametrize("module", ["mechanism", "helper"])
def test_changed_code_changes_the_hash(package: Path, module: str) -> None:
    before = fresh_hash()
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "OTHER = 2\n")
    assert fresh_hash() != before


def test_comments_docstrings_and_unrelated_modules_do_not(package: Path) -> None:
    before = fresh_hash()
    (package / "helper.py").write_text('"""Helps a lot."""\n\n# a remark\nVALUE    = 1\n')
    (package / "unrelated.py").write_text("VALUE = 2\n")
    assert fresh_hash() == before


def test_a_mechanism_of_ours_includes_its_shared_core_and_no_other_mechanism() -> None:
    seen: set[str] = set()
    provenance._collect("linbench.mechanisms.linear", seen)
    assert {"linbench.mechanisms.cores.chunked", "linbench.mechanisms.cores.slabs", "linbench.mechanisms.base"} <= seen
    assert not {"linbench.mechanisms.retnet", "linbench.mechanisms.cores.banded", "linbench.record"} & seen
