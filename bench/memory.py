"""The memory that one call of a generator needs beside its input, output and weights.

``python -m fastgen.bench.memory > bench/results/memory.txt`` runs each of bench_fuse.py's cases in
float32 by PyTorch and by ``fastgen.fuse``, each in a process of its own, and reads what the kernel
says of it (Linux alone), so that what oneDNN and fastgen's module allocate counts as well.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen.ops import conv_transpose_cpu

MB = 1 << 20
VARIANTS = ("eager", "fused")
# What is freed goes back to the system, so that it is not mistaken for what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident(name: str) -> int:
    """Bytes: "VmRSS", now, or "VmHWM", the most since ``peak`` began."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def settled() -> int:
    """Bytes resident, once all that is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """(the most bytes resident during a call, its result)."""
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    return resident("VmHWM"), result


def packed_bytes() -> int:
    return sum(known.data.nbytes for known in conv_transpose_cpu._packed.values())


def measured(run: Callable[[], torch.Tensor]) -> dict[str, float]:
    """MB of a call that has been made before: of its output, of packed weights, and the most beside
    both, with all that the first call left behind, such as buffers of threads."""
    before, packed = settled(), packed_bytes()
    run()
    settled()
    most, result = peak(run)
    packed = packed_bytes() - packed
    sizes = {"output": result.nbytes, "packed": packed,
             "peak": most - before - result.nbytes - packed}  # fmt: skip
    return {name: size / MB for name, size in sizes.items()}


def _generator(name: str, batch: int, variant: str) -> dict[str, float]:
    """In a process of its own. A narrow network first: it loads what code and threads there are."""
    from fastgen.bench.generators import GENERATORS, made

    build, shape = GENERATORS[name]
    for width in ({"width": 8}, {}):
        network = made(build(**width))
        if variant == "fused":
            network = fastgen.fuse(network)
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
        weights = sum(p.nbytes for p in network.parameters()) / MB
        with torch.inference_mode():
            found = measured(lambda: network(x))
    return found | {"input": x.nbytes / MB, "weights": weights}


def in_a_process(code: str) -> Any:
    """What a program prints last, from JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | ENVIRONMENT)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="About a minute.")
    parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    from fastgen.bench.bench_fuse import CASES
    from fastgen.bench.timing import machine

    table = Table(title="MB of one call in float32, beside input, weights and output",
                  title_justify="left", title_style="bold")  # fmt: skip
    table.add_column("generator")
    for column in ("input", "weights", "output", "eager", "fused", "packed weights"):
        table.add_column(column, justify="right")
    for name, batch in CASES:
        both = [in_a_process("import json; from fastgen.bench import memory; "
                             f"print(json.dumps(memory._generator({name!r}, {batch}, {v!r})))")
                for v in VARIANTS]  # fmt: skip
        eager, fused = both
        cells = (eager["input"], eager["weights"], eager["output"], eager["peak"], fused["peak"],
                 fused["packed"])  # fmt: skip
        table.add_row(f"{name}, batch {batch}", *(f"{cell:.1f}" for cell in cells))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(f"{machine()}, fastgen {fastgen.__version__}")
    console.print(table)


if __name__ == "__main__":
    main()
