"""All that only a GPU can show: ``python bench/gpu_check.py [--out DIR] [--dry]``, a few minutes.

Builds fastgen for this machine's GPU without downloading anything, then runs each part of
bench/gpu_parts.py in a process of its own: a part that fails, crashes or hangs does not stop the
rest. Leaves log.txt, results.json, the benchmarks' bench.json and pictures in one folder; exits
with 1 where a part failed or there was no time for it. With --dry, the same on a machine without a
GPU as far as it goes: Triton's kernels in the interpreter on tiny shapes, a benchmark, and the
static checks; two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent if (BENCH.parent / "csrc").is_dir() else Path.cwd()
LEAST = 5  # seconds; with less, a part isn't begun
MINUTES = 8  # for all parts together, the build left out
PARTS = (  # the most telling first; name, seconds it may take
    ("machine", 60),
    ("pointwise", 200),
    ("reductions", 200),
    ("gradients", 120),
    ("conv_transpose", 120),
    ("small", 120),
    ("sanitizer", 230),
    ("samplers", 90),
    ("diffusers", 120),
    ("streams", 60),
    ("graphs", 120),
    ("compiled", 120),
    ("large", 120),
    ("benchmarks", 400),
    ("limits", 60),
    ("counters", 120),
    ("static", 400),
)


class Log:
    """What is printed, kept in a file as well."""

    def __init__(self, path: Path):
        self.file = path.open("w")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.file, flush=True)


def run(command: list[str], seconds: float, log: Log, **environment: str) -> int:
    """The command's exit code, its output in the log as it comes; 124 where it took too long.
    Nothing that it started is left behind."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip

    def read() -> None:
        for line in process.stdout or ():
            log(f"  {line.rstrip()}")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        log(f"  stopped after {seconds:.0f} s")
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)  # a daemon of its own may hold the pipe


def without_gpu() -> str:
    """Why this python cannot run the check, or nothing."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; make gpu-check PYTHON=... takes another"
    import torch

    return "" if torch.cuda.is_available() else (
        "no GPU that torch can use; make gpu-check DRY=1 rehearses without one")  # fmt: skip


def build(log: Log, dry: bool) -> tuple[int, dict[str, str]]:
    """The exit code, and the environment in which fastgen can be imported.

    By pip as an editable install; where pip cannot, by CMake alone and run from the tree.
    """
    if (
        dry
        and subprocess.run([sys.executable, "-c", "import fastgen._native"], cwd="/").returncode
        == 0
    ):
        log("  already built")
        return 0, {}
    defines = [] if dry else ["-DCMAKE_CUDA_ARCHITECTURES=native"]
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
           "--no-index", "-e", "."]  # fmt: skip
    for define in defines:
        pip += ["-C", f"cmake.define.{define[2:]}"]
    if run(pip, 500, log) == 0:
        return 0, {}
    log("  pip could not; by CMake alone")
    folder = ROOT / "build" / "gpu-check"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DSKBUILD_PROJECT_VERSION=0", "-DSKBUILD_PROJECT_VERSION_FULL=0",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_folder()}", *defines,
    ]  # fmt: skip
    for command in (
        configure,
        ["cmake", "--build", str(folder)],
        ["cmake", "--install", str(folder), "--prefix", str(folder / "installed")],
    ):
        code = run(command, 500, log)
        if code:
            return code, {}
    return 0, {"FASTGEN_CHECK_TREE": str(folder / "installed" / "fastgen")}


def pybind11_folder() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of log.txt and results.json")
    parser.add_argument("--dry", action="store_true", help="without a GPU, as far as it goes")
    parser.add_argument("--no-build", action="store_true", help="check what is installed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--part", action="append", choices=[name for name, _ in PARTS])
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "build" / "gpu-check-results"
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes: got {options.minutes}, expected more than 0")
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.txt")
    except OSError as error:
        parser.error(f"--out: {error}")
    reason = "" if options.dry else without_gpu()
    if reason:
        log(reason)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every finally
    environment: dict[str, str] = {"TRITON_INTERPRET": "1"} if options.dry else {}
    results: dict[str, dict] = {}
    if not options.no_build:
        log("== build")
        start = time.monotonic()
        code, more = build(log, options.dry)
        environment |= more
        results["build"] = {"passed": code == 0, "seconds": round(time.monotonic() - start, 1)}
    end = time.monotonic() + 60 * options.minutes
    for name, seconds in PARTS:
        if options.part and name not in options.part:
            continue
        log(f"== {name}")
        start = time.monotonic()
        seconds = min(seconds, end - start)
        if seconds < LEAST:
            log(f"  left out: the {options.minutes:g} minutes are over")
            results[name] = {"passed": None, "seconds": 0.0, "summary": "no time left"}
            continue
        file = out / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, str(BENCH / "gpu_parts.py"), name, str(file)]
        code = run(command + ["--dry"] * options.dry, seconds, log, **environment)
        found = {}
        with contextlib.suppress(OSError, ValueError):  # of a part that ended too soon
            found = json.loads(file.read_text())
        results[name] = {"passed": code == 0, "exit_code": code, **found,
                         "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
        (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    log("== summary")
    for name, result in results.items():
        verdict = {True: "passed", False: "FAILED", None: "LEFT OUT"}[result["passed"]]
        log(f"  {name:<16} {verdict:<8} {result['seconds']:>7.1f} s  {result.get('summary', '')}")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
