"""cfg_combine and combine beside the eager formulas and torch.compile of them.

python -m fastgen.bench.bench_guidance
"""

from __future__ import annotations

import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES
from fastgen.bench.timing import interleaved, machine, report

WEIGHTS = (0.5, -0.25, 1.5)


@torch.inference_mode()
def main() -> None:
    print(machine())
    guide = torch.compile(eager.cfg_combine, dynamic=False)
    blend = torch.compile(eager.combine, dynamic=False)
    guided, combined = [], []
    for shape in SHAPES:
        a, b, c = (torch.randn(shape) for _ in range(3))
        expected = eager.cfg_combine(a, b, 7.5)
        assert (fastgen.cfg_combine(a, b, 7.5) - expected).abs().max() < 1e-5 * expected.abs().max()
        runs = {
            "fastgen": lambda: fastgen.cfg_combine(a, b, 7.5),
            "eager": lambda: eager.cfg_combine(a, b, 7.5),
            "compile": lambda: guide(a, b, 7.5),
        }
        guided.append((str(shape), interleaved(runs)))
        runs = {
            "fastgen": lambda: fastgen.combine([a, b, c], WEIGHTS),
            "eager": lambda: eager.combine(a, b, c, WEIGHTS),
            "compile": lambda: blend(a, b, c, WEIGHTS),
        }
        combined.append((str(shape), interleaved(runs)))
    report("cfg_combine, float32", guided)
    report("combine of three, float32", combined)


if __name__ == "__main__":
    main()
