"""cfg_combine and combine beside the eager formulas and torch.compile of them."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import pointwise
from fastgen.bench.plugin import close_to, tensors
from fastgen.bench.variants import compiled, on_backends

WEIGHTS = (0.5, -0.25, 1.5)


@pytest.mark.parametrize("case", pointwise("cfg_combine", tensors=3, flops=3), ids=str)
def test_cfg_combine(case, race, device):
    out = torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda c, u: fastgen.cfg_combine(c, u, 7.5, backend=backend)

    variants = {
        **on_backends("step", ours, case, device),
        "copy_": lambda c, u: out.copy_(c),
        "eager": lambda c, u: eager.cfg_combine(c, u, 7.5),
        **compiled(lambda c, u: eager.cfg_combine(c, u, 7.5), device),
    }
    expected = close_to(lambda c, u: eager.cfg_combine(c.double(), u.double(), 7.5))
    race(case, variants, tensors(case.shape, 2, device), expected)


@pytest.mark.parametrize("case", pointwise("combine", tensors=4, flops=5), ids=str)
def test_combine(case, race, device):
    out = torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda a, b, c: fastgen.combine([a, b, c], WEIGHTS, backend=backend)

    variants = {
        **on_backends("step", ours, case, device),
        "copy_": lambda a, b, c: out.copy_(a),
        "eager": lambda a, b, c: eager.combine(a, b, c, WEIGHTS),
        **compiled(lambda a, b, c: eager.combine(a, b, c, WEIGHTS), device),
    }
    expected = close_to(lambda *abc: eager.combine(*(t.double() for t in abc), WEIGHTS))
    race(case, variants, tensors(case.shape, 3, device), expected)
