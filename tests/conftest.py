"""What every test shares. Without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from fastgen import backends
from shared import HAS_TRITON, ISAS


@pytest.fixture(params=["reference", *ISAS, pytest.param("triton", marks=pytest.mark.skipif(
    not HAS_TRITON, reason="no Triton, or one too old"))])  # fmt: skip
def backend(request):
    """Each backend that this machine can run; the CPU one under each of its instruction sets."""
    chosen = backends.native().isa()
    if request.param in ISAS:
        backends.native().choose_isa(request.param)
        yield "cpu"
        backends.native().choose_isa(chosen)
    else:
        yield request.param
