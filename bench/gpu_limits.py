"""What a run on a GPU must reach, and whether it did: ``verdicts`` of the benchmarks' results."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgen.bench.report import LEAST, Record, Results, is_ours

LARGE = 64 << 20  # bytes of one tensor, beyond every cache
COPY_SHARE, NOISE_SHARE = 0.85, 0.80
HOST_US, DEVICE_US = 6.0, 2.0  # of a small call; the device's above an empty kernel's
POINTWISE = ("ddim_step", "ddpm_step", "cfg_combine", "combine", "add_noise", "randn",
             "reparameterize", "sizes")  # fmt: skip
SMALL = "(1, 16, 8)"
# The best peer's time over ours, at least: of a generator, of its last layer, of a vocoder's.
SPEEDUPS = {
    ("fuse", "DCGAN, batch 64, bfloat16"): 1.3,
    ("conv_transpose2d", "128x32x32 to 3, batch 16, bfloat16"): 2.0,
    ("conv_transpose1d", ""): 1.5,
}


@dataclass(frozen=True)
class Machine:
    """multiprocessors and clock (Hz) of a GPU; slots: instructions of four normals, a thread."""

    multiprocessors: int
    clock: float
    slots: int

    @property
    def normals(self) -> float:
        """A second at most: four warps of 32 threads issue an instruction each a cycle."""
        return 4 * self.multiprocessors * 4 * 32 * self.clock / self.slots


@dataclass(frozen=True)
class Verdict:
    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def good(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "" if self.good else "MISSED "
        return f"{verdict}{self.what}: {self.measured:.2f}, limit {sign} {self.limit:.2f}"


def verdicts(results: Results, machine: Machine) -> list[Verdict]:
    """Of every case that was timed and has a limit."""
    found: list[Verdict] = []
    for (op, case), variants in results.cases().items():
        if op not in POINTWISE:
            found += _speedup(op, case, variants)
            continue
        ours = [r for name, r in variants.items() if is_ours(name) and "reference" not in name]
        where = f"{op} {case}"
        plain = [r for r in ours if not r.variant.endswith("graph")]
        found += [Verdict(f"{where}, {r.variant}, launches", r.launches, 1) for r in plain]
        copy = variants.get("copy_")
        if copy is not None and 4 * math.prod(copy.shape) >= LARGE:
            found += [_share(where, r, copy, machine) for r in plain]
        if case == SMALL and "fastgen" in variants:
            host = variants["fastgen"].host
            found.append(Verdict(f"{where}, fastgen, host µs", host, HOST_US))
            if "empty kernel" in variants:
                above = variants["fastgen"].median - variants["empty kernel"].median
                found.append(Verdict(f"{where}, µs above an empty kernel", above, DEVICE_US))
        peer = variants.get("compile")
        if peer is not None and "fastgen" in variants:
            spread = max(LEAST, peer.spread + variants["fastgen"].spread)
            ratio = variants["fastgen"].quartile / peer.quartile
            found.append(Verdict(f"{where}, time over torch.compile's", ratio, 1 + spread))
    return found


def _speedup(op: str, case: str, variants: dict[str, Record]) -> list[Verdict]:
    limit = SPEEDUPS.get((op, case), SPEEDUPS.get((op, "")))
    peers = [r.median for name, r in variants.items() if not is_ours(name)]
    ours = [r.median for name, r in variants.items() if is_ours(name)]
    if limit is None or not peers or not ours:
        return []
    what = f"{op} {case}, the best peer's time over ours"
    return [Verdict(what, min(peers) / min(ours), limit, True)]


def _share(where: str, ours: Record, copy: Record, machine: Machine) -> Verdict:
    """Of the copy's bandwidth; with noise, of the smaller of that and the rate of normals."""
    bandwidth = 2 * 4 * math.prod(copy.shape) / copy.median  # bytes a µs
    reached = ours.bytes / ours.median
    if ours.op in ("ddpm_step", "add_noise", "randn", "reparameterize") or "noise" in ours.variant:
        a_normal = ours.bytes / math.prod(ours.shape)  # bytes that go with each
        bound = min(bandwidth, machine.normals / 1e6 * a_normal)
        return Verdict(f"{where}, {ours.variant}, share of bandwidth or instructions",
                       reached / bound, NOISE_SHARE, True)  # fmt: skip
    return Verdict(f"{where}, {ours.variant}, share of copy_'s bandwidth", reached / bandwidth,
                   COPY_SHARE, True)  # fmt: skip
