"""A mechanism that is not ours, from its file to the report: by import path, installed, and installed but broken."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from linbench.cli import main
from linbench.record import Record, Status
from linbench.store import read_all, results_files

SOURCE = '''
from typing import Annotated

from pydantic import Field

from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims


class NAME(Mechanism):
    """o_i = (1 − mix)·v_i + mix·mean_j v_j."""

    description = Description("each value, and a share of their mean", "replacement", (False,), "none", "none", 2026)
    claims = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)

    def __init__(self, geometry, mix: Annotated[float, Field(ge=0, le=1)] = 0.5):
        super().__init__(geometry)
        self.mix = mix

    def reference(self, q, k, v, rows=None):
        if q.shape[2] != k.shape[2]:
            raise UsageError("as many keys as queries are needed")
        own = v if rows is None else v[:, :, rows]
        return (1 - self.mix) * own + self.mix * v.mean(2, keepdim=True)

    def forward_torch(self, q, k, v):
        if q.shape[2] != k.shape[2]:
            raise UsageError("as many keys as queries are needed")
        wide = v if v.dtype.itemsize > 2 else v.float()
        return wide.lerp(wide.mean(2, keepdim=True), self.mix).to(v.dtype)

    def flops(self, cell):
        passes = {"forward": 1, "backward": 1, "forward_backward": 2}[cell.pass_]
        return passes * cell.batch * cell.heads * cell.length * cell.value_dim

    def min_bytes(self, cell):
        return streaming_bytes(cell)
'''
SWEEP = """# @package _global_
defaults:
  - override /mechanism: [linear]
  - override /measure: [speed, error]
length: [24, 40]
heads: 2
head_dim: 8
causal: false
measure: {speed: {budget_s: 0.02}}
"""
MEASURED = {Status.OK, Status.NOISY}


@dataclass(frozen=True)
class Place:
    """A folder to work in, and one where packages are installed."""

    work: Path
    site: Path

    def linbench(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "linbench", *words],
            cwd=self.work,
            env={**os.environ, "PYTHONPATH": str(self.site)},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


def install(site: Path, package: str, *lines: str) -> None:
    """The metadata that pip leaves behind."""
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[linbench.mechanisms]", *lines, ""]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("site"))
    (place.work / "mine" / "sweep").mkdir(parents=True)
    (place.work / "mine" / "sweep" / "tiny.yaml").write_text(SWEEP)
    (place.work / "beside.py").write_text(SOURCE.replace("NAME", "ByPath"))
    (place.site / "theirs.py").write_text(SOURCE.replace("NAME", "Leaky"))
    (place.site / "raising.py").write_text("raise OSError('a library of ours is missing')\n")
    install(place.site, "theirs", "leaky = theirs:Leaky")
    install(place.site, "broken", "raising = raising:Raising", "absent = nowhere_to_be_found:Absent")
    return place


@pytest.fixture(scope="module")
def swept(place: Place) -> subprocess.CompletedProcess[str]:
    """One sweep with all of them, as it is typed."""
    words = ("run", "--config-dir", "mine", "+sweep=tiny", "mechanism._target_=beside.ByPath")
    return place.linbench(*words, "mechanism.by_path.mix=[0.25,0.75]")


@pytest.fixture
def records(place: Place, swept: subprocess.CompletedProcess[str]) -> dict[str, list[Record]]:
    assert swept.returncode == 0, swept.stderr
    found: dict[str, list[Record]] = {}
    for record in read_all(results_files([place.work / "results"]))[1]:
        found.setdefault(record.cell.mechanism, []).append(record)
    return found


def test_the_mechanism_is_short() -> None:
    assert len(SOURCE.strip().splitlines()) <= 60


def test_both_ways_lead_into_a_sweep_beside_ours(records: dict[str, list[Record]]) -> None:
    assert set(records) == {"linear", "by_path", "leaky", "raising", "absent"}
    for name in ("linear", "by_path", "leaky"):
        assert all(record.status in MEASURED and record.speed and record.error for record in records[name]), name
    assert {record.cell.hyperparameters["mix"] for record in records["by_path"]} == {0.25, 0.75}
    assert len(records["by_path"]) == 4
    assert len(records["leaky"]) == 2


def test_a_broken_plug_in_is_a_record_with_its_reason(records: dict[str, list[Record]]) -> None:
    for name, words in (
        ("raising", "a library of ours is missing"),
        ("absent", "No module named 'nowhere_to_be_found'"),
    ):
        assert [record.status for record in records[name]] == [Status.UNSUPPORTED] * 2
        for record in records[name]:
            assert words in (record.reason or "")


def test_the_report_has_them_in_every_file(place: Place, swept: subprocess.CompletedProcess[str]) -> None:
    folder = (place.work / swept.stdout.rpartition("Report: ")[2].strip()).parent
    texts = {path.suffix: path.read_text() for path in folder.iterdir() if path.suffix in (".html", ".md")}
    assert set(texts) == {".html", ".md"}
    for text in texts.values():
        assert "leaky" in text
        assert re.search(r"by\\?_path\(mix=0\.25\)", text)
        assert "a library of ours is missing" in text
    (table,) = folder.glob("*.csv")
    with table.open() as lines:
        named = {row["mechanism"] for row in csv.DictReader(lines)}
    assert {"linear", "by_path", "leaky", "raising", "absent"} <= named


def test_a_plan_of_all_mechanisms_includes_the_installed_ones(place: Place) -> None:
    done = place.linbench("plan", "+sweep=all_mechanisms", "length=128", "inputs=gaussian", "causal=false")
    assert done.returncode == 0, done.stderr
    for name in ("softmax", "leaky", "raising"):
        assert re.search(rf"│ {name} +│", done.stdout), done.stdout
    assert "a library of ours is missing" in done.stdout


def test_one_that_cannot_be_loaded_cannot_be_all_that_is_asked_for(place: Place) -> None:
    done = place.linbench("run", "mechanism=absent", "length=24")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere_to_be_found" in done.stderr


def test_the_list_describes_them(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(place.site))
    assert main(["list", "mechanisms", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["mechanisms"]
    assert listed["leaky"]["hyperparameters"] == {"mix": {"default": 0.5, "minimum": 0, "maximum": 1}}
    assert listed["leaky"]["implementations"] == ["reference", "torch"]
    assert "a library of ours is missing" in listed["raising"]["about"]
    assert main(["list", "mechanisms"]) == 0
    told = capsys.readouterr().out
    assert "leaky       replacement, full; reference, torch" in told
    assert "absent      not to be used:" in told


def test_the_kit_takes_it_by_either_name(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(place.site))
    monkeypatch.chdir(place.work)
    code = main(["check", "leaky", "beside.ByPath", "--quick"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "2 mechanisms; refuted: none." in told
