"""Times variants of one computation turn about, after checking that they agree."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the rounds of one interleaved run."""

    median: float
    p99: float
    minimum: float


def interleaved(variants: dict[str, Run], *, rounds: int = 25, round_us: float = 4000.0):
    """Each variant's ``Timing``; every round runs all of them, a few milliseconds each."""
    repeats = {}
    for name, run in variants.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        once = (time.perf_counter() - start) * 1e6
        repeats[name] = max(1, min(2000, int(round_us / max(once, 0.1))))
        for _ in range(repeats[name]):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            run, count = variants[name], repeats[name]
            start = time.perf_counter()
            for _ in itertools.repeat(None, count):
                run()
            times[name].append((time.perf_counter() - start) * 1e6 / count)
    return {
        name: Timing(
            statistics.median(values),
            sorted(values)[min(len(values) - 1, int(0.99 * len(values)))],
            min(values),
        )
        for name, values in times.items()
    }


def machine() -> str:
    """The line that every report starts with."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def report(title: str, rows: list[tuple[str, dict[str, Timing]]], ours: str = "fastgen") -> None:
    """A table: median µs of each variant by case, and each peer's time over ours."""
    names = list(dict.fromkeys(name for _, timings in rows for name in timings))
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for name in names:
        table.add_column(f"{name}\nµs (p99)", justify="right")
        if name != ours:
            table.add_column("over\nours", justify="right")
    for case, timings in rows:
        cells = [case]
        for name in names:
            timing = timings.get(name)
            cells.append(f"{timing.median:.1f} ({timing.p99:.1f})" if timing else "")
            if name != ours:
                cells.append(f"{timing.median / timings[ours].median:.2f}x" if timing else "")
        table.add_row(*cells)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
