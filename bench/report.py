"""What was measured, as tables and pictures, and what became slower since."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgen.bench.timing import Timing

LEAST = 0.08  # of the time: what is never called slower


@dataclass(frozen=True)
class Record:
    """One variant of one case; times in microseconds a call."""

    file: str  # of the benchmark: "step" for bench_step.py
    op: str
    case: str
    reason: str
    variant: str
    median: float
    p99: float
    minimum: float
    quartile: float  # the lower one
    spread: float  # between the quartiles, over the median
    bytes: int
    flops: int
    allocated: int
    operators: int
    launches: int
    shape: tuple[int, ...] = ()  # of the operands
    host: float = 0.0  # microseconds of the host's a call, where a device runs it
    size: int = 0  # bytes of what was built

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.variant

    @property
    def gbps(self) -> float:
        return self.bytes / self.median / 1e3

    @property
    def gflops(self) -> float:
        return self.flops / self.median / 1e3


@dataclass(frozen=True)
class Results:
    """Of one run: the machine and its rates, and the records in the order of their timing."""

    machine: dict[str, Any]
    records: list[Record]

    def cases(self, op: str | None = None) -> dict[tuple[str, str], dict[str, Record]]:
        """The records of each (op, case), by variant."""
        found: dict[tuple[str, str], dict[str, Record]] = {}
        for record in self.records:
            if op in (None, record.op):
                found.setdefault((record.op, record.case), {})[record.variant] = record
        return found


def load(path: Path) -> Results:
    """From a file of pytest-benchmark's. Raises ValueError for another kind of file."""
    try:
        data = json.loads(path.read_text())
        machine = {"commit": data["commit_info"].get("id"), "time": data["datetime"]}
        machine |= data["machine_info"]["fastgen"]
        return Results(machine, [_record(entry) for entry in data["benchmarks"]])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: is no result of `fastgen bench` ({error!r})") from None


def _record(entry: dict[str, Any]) -> Record:
    info, stats = entry["extra_info"], entry["stats"]
    timing = Timing(tuple(1e6 * t for t in stats["data"]), stats["iterations"])
    low, _, high = statistics.quantiles(timing.rounds * 2, n=4, method="inclusive")
    known = {f.name: info[f.name] for f in fields(Record) if f.name in info}
    known["shape"] = tuple(known.get("shape", ()))
    return Record(**known, median=timing.median, p99=timing.p99, minimum=timing.minimum,
                  quartile=low, spread=(high - low) / timing.median)  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------


def show(results: Results) -> None:
    """A table an op: µs a call, the share of the machine's rate, and each peer over fastgen."""
    console = Console(width=None if Console().is_terminal else 200)
    console.print(describe(results.machine))
    missing = [name for name in ("diffusers", "k-diffusion") if name not in results.machine]
    if missing:
        console.print(f"left out, since it is not installed: {', '.join(missing)}")
    for op in dict.fromkeys(record.op for record in results.records):
        console.print(_table(op, results))


def describe(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    parts = [machine.get("gpu") or machine["processor"], f"{machine['threads']} threads"]
    names = ("torch", "triton", "diffusers", "k-diffusion", "driver")
    parts += [f"{name} {machine[name]}" for name in names if name in machine]
    parts += [f"fastgen {machine['version']}", f"{machine['gemm_gflops']:.0f} GFLOP/s (matmul)"]
    return ", ".join(parts)


def _table(op: str, results: Results) -> Table:
    cases = results.cases(op)
    variants = list(dict.fromkeys(name for found in cases.values() for name in found))
    peers = [name for name in variants if name != "fastgen"]
    heavy = _is_heavy(op)
    table = Table(title=op, title_justify="left", title_style="bold")
    table.add_column("case")
    table.add_column("fastgen\nµs (p99)", justify="right")
    table.add_column("GFLOP/s" if heavy else "GB/s", justify="right")
    table.add_column("of matmul's" if heavy else "of copy_'s", justify="right")
    built = any(found["fastgen"].size for found in cases.values() if "fastgen" in found)
    table.add_column("bytes of\nthe wheel" if built else "bytes\nallocated", justify="right")
    on_gpu = "gpu" in results.machine
    if on_gpu:
        table.add_column("launches", justify="right")
        table.add_column("host µs", justify="right")
    for name in peers:
        table.add_column(f"{name}\nover ours", justify="right")
    for (_, case), found in cases.items():
        ours = found.get("fastgen")
        if ours is None:
            continue
        cells = [case, _time(ours)]
        rate = f"{ours.gflops if heavy else ours.gbps:.1f}" if ours.bytes else ""
        cells += [rate, share(found, results)]
        cells.append(f"{ours.size or ours.allocated:,}")
        if on_gpu:
            cells += [str(ours.launches), f"{ours.host:.1f}"]
        for name in peers:
            peer = found.get(name)
            cells.append(f"{peer.median / ours.median:.2f}x" if peer else "")
        table.add_row(*cells)
    return table


def _time(record: Record) -> str:
    if record.median >= 1e6:
        return f"{record.median / 1e6:.2f} s"
    return f"{record.median:.1f} ({record.p99:.1f})"


def share(found: dict[str, Record], results: Results) -> str:
    """Of the rate that the same run measured: of a copy as large, or of a matrix product."""
    ours, copy = found["fastgen"], found.get("copy_")
    if _is_heavy(ours.op):
        return f"{ours.gflops / _gemm(ours, results):.0%}"
    if copy is None:
        return ""
    # copy_ reads one tensor of the case's and writes one; each of ours is as large
    moved = 2 * _tensor_bytes(ours)
    return f"{(ours.bytes / ours.median) / (moved / copy.median):.0%}"


def _is_heavy(op: str) -> bool:
    return op.startswith("conv_transpose") or op == "fuse"


def _gemm(record: Record, results: Results) -> float:
    """GFLOP/s of a matrix product of the record's dtype."""
    name = "gemm_gflops_bf16" if "bfloat16" in record.case else "gemm_gflops"
    return float(results.machine.get(name) or results.machine["gemm_gflops"])


def _tensor_bytes(record: Record) -> int:
    return 4 * math.prod(record.shape)


# ---- comparison ----------------------------------------------------------------------------------


def slower(old: Results, new: Results) -> dict[Record, str]:
    """What became slower beyond the spread of both runs, with a line that says how much.

    A case's peers tell how much slower the machine itself was: fastgen's time is taken over theirs,
    the lower quartiles of each, since what disturbs a time makes it longer.
    """
    lines = {}
    before = old.cases()
    for key, found in new.cases().items():
        known = before.get(key, {})
        peers = [(known[n], r) for n, r in found.items() if n in known and not is_ours(n)]
        drift = statistics.median(p.quartile / q.quartile for q, p in peers) if peers else 1.0
        noise = statistics.median(p.spread + q.spread for q, p in peers) / 2 if peers else 0.0
        for name, now in found.items():
            if not is_ours(name) or name == "fastgen reference" or name not in known:
                continue  # the reference is for checking
            then = known[name]
            ratio = now.quartile / then.quartile / drift
            allowed = 1 + max(LEAST, noise + then.spread / 2 + now.spread / 2)
            if ratio > allowed:
                lines[now] = (
                    f"{now.op} {now.case}, {name}: {ratio:.2f} times the time, beside "
                    f"its peers (allowed {allowed:.2f}; {then.median:.1f} to {now.median:.1f} µs)"
                )
    return lines


def is_ours(variant: str) -> bool:
    """Whether a variant is fastgen's, by some backend or in some way."""
    return variant.startswith("fastgen")


def differences(old: Results, new: Results) -> list[str]:
    """In what the two runs are not of one kind: the machine or versions."""
    names = ("processor", "gpu", "threads", "isa", "torch", "version", "quick")
    return [f"{name}: {old.machine.get(name)} then, {new.machine.get(name)} now"
            for name in names if old.machine.get(name) != new.machine.get(name)]  # fmt: skip


# ---- pictures ------------------------------------------------------------------------------------


def draw(results: Results, folder: Path) -> list[Path]:
    """PNGs of the results: speed-ups, the roofline, and a step's time against its size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    written = []
    for name, picture in (("speedup", _speedups), ("roofline", _roofline), ("sizes", _sizes),
                          ("layers", _layers)):  # fmt: skip
        figure = picture(results, pyplot)
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        written.append(path)
    return written


COLORS = {"eager": "#d1495b", "compile": "#edae49", "diffusers": "#00798c",
          "k-diffusion": "#8f5ea2", "torch.add": "#30638e", "copy_": "#999999",
          "fastgen": "#003d5b", "fastgen with noise": "#5f0f40"}  # fmt: skip


def _speedups(results: Results, pyplot):
    """A bar a peer and case, on a logarithmic scale; beyond 1, fastgen is faster."""
    cases = {k: v for k, v in results.cases().items()
             if "fastgen" in v and k[0] != "sizes" and not _is_heavy(k[0])
             and _peers(v)}  # fmt: skip
    peers = list(dict.fromkeys(p for v in cases.values() for p in _peers(v)))
    if not cases or not peers:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(cases) + 1))
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        places = [(row + (i - len(peers) / 2 + 0.5) * height, v[peer].median / v["fastgen"].median)
                  for row, v in enumerate(cases.values()) if peer in v]  # fmt: skip
        axes.barh([y for y, _ in places], [x for _, x in places], height, label=peer, left=0,
                  color=COLORS[peer])  # fmt: skip
    axes.set_yticks(range(len(cases)), [f"{op} {case}" for op, case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5x", "1x", "2x", "5x", "10x", "20x", "50x"])
    axes.set_xlabel("time over fastgen's")
    axes.set_title(describe(results.machine), fontsize=7)
    axes.legend()
    return figure


def _peers(found: dict[str, Record]) -> list[str]:
    return [name for name in ("eager", "compile", "diffusers", "k-diffusion") if name in found]


def _roofline(results: Results, pyplot):
    """Arithmetic a byte against arithmetic a second, beneath the machine's two limits."""
    points = [v["fastgen"] for k, v in results.cases().items()
              if "fastgen" in v and k[0] != "sizes" and not _is_heavy(k[0])
              and v["fastgen"].flops]  # fmt: skip
    copies = [2 * _tensor_bytes(r) / r.median / 1e3 for r in results.records
              if r.variant == "copy_" and _tensor_bytes(r) >= 1 << 24]  # fmt: skip
    if not points or not copies:
        return None
    bandwidth, peak = max(copies), results.machine["gemm_gflops"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    span = [0.05, 500.0]
    knee = peak / bandwidth
    axes.plot([span[0], knee, span[1]], [bandwidth * span[0], peak, peak], color="black")
    for op in dict.fromkeys(p.op for p in points):
        mine = [p for p in points if p.op == op]
        axes.scatter([p.flops / p.bytes for p in mine], [p.gflops for p in mine], s=18, label=op)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic a byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"copy {bandwidth:.0f} GB/s from memory, matmul {peak:.0f} GFLOP/s; small cases "
                   "lie in the caches", fontsize=8)  # fmt: skip
    axes.legend(fontsize=6)
    return figure


def _best(found: dict[str, Record], ours: bool) -> Record | None:
    """The fastest of fastgen's, or of the others'."""
    chosen = [r for name, r in found.items()
              if is_ours(name) == ours and name != "fastgen reference"]  # fmt: skip
    return min(chosen, key=lambda r: r.median) if chosen else None


def _layers(results: Results, pyplot):
    """Transposed convolutions and generators: the fastest peer's time over the fastest of ours, and
    every layer beneath the machine's limits."""
    pairs = [(key, _best(found, True), _best(found, False))
             for key, found in results.cases().items() if _is_heavy(key[0])]  # fmt: skip
    pairs = [pair for pair in pairs if pair[1] and pair[2]]
    if not pairs:
        return None
    figure, (bars, axes) = pyplot.subplots(1, 2, figsize=(13, 0.22 * len(pairs) + 1.5))
    colors = ["#d1495b" if "bfloat16" in key[1] else "#003d5b" for key, _, _ in pairs]
    bars.barh(range(len(pairs)), [p.median / o.median for _, o, p in pairs], color=colors)
    bars.set_yticks(range(len(pairs)), [case for (_, case), _, _ in pairs], fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("time of the fastest peer over fastgen's (red: bfloat16)")
    bandwidth = results.machine.get("copy_gbps")
    for dtype, color, name in (("float32", "#003d5b", "gemm_gflops"),
                               ("bfloat16", "#d1495b", "gemm_gflops_bf16")):  # fmt: skip
        mine = [o for (op, _), o, _ in pairs
                if op != "fuse" and ("bfloat16" in o.case) == (dtype == "bfloat16")]  # fmt: skip
        axes.scatter([o.flops / o.bytes for o in mine], [o.gflops for o in mine], s=18,
                     color=color, label=dtype)  # fmt: skip
        peak = results.machine.get(name)
        if bandwidth and peak:
            span, knee = [1.0, 1000.0], peak / bandwidth
            axes.plot([span[0], knee, span[1]], [bandwidth * span[0], peak, peak], color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic a byte that must be moved")
    axes.set_ylabel("GFLOP/s of a layer; lines: copy_ from memory, and matmul")
    axes.legend(fontsize=7)
    figure.suptitle(describe(results.machine), fontsize=7)
    return figure


def _sizes(results: Results, pyplot):
    """A step's time against the number of elements, a line a variant."""
    cases = results.cases("sizes")
    if not cases:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(n for found in cases.values() for n in found):
        line = [(_tensor_bytes(v[name]) // 4, v[name].median) for v in cases.values() if name in v]
        axes.plot(*zip(*line, strict=True), marker=".", label=name, color=COLORS.get(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements")
    axes.set_ylabel("µs a step")
    axes.set_title(describe(results.machine), fontsize=7)
    axes.legend(fontsize=8)
    return figure
