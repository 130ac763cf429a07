"""The gradient of the step: linear in each operand, but for the clip, exp and guidance's product.

Written out in differentiable torch, so that second gradients follow from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arithmetic import exp, per_sample_rows, working_dtype
from .step import INPUTS, NOISE, NOISES, WEIGHTS, clip, guide, per_sample, weighted


class StepGradients(NamedTuple):
    """One field an operand; None where it is absent, has no weight or was not asked for."""

    x: Tensor | None
    cond: Tensor | None
    uncond: Tensor | None
    known: Tensor | None
    logvar: Tensor | None
    history: list[Tensor | None]
    noise: list[Tensor | None]
    rows: Tensor | None
    guidance: Tensor | None
    output_scale: Tensor | None


def step_gradients(
    grads: Sequence[Tensor],
    x: Tensor | None,
    cond: Tensor | None,
    uncond: Tensor | None,
    known: Tensor | None,
    logvar: Tensor | None,
    history: Sequence[Tensor | None],
    noise: Sequence[Tensor],
    rows: Tensor | Sequence[float],
    guidance: Tensor | float,
    output_scale: Tensor | None,
    rows_wanted: bool = False,
) -> StepGradients:
    """Gradients of sum_j grads[j] y_j by every operand of ``reference.step``.

    ``rows``: (1, 72) or (B, 72), or the 72 numbers of one row, whose zeros then cost nothing.
    In float32, or float64 where an operand has it; shapes are the operands' own.
    """
    dtype = working_dtype(x, cond, uncond, known, logvar, *history, *noise)

    def widen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    ys = [g.to(dtype) for g in grads]
    x, c, u, known, logvar = widen(x), widen(cond), widen(uncond), widen(known), widen(logvar)

    def factor(column: int) -> Tensor | float:
        return per_sample(rows[:, column], ys[0]) if isinstance(rows, Tensor) else rows[column]

    def times(column: int, value: Tensor | None) -> Tensor | None:  # a weight of zero drops it
        weight = factor(column)
        if value is None or (isinstance(weight, float) and weight == 0):
            return None
        return weighted(weight, value) if isinstance(weight, Tensor) else weight * value

    # Forward again, as far as the gradient needs it.
    low, high = factor(2), factor(3)
    bounded = isinstance(rows, Tensor) or (low, high) != (-math.inf, math.inf)
    plain_e = e = raw = None
    if c is not None and (bounded or output_scale is not None):
        plain_e = e = guide(c, u, torch.as_tensor(guidance, device=c.device).view(-1))
        if output_scale is not None:
            e = per_sample(output_scale, plain_e) * plain_e
    if bounded:
        raw = _plus(times(0, x), times(1, e))
    z = [v.to(dtype) for v in noise]
    sigma = None
    if logvar is not None and z:
        sigma = exp(0.5 * (factor(4) * logvar + factor(5)))
        z[0] = sigma * z[0]

    # Backward: outputs to inputs, inputs to x and e, e to cond and uncond.
    def through(first_column: int, width: int) -> Tensor | None:
        return _plus(*[times(first_column + j * width, y) for j, y in enumerate(ys)])

    given = (x, c, u, rows, known, *history)  # the denoised sample always is
    of = [None if v is None else through(WEIGHTS + k, INPUTS) for k, v in enumerate(given)]
    of_z = [through(NOISE + m, NOISES) for m in range(len(z))]
    of_raw = of[3]
    if raw is not None and of_raw is not None:
        of_raw = torch.where((raw < low) | (raw > high), 0.0, of_raw)
    of_x, of_e, of_u = _plus(of[0], times(0, of_raw)), _plus(of[1], times(1, of_raw)), of[2]

    of_rows = None
    if rows_wanted:
        assert isinstance(rows, Tensor)
        zero = torch.zeros_like(ys[0])
        raw = zero if raw is None else raw
        low, high = per_sample(rows[:, 2], raw), per_sample(rows[:, 3], raw)
        columns = [zero] * rows.shape[1]
        if of_raw is not None and of[3] is not None:
            columns[0] = zero if x is None else of_raw * x
            columns[1] = zero if e is None else of_raw * e
            columns[2] = torch.where(raw < low, of[3], 0.0)
            columns[3] = torch.where(raw > high, of[3], 0.0)
        if sigma is not None and logvar is not None and of_z[0] is not None:
            columns[4] = of_z[0] * z[0] * 0.5 * logvar
            columns[5] = of_z[0] * z[0] * 0.5
        inputs = [x, e, u, clip(raw, low, high), known, *map(widen, history)]
        for j, y in enumerate(ys):
            for k, value in enumerate(inputs):
                if value is not None:
                    columns[WEIGHTS + j * INPUTS + k] = y * value
            for m, value in enumerate(z):
                columns[NOISE + j * NOISES + m] = y * value
        of_rows = torch.stack([total(v, rows) for v in columns], dim=1)

    of_scale = None
    if output_scale is not None and plain_e is not None and of_e is not None:
        of_scale = total(of_e * plain_e, output_scale)
        of_e = per_sample(output_scale, of_e) * of_e
    of_c, of_guidance = of_e, None
    if c is not None and u is not None and of_e is not None:
        g = guidance
        if isinstance(guidance, Tensor):
            of_guidance = total(of_e * (c - u), guidance)
            g = per_sample(guidance, of_e)
            of_c = g * of_e
            of_u = _plus(of_u, weighted(1.0 - g, of_e))
        elif g != 1:
            of_c, of_u = g * of_e, _plus(of_u, (1.0 - g) * of_e)
    of_logvar = None
    if sigma is not None and of_z[0] is not None:
        of_logvar = 0.5 * factor(4) * (of_z[0] * z[0])
        of_z[0] = sigma * of_z[0]
    return StepGradients(
        of_x, of_c, of_u, of[4], of_logvar, of[5:], of_z, of_rows, of_guidance, of_scale
    )


def _plus(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None


def total(values: Tensor, like: Tensor) -> Tensor:
    """Summed over each sample, and over the batch where ``like`` has one entry for all."""
    summed = per_sample_rows(values).sum(1)
    return (summed.sum().view(1) if like.shape[0] == 1 else summed).to(like.dtype)
