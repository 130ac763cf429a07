"""One step against the size of its tensors: where the cost of a call ends and bandwidth begins."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import pointwise
from fastgen.bench.plugin import close_to, drawn_from, tensors

A_T, A_S = 0.5, 0.6
SIZES = {(1, 1 << power): f"2^{power} elements" for power in range(7, 27)}


@pytest.fixture(scope="module")
def compiled():
    torch.compiler.reset()
    return torch.compile(lambda x, e: eager.ddim_step(x, e, A_T, A_S), dynamic=True)


@pytest.mark.parametrize("case", pointwise("sizes", tensors=3, flops=3, shapes=SIZES), ids=str)
def test_sizes(case, race, compiled, device):
    out = torch.empty(case.shape, device=device)
    step, noisy = fastgen.ddim_step, fastgen.ddpm_step
    variants = {
        "fastgen": lambda x, e: step(x, e, A_T, A_S, out=out),
        "fastgen with noise": lambda x, e: noisy(x, e, A_T, A_S, seed=0, step=1, out=out),
        "copy_": lambda x, e: out.copy_(x),
        "eager": lambda x, e: eager.ddim_step(x, e, A_T, A_S),
        "compile": compiled,
    }
    exact = close_to(lambda x, e: eager.ddim_step(x, e, A_T, A_S), 1e-5)
    sigma = ((1 - A_T / A_S) * (1 - A_S) / (1 - A_T)) ** 0.5
    drawn = drawn_from(
        lambda x, e: noisy(x, e, A_T, A_S, noise=torch.zeros_like(x)), lambda x, e: sigma
    )

    def check(name, result, given):
        (drawn if name == "fastgen with noise" else exact)(name, result, given)

    race(case, variants, tensors(case.shape, 2, device)[:2], check)
