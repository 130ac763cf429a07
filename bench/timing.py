"""Times variants of one computation turn about."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

Run = Callable[..., object]

# On a GPU, calls queued behind a pause of the device, in cycles: about 10 ms, in which the host
# queues them all, launches of eager PyTorch's many operators included (1024 may wait in a queue).
QUEUE, PAUSE = 48, 20_000_000


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, a number a round of one interleaved run; calls: of each round."""

    rounds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def minimum(self) -> float:
        return min(self.rounds)

    @property
    def p99(self) -> float:
        ordered = sorted(self.rounds)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def interleaved(
    variants: dict[str, Run],
    inputs: Sequence[tuple] = ((),),
    *,
    rounds: int = 25,
    round_us: float = 4000.0,
) -> dict[str, Timing]:
    """Each variant's ``Timing``; every round runs all of them, a few milliseconds each, on the
    inputs in turn, so that no call finds the last one's in the caches that it should not.

    On a GPU the time is the device's, behind a queue that hides the host's.
    """
    on_gpu = any(isinstance(t, torch.Tensor) and t.is_cuda for given in inputs for t in given)
    clock, most = (_device_us, QUEUE) if on_gpu else (_host_us, 2000)
    turns = {}
    for name, run in variants.items():
        clock(run, inputs, 1)
        once = clock(run, inputs, 1) / len(inputs)
        turns[name] = max(1, min(most, int(round_us / max(once, 0.1))) // len(inputs))
        clock(run, inputs, turns[name])
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            calls = turns[name] * len(inputs)
            times[name].append(clock(variants[name], inputs, turns[name]) / calls)
    return {name: Timing(tuple(t), turns[name] * len(inputs)) for name, t in times.items()}


def _host_us(run: Run, inputs: Sequence[tuple], turns: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, turns):
        for given in inputs:
            run(*given)
    return (time.perf_counter() - start) * 1e6


def host_us(run: Run, inputs: Sequence[tuple], rounds: int = 9) -> float:
    """The host's microseconds a call on a GPU, while the device is busy with something else."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE)
        turns = max(1, QUEUE // len(inputs))
        times.append(_host_us(run, inputs, turns) / (turns * len(inputs)))
    torch.cuda.synchronize()
    return statistics.median(times)


def _device_us(run: Run, inputs: Sequence[tuple], turns: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(PAUSE)
    start.record()
    for _ in itertools.repeat(None, turns):
        for given in inputs:
            run(*given)
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def machine() -> str:
    """The line that every report starts with."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
