"""What importing fastgen costs a process over importing torch alone, and what building it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgen.bench.cases import Case


def test_import(race):
    def importing(*names):
        code = f"import {', '.join(names)}"
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    case = Case("import", "a process from start to end", "a tool that starts often", 0, 0)
    variants = {"fastgen": importing("torch", "fastgen"), "torch alone": importing("torch")}
    race(case, variants, [()], lambda *_: None, rounds=5)


def test_build(record, tmp_path, request):
    """Once, from a checkout, with all that building needs at hand."""
    root = Path(__file__).resolve().parent.parent
    if request.config.getoption("--quick"):
        pytest.skip("takes a minute")
    if not (root / "CMakeLists.txt").is_file():
        pytest.skip("installed without its sources")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
               "-C", f"build-dir={tmp_path / 'build'}", "-w", str(tmp_path), str(root)]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        pytest.skip(f"no wheel: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    case = Case("build", "a wheel from source", "installing where none is ready", 0, 0)
    record(case, "fastgen", seconds, size=wheel.stat().st_size)
