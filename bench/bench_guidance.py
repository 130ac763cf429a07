"""cfg_combine and combine beside the eager formulas and torch.compile of them."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import pointwise
from fastgen.bench.plugin import close_to, tensors

WEIGHTS = (0.5, -0.25, 1.5)


@pytest.mark.parametrize("case", pointwise("cfg_combine", tensors=3, flops=3), ids=str)
def test_cfg_combine(case, race):
    compiled, out = torch.compile(eager.cfg_combine, dynamic=False), torch.empty(case.shape)
    variants = {
        "fastgen": lambda c, u: fastgen.cfg_combine(c, u, 7.5),
        "copy_": lambda c, u: out.copy_(c),
        "eager": lambda c, u: eager.cfg_combine(c, u, 7.5),
        "compile": lambda c, u: compiled(c, u, 7.5),
    }
    expected = close_to(lambda c, u: eager.cfg_combine(c.double(), u.double(), 7.5))
    race(case, variants, tensors(case.shape, 2), expected)


@pytest.mark.parametrize("case", pointwise("combine", tensors=4, flops=5), ids=str)
def test_combine(case, race):
    compiled, out = torch.compile(eager.combine, dynamic=False), torch.empty(case.shape)
    variants = {
        "fastgen": lambda a, b, c: fastgen.combine([a, b, c], WEIGHTS),
        "copy_": lambda a, b, c: out.copy_(a),
        "eager": lambda a, b, c: eager.combine(a, b, c, WEIGHTS),
        "compile": lambda a, b, c: compiled(a, b, c, WEIGHTS),
    }
    expected = close_to(lambda *abc: eager.combine(*(t.double() for t in abc), WEIGHTS))
    race(case, variants, tensors(case.shape, 3), expected)
