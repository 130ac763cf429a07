"""add_noise beside the eager formula and torch.compile of it."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import pointwise
from fastgen.bench.plugin import drawn_from, tensors
from fastgen.bench.variants import compiled, on_backends


@pytest.mark.parametrize("case", pointwise("add_noise", tensors=2, flops=3), ids=str)
def test_add_noise(case, race, device):
    out = torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda x0: fastgen.add_noise(x0, 0.3, seed=0, step=1, backend=backend)

    variants = {
        **on_backends("step", ours, case, device),
        "copy_": lambda x0: out.copy_(x0),
        "eager": lambda x0: eager.add_noise(x0, 0.3),
        **compiled(lambda x0: eager.add_noise(x0, 0.3), device),
    }
    drawn = drawn_from(lambda x0: 0.3**0.5 * x0, lambda x0: 0.7**0.5)
    race(case, variants, tensors(case.shape, 1, device), drawn)
