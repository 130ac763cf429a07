"""Parts of bench/gpu_check.py that run others under NVIDIA's tools: sanitizer and counters."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum.per_second": "bytes a second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of the memory's peak",
}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: ([\d,]+) error|RACECHECK SUMMARY: ([\d,]+) hazard)")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or beside nvcc."""
    beside = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parent
    return shutil.which(name) or shutil.which(name, path=str(beside))


def under(command: list[str], part: str, seconds: float) -> str:
    """What a part of this check prints when it is run by a tool."""
    parts = Path(__file__).with_name("gpu_parts.py")
    # a cache of memory would hide what lies outside of a tensor
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        [*command, sys.executable, str(parts), part, os.devnull], env=environment, text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:  # the tool, and the program that it watches
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def sanitizer(seconds: float = 110) -> dict:
    """memcheck and racecheck over a small call of every kernel."""
    program = tool("compute-sanitizer")
    if program is None:
        return {"summary": "compute-sanitizer is not here: left out"}
    failures, verdicts = 0, []
    for name in ("memcheck", "racecheck"):
        text = under([program, "--tool", name, "--print-limit", "20"], "small", seconds)
        print(text[-6000:])
        found = errors(text)
        failures += found or 0
        verdicts.append(f"{name}: {'did not work here' if found is None else f'{found} errors'}")
    return {"failures": failures, "summary": ", ".join(verdicts)}


def errors(text: str) -> int | None:
    """What the sanitizer counted; None where it could not run the program to its end."""
    found = SUMMARY.findall(text)
    count = sum(int((a or b).replace(",", "")) for a, b in found)
    ran = bool(found) and "small: every kernel ran" in text
    return count if ran or count else None


def counters(seconds: float = 110) -> dict:
    """ncu's bandwidth of the step kernels on tensors beyond every cache."""
    program = tool("ncu")
    if program is None:
        return {"summary": "ncu is not here: left out"}
    command = [program, "--csv", "--print-units", "base", "--clock-control", "none",
               "--target-processes", "all", "--kernel-name", "regex:step|reparameterize|randn",
               "--metrics", ",".join(METRICS)]  # fmt: skip
    text = under(command, "beyond_caches", seconds)
    rows = kernels(text)
    if not rows:
        print(text[-3000:])
        return {"summary": "the counters cannot be read here: left out"}
    for row in rows:
        print(row["kernel"][:70], *(f"{row[m]:.4g} {unit}" for m, unit in METRICS.items()))
    shares = [row["dram__throughput.avg.pct_of_peak_sustained_elapsed"] for row in rows]
    return {"kernels": rows, "summary": f"{min(shares):.0f} to {max(shares):.0f} % of the peak"}


def kernels(text: str) -> list[dict]:
    """A row a launch from ncu's CSV: the kernel's name and every metric."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict] = {}
    for line in csv.DictReader(lines[start:]):
        if line.get("Metric Name") in METRICS:
            row = found.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            with contextlib.suppress(ValueError):  # "n/a"
                value = float(line["Metric Value"].replace(",", ""))
                if math.isfinite(value):
                    row[line["Metric Name"]] = value
    return [row for row in found.values() if len(row) == 1 + len(METRICS)]
