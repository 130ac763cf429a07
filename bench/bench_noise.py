"""randn beside torch.randn, both with ``out=``, and its cost a normal on one thread."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.backends import native
from fastgen.bench.cases import SHAPES, Case, pointwise
from fastgen.bench.plugin import drawn_from
from fastgen.bench.variants import compiled, on_backends

LARGE = (4, 1 << 20)
STANDARD = drawn_from(lambda out: torch.zeros_like(out), lambda out: 1.0)


@pytest.mark.parametrize(
    "case",
    pointwise("randn", tensors=1, flops=0, shapes={**SHAPES, LARGE: "four million normals"}),
    ids=str,
)
def test_randn(case, race, device):
    def ours(backend):
        return lambda out: fastgen.randn(case.shape, seed=1, out=out, backend=backend)

    variants = {
        **on_backends("step", ours, case, device),
        "eager": lambda out: torch.randn(case.shape, out=out),
        **compiled(lambda out: torch.randn(case.shape, device=device), device),
    }
    race(case, variants, [(torch.empty(case.shape, device=device),)], STANDARD)


@pytest.mark.parametrize("isa", native().available_isas())
def test_randn_on_one_thread(isa, race, device):
    if device.type != "cpu":
        pytest.skip("of the CPU alone")
    threads, chosen = torch.get_num_threads(), native().isa()
    torch.set_num_threads(1)
    native().choose_isa(isa)
    try:
        count = torch.Size(LARGE).numel()
        case = Case("randn, one thread", isa, "instructions a normal", 4 * count, 0, LARGE)
        run = {"fastgen": lambda out: fastgen.randn(LARGE, seed=1, out=out)}
        race(case, run, [(torch.empty(LARGE),)], STANDARD)
    finally:
        native().choose_isa(chosen)
        torch.set_num_threads(threads)
