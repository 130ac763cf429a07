"""z = mean + exp(logvar / 2) eps with the KL divergence to N(0, 1), and the gradients of both.

Kingma & Welling, "Auto-encoding variational Bayes" (2014), section 2.4 and appendix B.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tile as tiles
from .arithmetic import CHUNK, exp_any, sum_chunk, sum_tree

UNSPECIALIZED = ["elements", "chunks", "clamp_low", "clamp_high", *tiles.KEY]


@triton.jit
def _deviation(logvar, low, high):
    """(clamped log-variance, exp of half of it)"""
    clamped = tl.where(logvar < low, low, logvar)
    clamped = tl.where(clamped > high, high, clamped)
    return clamped, exp_any(0.5 * clamped)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    sizes, strides, elements, chunks, mean, logvar, noise, out, partials, clamp_low, clamp_high,
    seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams,
    seeds, sample_ids, step_pointer,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    tile = tiles.tile_of(sizes, elements, chunks, WIDE, ALIGN)
    mu = tiles.load(mean, strides, 1, tile, True, ALIGN)
    clamped, deviation = _deviation(
        tiles.load(logvar, strides, 2, tile, True, ALIGN), clamp_low, clamp_high
    )
    if partials is not None:
        divergence = ((mu * mu + deviation * deviation) - 1.0) - clamped
        divergence = tl.where(tile[3], divergence, 0.0)
        tl.store(partials + tl.program_id(0), sum_chunk(divergence))
    if out is not None:
        if noise is not None:
            z = tiles.load(noise, strides, 3, tile, True, ALIGN)
        else:
            key = (seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams)
            z = tiles.draw(key, seeds, sample_ids, step_pointer, 0, tile, VECTOR)
        tiles.store(out, strides, 0, tile, mu + deviation * z, ALIGN)


@triton.jit(do_not_specialize=["chunks"])
def divergence_kernel(partials, chunks, kl):
    """One program a sample: half the tree's sum over its chunks."""
    sample = tl.program_id(0).to(tl.int64)
    tl.store(kl + sample, 0.5 * sum_tree(partials + sample * chunks, chunks))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    sizes, strides, elements, chunks, mean, logvar, noise, grad_out, grad_kl, grad_mean,
    grad_logvar, grad_noise, clamp_low, clamp_high,
    seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams,
    seeds, sample_ids, step_pointer,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    tile = tiles.tile_of(sizes, elements, chunks, WIDE, ALIGN)
    given = tiles.load(logvar, strides, 1, tile, True, ALIGN)
    clamped, deviation = _deviation(given, clamp_low, clamp_high)
    grad = tl.zeros((CHUNK,), tl.float32)
    if grad_out is not None:
        grad = tiles.load(grad_out, strides, 3, tile, True, ALIGN)
    if grad_kl is not None:
        of_kl = tl.load(grad_kl + tile[0])
    if grad_mean is not None:
        of_mean = grad
        if grad_kl is not None:
            of_mean = of_mean + of_kl * tiles.load(mean, strides, 0, tile, True, ALIGN)
    if grad_logvar is not None:
        of_logvar = tl.zeros((CHUNK,), tl.float32)
        if grad_out is not None:
            if noise is not None:
                z = tiles.load(noise, strides, 2, tile, True, ALIGN)
            else:
                key = (seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams)
                z = tiles.draw(key, seeds, sample_ids, step_pointer, 0, tile, VECTOR)
            of_logvar = 0.5 * (grad * (deviation * z))
        if grad_kl is not None:
            of_logvar = of_logvar + (0.5 * of_kl) * (deviation * deviation - 1.0)
        of_logvar = tl.where((clamped < given) | (clamped > given), 0.0, of_logvar)
        tiles.store(grad_logvar, strides, 5, tile, of_logvar, ALIGN)
    if grad_noise is not None:
        tiles.store(grad_noise, strides, 6, tile, grad * deviation, ALIGN)
    if grad_mean is not None:
        tiles.store(grad_mean, strides, 4, tile, of_mean, ALIGN)


def reparameterize(
    shape, mean, logvar, noise, out, kl, partials, clamp, seed, sample_ids, noise_step,
    noise_stream,
):  # fmt: skip
    """Writes `out` and `kl`, where given; the arguments are those of csrc/module.cpp.

    kl: float32 (B,), with `partials` float32 (B, chunks) to work in. clamp: (low, high).

    Raises:
        ValueError: the tensors' common layout needs more than 8 dims.
    """
    operands = tiles.Operands(shape, out=out, mean=mean, logvar=logvar, noise=noise)
    operands.launch(
        forward_kernel,
        partials=partials if kl is not None else None,
        clamp_low=float(clamp[0]),
        clamp_high=float(clamp[1]),
        **tiles.noise_key(seed, sample_ids, noise_step, None, (noise_stream,)),
    )
    if kl is None:
        return
    if operands.layout.elements == 0:
        kl.zero_()
    else:
        operands.launch_per_sample(
            divergence_kernel, partials=partials, chunks=operands.layout.chunks, kl=kl
        )


def reparameterize_backward(
    shape, mean, logvar, noise, grad_out, grad_kl, grad_mean, grad_logvar, grad_noise, clamp,
    seed, sample_ids, noise_step, noise_stream,
):  # fmt: skip
    """Writes the gradients that are given; the arguments are those of csrc/module.cpp."""
    operands = tiles.Operands(
        shape, mean=mean, logvar=logvar, noise=noise, grad_out=grad_out, grad_mean=grad_mean,
        grad_logvar=grad_logvar, grad_noise=grad_noise,
    )  # fmt: skip
    operands.launch(
        backward_kernel,
        grad_kl=grad_kl,
        clamp_low=float(clamp[0]),
        clamp_high=float(clamp[1]),
        **tiles.noise_key(seed, sample_ids, noise_step, None, (noise_stream,)),
    )


def specializations():
    """(name, kernel, arguments) of representative cases, as aot.source reads them."""
    for dtype in ("fp32", "bf16"):
        tensor = f"*{dtype}:16"
        common = {
            "mean": tensor, "logvar": tensor, "noise": None,
            "clamp_low": "fp32", "clamp_high": "fp32",
            **tiles.dense_arguments(dtype), **tiles.drawing_arguments(),
        }  # fmt: skip
        forward = common | {"out": tensor, "partials": None}
        yield f"reparameterize {dtype}", forward_kernel, forward
        with_kl = forward | {"partials": "*fp32:16"}
        yield f"reparameterize with kl {dtype}", forward_kernel, with_kl
        backward = common | {
            "grad_out": tensor, "grad_kl": "*fp32:16", "grad_mean": tensor,
            "grad_logvar": tensor, "grad_noise": None,
        }  # fmt: skip
        yield f"reparameterize backward {dtype}", backward_kernel, backward
    tree = {"partials": "*fp32:16", "chunks": "i32", "kl": "*fp32:16"}
    yield "divergence", divergence_kernel, tree
