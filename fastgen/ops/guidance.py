"""Classifier-free guidance and other linear combinations of network outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import checks
from ..cache import cached_constant
from ..plan import HISTORY, Output, Row
from ..reference import guidance as reference
from ..reference.arithmetic import per_sample_rows
from ..reference.step import per_sample
from . import kernel
from .dispatch import LIBRARY, constant, is_plain

_ROW = Row((Output({"e": 1.0}),))
_TERMS = ("x", "e", "known", *(f"h{k}" for k in range(HISTORY)))


def cfg_combine(
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Sequence[float] | Tensor,
    *,
    rescale: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Classifier-free guidance: u + g (c - u); Ho & Salimans (2022), eq. 6 with g = 1 + w.

    cond, uncond: (B, ...), of any floating dtypes; they may be the two halves of one batch. The
        result has cond's dtype and is rounded once.
    guidance_scale: g, a float or one per sample (B,). g = 1 gives cond exactly.
    rescale: in [0, 1]; the share phi of the result whose per-sample standard deviation (unbiased)
        is brought to cond's: Lin et al. (2024), eq. 15 and 16.
    out: where to write, like cond; it may be cond or uncond. backend: as for ``ddpm_step``.

    Raises ValueError or TypeError for shapes, devices or numbers that do not fit.
    """
    if backend is None and uncond is not None and cond is not None and rescale == 0.0:
        result = kernel.quick(_ROW, None, cond, uncond, guidance=guidance_scale, out=out)
        if result is not None:
            return result
    checks.tensor("cond", cond)
    checks.like("uncond", uncond, "cond", cond)
    guidance = checks.per_sample("guidance_scale", guidance_scale, cond.shape[0], cond.device)
    rescale = checks.number("rescale", rescale)
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale: got {rescale}, expected a number in [0, 1]")
    outs = None
    if out is not None:
        outs = [
            checks.out(
                out,
                cond.shape,
                cond.dtype,
                cond.device,
                (cond, uncond, guidance if isinstance(guidance, Tensor) else None),
            )
        ]
    name = kernel.choose(backend, cond, uncond)
    scale = None
    if rescale != 0.0:
        scale = rescale_factor(cond, uncond, guidance, rescale, name)
    return kernel.run(cond.shape, _ROW, backend=name, dtypes=(cond.dtype,), device=cond.device,
                      like=cond, cond=cond, uncond=uncond, guidance=guidance, output_scale=scale,
                      out=outs)[0]  # fmt: skip


def combine(
    outputs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """sum weights[i] * outputs[i], summed left to right in float32 and rounded once.

    outputs: one to ten tensors (B, ...) of one shape and device; the result has the first one's
    dtype. A weight of zero leaves its tensor unread. out, backend: as for ``ddpm_step``.

    Raises ValueError or TypeError for what does not fit.
    """
    for name, given in (("outputs", outputs), ("weights", weights)):
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(f"{name}: got {type(given).__name__}, expected a sequence")
    outputs, weights = list(outputs), [constant(weight) for weight in weights]
    if len(outputs) != len(weights):
        raise ValueError(f"weights: got {len(weights)}, expected {len(outputs)}, one an output")
    if not 1 <= len(outputs) <= len(_TERMS):
        raise ValueError(f"outputs: got {len(outputs)}, expected 1 to {len(_TERMS)}")
    row = _weighted(tuple(checks.number(f"weights[{i}]", w) for i, w in enumerate(weights)))
    padded: list[Tensor | None] = [*outputs, *[None] * (3 - len(outputs))]
    x, e, known, *history = padded
    if backend is None and all(tensor is not None for tensor in outputs):
        result = kernel.quick(row, x, e, None, known, None, *history, out=out)
        if result is not None:
            return result
    first = checks.tensor("outputs[0]", outputs[0])
    for i, tensor in enumerate(outputs[1:], 1):
        checks.like(f"outputs[{i}]", tensor, "outputs[0]", first)
    outs = None
    if out is not None:
        outs = [checks.out(out, first.shape, first.dtype, first.device, outputs)]
    name = kernel.choose(backend, *outputs)
    return kernel.run(first.shape, row, backend=name, dtypes=(first.dtype,), device=first.device,
                      like=first, x=x, cond=e, known=known, history=tuple(history),
                      out=outs)[0]  # fmt: skip


@cached_constant
def _weighted(weights: tuple[float, ...]) -> Row:
    return Row((Output(dict(zip(_TERMS, weights, strict=False))),))


def rescale_factor(
    cond: Tensor, uncond: Tensor, guidance: float | Tensor, rescale: float, backend: str
) -> Tensor:
    """(B,) float32: rescale * std(cond) / std(guided) + (1 - rescale)."""
    if not isinstance(guidance, Tensor):
        guidance = torch.full((1,), guidance, dtype=torch.float32, device=cond.device)
    if cond.ndim > kernel.MAX_KERNEL_DIMS:
        cond, uncond = per_sample_rows(cond), per_sample_rows(uncond)
    if backend == "reference":
        return reference.rescale(cond, uncond, guidance, rescale)
    if is_plain(cond, uncond, guidance):
        return _rescale_kernel(cond, uncond, guidance, rescale, backend)
    return torch.ops.fastgen.rescale(cond, uncond, guidance, rescale, backend)


LIBRARY.define(
    "rescale(Tensor cond, Tensor uncond, Tensor guidance, float rescale, str backend) -> Tensor"
)


def _rescale_kernel(cond, uncond, guidance, rescale, backend):
    batch = cond.shape[0]
    scale = torch.empty(batch, dtype=torch.float32, device=cond.device)
    chunks = -(-cond[0].numel() // 1024) if batch else 0
    if chunks == 0:
        return scale.fill_(torch.nan)
    partials = torch.empty(batch * 5 * chunks, dtype=torch.float32, device=cond.device)
    pair = (guidance.float().contiguous(), int(guidance.numel() > 1))
    kernel.call(backend, "guidance", "rescale", cond.device, tuple(cond.shape), cond, uncond, pair,
                rescale, partials, scale)  # fmt: skip
    return scale


def _rescale_fake(cond, uncond, guidance, rescale, backend):
    return cond.new_empty(cond.shape[0], dtype=torch.float32)


def _rescale_setup(ctx, inputs, output) -> None:
    cond, uncond, guidance, ctx.rescale, _ = inputs
    ctx.save_for_backward(cond, uncond, guidance)


def _rescale_backward(ctx, grad):
    """d std / d v = (v - mean) / ((n - 1) std)."""
    cond, uncond, guidance = ctx.saved_tensors
    c, u = cond.float(), uncond.float()
    g = per_sample(guidance, c)
    guided = torch.where(g == 1, c, u + g * (c - u))
    freedom = math.prod(c.shape[1:]) - 1

    def spread(v):
        centred = v - per_sample(per_sample_rows(v).mean(1), v)
        return centred, per_sample_rows(centred * centred).sum(1).div(freedom).sqrt()

    centred_c, std_c = spread(c)
    centred_e, std_e = spread(guided)
    grad_c = per_sample(grad * ctx.rescale / (std_e * std_c * freedom), c) * centred_c
    grad_e = per_sample(-grad * ctx.rescale * std_c / (std_e**3 * freedom), c) * centred_e
    grad_g = per_sample_rows(grad_e * (c - u)).sum(1)
    if guidance.numel() == 1:
        grad_g = grad_g.sum().view(1)
    return (
        (grad_c + g * grad_e).to(cond.dtype),
        ((1 - g) * grad_e).to(uncond.dtype),
        grad_g.to(guidance.dtype),
        None,
        None,
    )


LIBRARY.impl("rescale", _rescale_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::rescale", _rescale_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fastgen::rescale", _rescale_backward, setup_context=_rescale_setup, lib=LIBRARY
)
