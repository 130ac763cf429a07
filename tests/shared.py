"""What tests share beside ``fastgen.testing``."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastgen import backends
from fastgen.testing import bits

HAS_TRITON = (backends.triton_version() or (0, 0)) >= backends.MIN_TRITON
PRODUCT_ISAS = backends.native().available_isas()
ISAS = tuple(n for n in PRODUCT_ISAS if n in ("baseline", "avx2", "avx512"))  # pointwise kernels


def digest(value: Tensor) -> str:
    """sha256 of the bits in row-major order."""
    return hashlib.sha256(bits(value).numpy().tobytes()).hexdigest()


def network(x, t, cond=None):
    """Nonlinear, elementwise, of IEEE operations alone: a sample's result is its own."""
    t = t.to(torch.float32).view(-1, *[1] * (x.ndim - 1)) / 1024
    y = x / (1 + x * x) + t.to(x.dtype)
    return y if cond is None else y + cond.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
