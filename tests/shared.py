"""What tests share. Tensors are compared as bits: any NaN equals any NaN, nothing else is close."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastgen import backends

HAS_TRITON = (backends.triton_version() or (0, 0)) >= backends.MIN_TRITON
ISAS = backends.native().available_isas()

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(value: Tensor) -> Tensor:
    value = value.detach().contiguous()
    value = torch.where(value.isnan(), torch.full_like(value, torch.nan), value)
    return value.view(_INTEGERS[value.element_size()])


def assert_same_bits(actual, expected) -> None:
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = bits(actual) != bits(expected)
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} elements differ, the first: "
        f"{actual[different][0].item()!r} instead of {expected[different][0].item()!r}"
    )


def digest(value: Tensor) -> str:
    """sha256 of the bits in row-major order."""
    return hashlib.sha256(bits(value).numpy().tobytes()).hexdigest()


def network(x, t, cond=None):
    """Nonlinear, elementwise, of IEEE operations alone: a sample's result is its own."""
    t = t.to(torch.float32).view(-1, *[1] * (x.ndim - 1)) / 1024
    y = x / (1 + x * x) + t.to(x.dtype)
    return y if cond is None else y + cond.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
