"""The float32 arithmetic that every backend shares, in eager PyTorch.

Only IEEE add, subtract, multiply, divide and square root, in a written order; the constants are
those of ``csrc/math``. float64 input takes torch's own functions instead: that is the oracle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1024  # elements of one leaf of the reduction tree
_MASK = 0xFFFFFFFF
_ROUND_MAGIC = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer

_LOG = [float.fromhex(c) for c in (
    "-0x1.38b58p-4", "0x1.055b6ap-3", "-0x1.0d8542p-3", "0x1.22da1cp-3",
    "-0x1.547244p-3", "0x1.99a008p-3", "-0x1.000226p-2", "0x1.555554p-2")]  # fmt: skip
_EXP = [float.fromhex(c) for c in (
    "0x1.6a244cp-10", "0x1.1239d4p-7", "0x1.5558f2p-5",
    "0x1.555492p-3", "0x1.fffffcp-2")]  # fmt: skip
_SIN = [float.fromhex(c) for c in (
    "-0x1.2d9302p-8", "0x1.465e92p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0")]  # fmt: skip
_COS = [float.fromhex(c) for c in (
    "0x1.d9d57ep-11", "-0x1.55c5e0p-6", "0x1.03c1dep-2", "-0x1.3bd3ccp+0", "1.0")]  # fmt: skip


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words; broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the low 64 bits: int64 wraps
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + c
    return result


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: torch's float32 root on the CPU is not, so by way of float64."""
    return x.double().sqrt().to(x.dtype)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32."""
    bits = x.view(torch.int32)
    k = bits - 0x3F3504F3 >> 23
    m = (bits - (k << 23)).view(torch.float32)
    f = m - 1.0
    square = f * f
    exponent = k.float()
    tail = square * f * _polynomial(f, _LOG) - 0.5 * square
    tail = exponent * float.fromhex("-0x1.bd0106p-13") + tail
    return exponent * float.fromhex("0x1.63p-1") + (f + tail)


def cos_sin_turn(u: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi u for float32 u in [0, 1]."""
    t = 4.0 * u
    shifted = t + _ROUND_MAGIC
    quadrant = shifted.view(torch.int32)
    f = t - (shifted - _ROUND_MAGIC)
    y = f * f
    s = _polynomial(y, _SIN) * f
    c = _polynomial(y, _COS)
    odd = (quadrant & 1) != 0
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    return (
        torch.where((quadrant + 1 & 2) != 0, -cosine, cosine),
        torch.where((quadrant & 2) != 0, -sine, sine),
    )


class Differentiable(torch.autograd.Function):
    """An elementwise function that keeps its inputs, for derivatives of both modes, and batches."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Exp(Differentiable):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        clamped = torch.where(x > 89.0, 89.0, x)
        clamped = torch.where(clamped < -104.0, -104.0, clamped)
        shifted = clamped * float.fromhex("0x1.715476p+0") + _ROUND_MAGIC
        n = shifted - _ROUND_MAGIC
        k = shifted.view(torch.int32) - 0x4B400000
        r = clamped - n * float.fromhex("0x1.62e4p-1") - n * float.fromhex("0x1.7f7d1cp-20")
        p = 1.0 + (r + r * r * _polynomial(r, _EXP))
        half = k >> 1
        first = (half + 127 << 23).view(torch.float32)
        second = (k - half + 127 << 23).view(torch.float32)
        return p * first * second

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * _Exp.apply(x)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * _Exp.apply(x)


def exp(x: Tensor) -> Tensor:
    """exp of float32 by the shared polynomial, of float64 by torch."""
    return x.exp() if x.dtype == torch.float64 else _Exp.apply(x)


def sum_by_halves(values: Tensor) -> Tensor:
    """Sum over the last dim by the fixed tree: chunks of 1024 halved, padded with zeros, until one.

    ``values``: (..., n) float32 or float64; the result (...).
    """
    if values.shape[-1] == 0:
        return values.sum(-1)
    while True:
        count = values.shape[-1]
        chunks = -(-count // CHUNK)
        values = torch.nn.functional.pad(values, (0, chunks * CHUNK - count))
        values = values.unflatten(-1, (chunks, CHUNK))
        while values.shape[-1] > 1:
            low, high = values.chunk(2, dim=-1)
            values = low + high
        values = values.squeeze(-1)
        if chunks == 1:
            return values.squeeze(-1)


def per_sample_rows(values: Tensor) -> Tensor:
    """(B, ...) as (B, elements of a sample); a (B,) tensor has one element a sample."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor has it, else float32: what the arithmetic is done in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
