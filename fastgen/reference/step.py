"""The step of every sampler, from a row of numbers: the formula that the kernels fuse.

    e   = scale (u + g (c - u))
    d   = clip(a_x x + a_e e)
    y_j = sum_k C[j,k] in_k + sum_m S[j,m] z_m,   in = (x, e, u, d, known, h_1 ... h_7)

z_0 is multiplied by exp((b logvar + b_0) / 2) where a log-variance is given. Sums run left to right
over the terms that are there: a weight of zero, or an absent tensor, drops its term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import is_transformed
from .arithmetic import Differentiable, exp, working_dtype

INPUTS = 12  # x, e, u, denoised, known, seven of history
OUTPUTS = 4
NOISES = 4
ROW_FLOATS = 72
WEIGHTS, NOISE = 8, 8 + OUTPUTS * INPUTS  # where a row's weights and noise factors begin


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """(1,) or (B,) as a factor of ``like`` (B, ...)."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _sum(terms: Sequence[tuple[Tensor, Tensor | None]], like: Tensor) -> Tensor:
    total = torch.full_like(like, -0.0)  # the neutral element of addition
    for weight, value in terms:
        if value is not None:
            total = total + weighted(per_sample(weight, like), value)
    return total


def weighted(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, and -0.0 whatever the value where the factor is zero: what a sum leaves out.
    The derivative by the factor is there in any case."""
    factor = factor.expand_as(value)
    run = _Weighted.apply if _is_differentiated(factor) else _Weighted.forward
    return run(factor, value)


def _is_differentiated(factor: Tensor) -> bool:
    """Whether a derivative by it may be asked for: inside transforms a tensor does not show it."""
    return factor.requires_grad or is_transformed()


class _Weighted(Differentiable):
    @staticmethod
    def forward(factor: Tensor, value: Tensor) -> Tensor:
        return torch.where(factor != 0, factor * value, -0.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        factor, value = ctx.saved_tensors
        return grad * value, _Weighted.apply(factor, grad)

    @staticmethod
    def jvp(ctx, of_factor: Tensor, of_value: Tensor) -> Tensor:
        factor, value = ctx.saved_tensors
        return of_factor * value + _Weighted.apply(factor, of_value)


def guide(cond: Tensor, uncond: Tensor | None, guidance: Tensor) -> Tensor:
    """u + g (c - u) (Ho & Salimans 2022, with g = 1 + w); exactly c where g = 1."""
    if uncond is None:
        return cond
    g = per_sample(guidance, cond)
    if _is_differentiated(g):
        return _Guide.apply(cond, uncond, g.expand_as(cond))
    return torch.where(g == 1, cond, uncond + g * (cond - uncond))


class _Guide(Differentiable):
    """The same with the derivative by g, which the choice at g = 1 would hide."""

    @staticmethod
    def forward(cond: Tensor, uncond: Tensor, g: Tensor) -> Tensor:
        return torch.where(g == 1, cond, uncond + g * (cond - uncond))

    @staticmethod
    def backward(ctx, grad: Tensor):
        cond, uncond, g = ctx.saved_tensors
        return g * grad, _Weighted.apply(1.0 - g, grad), grad * (cond - uncond)

    @staticmethod
    def jvp(ctx, of_cond: Tensor, of_uncond: Tensor, of_g: Tensor) -> Tensor:
        cond, uncond, g = ctx.saved_tensors
        along = g * of_cond + _Weighted.apply(1.0 - g, of_uncond)
        return along + of_g * (cond - uncond)


def clip(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Comparisons, so that NaN is passed on."""
    value = torch.where(value < low, low, value)
    return torch.where(value > high, high, value)


def step(
    shape: Sequence[int],
    x: Tensor | None,
    cond: Tensor | None,
    uncond: Tensor | None,
    known: Tensor | None,
    logvar: Tensor | None,
    history: Sequence[Tensor | None],
    noise: Sequence[Tensor],
    rows: Tensor,
    guidance: Tensor,
    output_scale: Tensor | None,
    outputs: int,
) -> list[Tensor]:
    """The outputs y_0 ... of ``shape`` (B, ...), in float32 (float64 where an input has it).

    ``rows``: (1, 72) or (B, 72), laid out as ``csrc/params.h`` StepRow; ``guidance``: (1,) or (B,);
    ``output_scale``: (B,). ``noise``: z_0 ..., drawn already.
    """
    dtype = working_dtype(x, cond, uncond, known, logvar, *history, *noise)

    def widen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    x, u, known, logvar = widen(x), widen(uncond), widen(known), widen(logvar)
    blank = rows.new_empty((), dtype=dtype).expand(tuple(shape))
    rows = rows.to(dtype)
    e = None
    if cond is not None:
        e = guide(cond.to(dtype), u, guidance)
        if output_scale is not None:
            e = per_sample(output_scale, e) * e
    d = _sum([(rows[:, 0], x), (rows[:, 1], e)], blank)
    d = clip(d, per_sample(rows[:, 2], d), per_sample(rows[:, 3], d))
    z = [n.to(dtype) for n in noise]
    if logvar is not None and z:
        z[0] = (
            exp(0.5 * (per_sample(rows[:, 4], blank) * logvar + per_sample(rows[:, 5], blank)))
            * z[0]
        )
    inputs = [x, e, u, d, known, *map(widen, history)]
    results = []
    for j in range(outputs):
        weights = rows[:, WEIGHTS + j * INPUTS :]
        scales = rows[:, NOISE + j * NOISES :]
        terms = [(weights[:, k], value) for k, value in enumerate(inputs)]
        terms += [(scales[:, m], value) for m, value in enumerate(z)]
        results.append(_sum(terms, blank))
    return results
