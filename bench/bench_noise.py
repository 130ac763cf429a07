"""randn beside torch.randn, with ``out=``, and its cost a normal on one thread.

python -m fastgen.bench.bench_noise
"""

from __future__ import annotations

import torch

import fastgen
from fastgen.backends import native
from fastgen.bench.cases import SHAPES
from fastgen.bench.timing import interleaved, machine, report

LARGE = (4, 1 << 20)


@torch.inference_mode()
def main() -> None:
    print(machine())
    rows = []
    compiled = torch.compile(lambda shape: torch.randn(shape), dynamic=False)
    for shape in (*SHAPES, LARGE):
        out = torch.empty(shape)
        z = fastgen.randn(shape, seed=1, out=out)
        spread = 6 / z.numel() ** 0.5
        assert abs(z.mean()) < spread
        assert abs(z.std() - 1) < spread
        runs = {
            "fastgen": lambda: fastgen.randn(shape, seed=1, out=out),
            "torch.randn": lambda: torch.randn(shape, out=out),
        }
        if shape in SHAPES:
            runs["compile"] = lambda: compiled(shape)
        rows.append((str(shape), interleaved(runs)))
    report("randn with out=, float32", rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = torch.empty(LARGE)
    chosen = native().isa()
    try:
        for isa in native().available_isas():
            native().choose_isa(isa)
            timing = interleaved({"fastgen": lambda: fastgen.randn(LARGE, seed=1, out=out)})
            nanoseconds = 1e3 * timing["fastgen"].median / out.numel()
            print(f"one thread, {isa}: {nanoseconds:.2f} ns a normal")
    finally:
        native().choose_isa(chosen)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
