"""The gradient of eager steps whose row is on the host: what the registered op records, without its
cost. Results are computed first, by any path, and given their gradient here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import HISTORY, Row
from ..reference.noise import key_tensors, normal
from ..reference.step_gradients import step_gradients


def attach(
    results: list[Tensor],
    row: Row,
    inputs: Sequence[Tensor | None],
    history: Sequence[Tensor | None],
    noise: Sequence[Tensor],
    guidance: float | Tensor,
    output_scale: Tensor | None,
    drawn: tuple[Any, ...],
) -> list[Tensor]:
    """The results, with a gradient to every operand.

    inputs: x, cond, uncond, known and logvar, trailing ones left out. noise: the normals given.
    drawn: seed, sample_ids, step and streams of those that were not.
    """
    scales = guidance if isinstance(guidance, Tensor) else None
    operands = [*inputs, *[None] * (5 - len(inputs)), scales, output_scale]
    operands += [*history, *[None] * (HISTORY - len(history)), *noise]
    return list(_Recorded.apply(results, row, guidance, drawn, *operands))


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, results, row, guidance, drawn, *operands):
        ctx.save_for_backward(*operands)
        ctx.row, ctx.drawn = row, drawn
        ctx.guidance = None if isinstance(guidance, Tensor) else guidance
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        operands = ctx.saved_tensors
        x, cond, uncond, known, logvar, scales, output_scale, *rest = operands
        history, noise = rest[:HISTORY], rest[HISTORY:]
        z = noise
        if logvar is not None and not noise and ctx.drawn[0] is not None:
            z = [_first_normal(logvar, *ctx.drawn)]
        guidance = scales if ctx.guidance is None else ctx.guidance
        found = step_gradients(grads, x, cond, uncond, known, logvar, history, z,
                               ctx.row.floats.tolist(), guidance, output_scale)  # fmt: skip
        gradients = [found.x, found.cond, found.uncond, found.known, found.logvar, found.guidance,
                     found.output_scale, *found.history, *found.noise[: len(noise)]]  # fmt: skip
        return None, None, None, None, *map(as_of, operands, gradients)


def _first_normal(like: Tensor, seed: Any, sample_ids: int | Tensor, step: int,
                  streams: Sequence[int]) -> Tensor:  # fmt: skip
    """z_0 of a step, again."""
    seeds, ids = key_tensors(seed, sample_ids, like.shape[0], like.device)
    return normal(like.shape, seeds, ids, step, streams[0])  # type: ignore[arg-type]


def as_of(operand: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """An operand's gradient in its dtype, where it wants one; zeros where it has no weight."""
    if operand is None or not operand.requires_grad:
        return None
    return torch.zeros_like(operand) if grad is None else grad.to(operand.dtype)
