"""Runs the benchmarks through pytest, from wherever fastgen is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import pytest_benchmark  # noqa: F401  (stores the results)
import torch

from fastgen.bench.cases import OPS, PEERS

FOLDER = Path(__file__).parent


def run(
    ops: Sequence[str],
    save: Path,
    *,
    against: str = "",
    quick: bool = False,
    device: str = "cpu",
    apart: bool = False,
) -> int:
    """Times ops (all if none are named) and writes pytest-benchmark's JSON; pytest's exit status.

    device: "cpu" or "cuda". apart: in a process of its own, whose memory and threads lie elsewhere.

    Raises ValueError for an op that has no benchmark, or an unknown peer.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    against = ",".join(filter(None, map(str.strip, against.split(","))))
    for peer in filter(None, against.split(",")):
        if peer not in PEERS:
            raise ValueError(f"--against: got {peer!r}, expected some of {', '.join(PEERS)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: got {device!r}, expected cpu, or cuda where torch has a GPU")
    files = [str(FOLDER / f"bench_{op}.py") for op in ops or OPS]
    options = [
        "-p", "pytest_benchmark.plugin", "--benchmark-storage", f"file://{save.parent}",
        "-p", "fastgen.bench.plugin", "-p", "no:cacheprovider", "-c", os.devnull,
        "--rootdir", str(FOLDER), "-o", "python_files=bench_*.py", "-q", "--no-header",
        "--tb", "short", "-W", "ignore", "--benchmark-quiet", "--benchmark-json", str(save),
        "--against", against, "--device", device,
    ]  # fmt: skip
    arguments = [*options, *(["--quick"] if quick else []), *files]
    with mock.patch.dict(os.environ):  # what is set there is meant for the user's own tests
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
            os.environ.pop(name, None)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        status = _pytest(arguments, apart)
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if save.stat().st_size:
        save.write_text(_compact(json.loads(save.read_text())))
    return status


def _pytest(arguments: list[str], apart: bool) -> int:
    if apart:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
    return int(pytest.main(arguments))


def _compact(data: dict) -> str:
    """A line a benchmark, each time to a nanosecond's tenth; without the machine's name."""
    data["machine_info"].pop("node", None)
    for entry in data["benchmarks"]:
        entry["stats"]["data"] = [round(time, 10) for time in entry["stats"]["data"]]
    head = json.dumps({k: v for k, v in data.items() if k != "benchmarks"})
    lines = ",\n".join(json.dumps(entry) for entry in data["benchmarks"])
    return f'{head[:-1]}, "benchmarks": [\n{lines}\n]}}\n'
