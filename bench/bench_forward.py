"""add_noise beside the eager formula and torch.compile of it.

python -m fastgen.bench.bench_forward
"""

from __future__ import annotations

import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES
from fastgen.bench.timing import interleaved, machine, report


@torch.inference_mode()
def main() -> None:
    print(machine())
    compiled = torch.compile(eager.add_noise, dynamic=False)
    rows = []
    for shape in SHAPES:
        x0, noise = torch.randn(shape), torch.randn(shape)
        expected = 0.3**0.5 * x0 + 0.7**0.5 * noise
        given = fastgen.add_noise(x0, 0.3, noise=noise)
        assert (given - expected).abs().max() < 1e-5 * expected.abs().max()
        runs = {
            "fastgen": lambda: fastgen.add_noise(x0, 0.3, seed=0, step=1),
            "eager": lambda: eager.add_noise(x0, 0.3),
            "compile": lambda: compiled(x0, 0.3),
        }
        rows.append((str(shape), interleaved(runs)))
    report("add_noise, float32", rows)


if __name__ == "__main__":
    main()
