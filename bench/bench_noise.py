"""randn beside torch.randn, both with ``out=``, and its cost a normal on one thread."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.backends import native
from fastgen.bench.cases import SHAPES, Case, pointwise
from fastgen.bench.plugin import drawn_from

LARGE = (4, 1 << 20)
STANDARD = drawn_from(lambda out: torch.zeros_like(out), lambda out: 1.0)


@pytest.mark.parametrize(
    "case",
    pointwise("randn", tensors=1, flops=0, shapes={**SHAPES, LARGE: "four million normals"}),
    ids=str,
)
def test_randn(case, race):
    compiled = torch.compile(lambda: torch.randn(case.shape), dynamic=False)
    variants = {
        "fastgen": lambda out: fastgen.randn(case.shape, seed=1, out=out),
        "eager": lambda out: torch.randn(case.shape, out=out),
        "compile": lambda out: compiled(),
    }
    race(case, variants, [(torch.empty(case.shape),)], STANDARD)


@pytest.mark.parametrize("isa", native().available_isas())
def test_randn_on_one_thread(isa, race):
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
