"""The sdist and the wheel made from it: what they hold, and that the wheel works on its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("build")


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of this tree and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    options = ("--no-isolation", "--skip-dependency-check")
    one = "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90"  # of several, where there is an nvcc
    run(sys.executable, "-m", "build", *options, one, "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel; torch comes from here, the editable install does not."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_sdist_holds_what_building_and_testing_need(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "csrc/module.cpp")
    assert names.issuperset(wanted)
    for folder in ("tests", "kernels", "bench", "fastgen"):
        sources = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".cpp", ".h", ".safetensors", ".typed")
        }
        assert not sources - names


def test_wheel_holds_the_package_kernels_and_weights_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("fastgen", "fastgen"), ("kernels", "fastgen/kernels")):
        sources = {
            f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".safetensors", ".typed")
        }
        assert not sources - names
    assert "fastgen/py.typed" in names
    assert any(name.endswith(".safetensors") for name in names)
    (top,) = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top == "fastgen"
    assert not {name for name in names if "/results/" in name or name.endswith((".o", ".cpp"))}


def test_wheel_works_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    code = """
import pathlib, sys, fastgen, fastgen.zoo, fastgen._native
assert pathlib.Path(fastgen.__file__).is_relative_to(sys.prefix), fastgen.__file__
assert pathlib.Path(fastgen._native.__file__).is_relative_to(sys.prefix)
assert fastgen.randn((2, 3), seed=1, backend="cpu").shape == (2, 3)
for name in fastgen.zoo.names():
    fastgen.zoo.load(name)
import fastgen.kernels.step
"""
    run(clean_python, "-c", code, cwd=tmp_path)
    run(clean_python, "-m", "fastgen", "--help", cwd=tmp_path)
    run(clean_python.parent / "fastgen", "--help", cwd=tmp_path)
