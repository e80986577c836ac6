"""What is installed is what is here: the wheel, and the wheel from the sdist, with configs and captured inputs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel built from the tree, and the one built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    subprocess.run([*build, str(folder / "tree"), "--wheel", str(ROOT)], check=True, capture_output=True)
    subprocess.run([*build, str(folder / "sdist"), str(ROOT)], check=True, capture_output=True)  # sdist, then its wheel
    return {name: next((folder / name).glob("*.whl")) for name in ("tree", "sdist")}


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_and_wheel_from_the_sdist_hold_the_same_files(wheels: dict[str, Path]) -> None:
    assert contents(wheels["tree"]) == contents(wheels["sdist"])


def test_the_wheel_holds_the_package_its_configs_and_its_data(wheels: dict[str, Path]) -> None:
    inside = contents(wheels["tree"])
    configs = {f"linbench/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= inside
    assert {"linbench/inputs/data/minilm.safetensors", "linbench/cli.py"} <= inside
    templates = ROOT / "linbench" / "report" / "templates"
    assert {f"linbench/report/templates/{path.name}" for path in templates.iterdir()} <= inside
    kernels = {
        str(path.relative_to(ROOT / "kernels"))
        for path in (ROOT / "kernels").rglob("*.*")
        if path.suffix in (".py", ".json")
    }
    assert kernels <= inside
    assert {name.partition("/")[0] for name in inside} == {"linbench", "linbench_kernels"}


def test_the_installed_command_finds_its_configs(wheels: dict[str, Path], tmp_path: Path) -> None:
    """The wheel alone, in an environment of its own that borrows this one's dependencies."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheels["tree"]).extractall(site)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([site, *borrowed])}
    done = subprocess.run(
        [python, "-m", "linbench", "run", "+sweep=smoke", "--cfg", "job"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "linbench.mechanisms.softmax.Softmax" in done.stdout
    where = subprocess.run(
        [python, "-c", "import linbench.config; print(linbench.config.config_dir())"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(site)
    names = "[u.find_spec(name) and u.find_spec(name).origin for name in ('linbench_kernels', 'kernels')]"
    found = subprocess.run(
        [python, "-c", f"import importlib.util as u; print(*{names})"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = found.stdout.split()
    assert ours.startswith(site)
    assert not theirs.startswith(site)
