"""The per-sample factor of guidance rescale: Lin et al., "Common diffusion noise schedules and
sample steps are flawed" (2024), equations 15 and 16."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tile as tiles
from .arithmetic import CHUNK, sum_chunk, sum_tree


@triton.jit
def _moments(values, mask, count):
    """(sum, sum of squared distances to the chunk's own mean)"""
    total = sum_chunk(tl.where(mask, values, 0.0))
    distance = values - tl.div_rn(total, count)
    return total, sum_chunk(tl.where(mask, distance * distance, 0.0))


@triton.jit(do_not_specialize=["elements", "chunks", "guidance_scale"])
def moments_kernel(
    sizes, strides, elements, chunks, cond, uncond, guidance_scale, guidance, guidance_stride,
    partials,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    tile = tiles.tile_of(sizes, elements, chunks, WIDE, ALIGN)
    sample, start, elements, mask, index = tile
    g = tl.full((), guidance_scale, tl.float32)
    if guidance is not None:
        g = tl.load(guidance + sample * guidance_stride)
    c = tiles.load(cond, strides, 0, tile, True, ALIGN)
    wants_u = tl.full((), True, tl.int1) & (g != 1.0)
    u = tiles.load(uncond, strides, 1, tile, wants_u, ALIGN)
    guided = tl.where(g == 1.0, c, u + g * (c - u))
    count = tl.minimum(elements - start, CHUNK).to(tl.float32)
    to = partials + sample * 5 * chunks + start // CHUNK
    total, centred = _moments(c, mask, count)
    tl.store(to, total)
    tl.store(to + chunks, centred)
    total, centred = _moments(guided, mask, count)
    tl.store(to + 2 * chunks, total)
    tl.store(to + 3 * chunks, centred)


@triton.jit
def _standard_deviation(sums, centred, between, chunks, elements):
    """Unbiased: M2 of all = sum of the chunks' M2 + sum of count (chunk mean - mean)^2.

    Chan et al., "Algorithms for computing the sample variance" (1983).
    """
    lane = tl.arange(0, CHUNK)
    for first in range(0, chunks, CHUNK):
        c = first + lane
        tl.store(between + c, tl.load(sums + c, mask=c < chunks), mask=c < chunks)
    tl.debug_barrier()
    mean = tl.div_rn(sum_tree(between, chunks), elements.to(tl.float32))
    tl.debug_barrier()
    for first in range(0, chunks, CHUNK):
        c = first + lane
        count = tl.minimum(elements - c.to(tl.int64) * CHUNK, CHUNK).to(tl.float32)
        distance = tl.div_rn(tl.load(sums + c, mask=c < chunks, other=0.0), count) - mean
        tl.store(between + c, count * (distance * distance), mask=c < chunks)
    tl.debug_barrier()
    total = sum_tree(centred, chunks) + sum_tree(between, chunks)
    tl.debug_barrier()
    return tl.sqrt_rn(tl.div_rn(total, (elements - 1).to(tl.float32)))


@triton.jit(do_not_specialize=["elements", "chunks", "rescale"])
def rescale_kernel(partials, elements, chunks, rescale, scale):
    """One program a sample: the factor from the moments of its chunks."""
    elements = tl.cast(elements, tl.int64)
    sample = tl.program_id(0).to(tl.int64)
    partials += sample * 5 * chunks
    between = partials + 4 * chunks
    of_cond = 0.0
    of_guided = 0.0
    for i in range(2):  # of cond, then of guided
        sums = partials + 2 * i * chunks
        of_cond = of_guided
        of_guided = _standard_deviation(sums, sums + chunks, between, chunks, elements)
    rescale = tl.full((), rescale, tl.float32)
    factor = rescale * tl.div_rn(of_cond, of_guided) + (1.0 - rescale)
    tl.store(scale + sample, factor)


def rescale(shape, cond, uncond, guidance, factor, partials, scale):
    """Writes `scale`; the arguments are those of csrc/module.cpp.

    guidance: a float or (float32 tensor, stride). partials: float32 (B, 5, chunks) to work in.
    scale: float32 (B,).

    Raises:
        ValueError: the tensors' common layout needs more than 8 dims.
    """
    guidance = (guidance, None, 0) if isinstance(guidance, float) else (1.0, *guidance)
    operands = tiles.Operands(shape, cond=cond, uncond=uncond)
    operands.launch(
        moments_kernel,
        guidance_scale=guidance[0],
        guidance=guidance[1],
        guidance_stride=guidance[2],
        partials=partials,
    )
    if operands.layout.elements == 0:
        scale.fill_(float("nan"))
    else:
        operands.launch_per_sample(
            rescale_kernel,
            partials=partials,
            elements=operands.layout.elements,
            chunks=operands.layout.chunks,
            rescale=float(factor),
            scale=scale,
        )


def specializations():
    """(name, kernel, arguments) of representative cases, as aot.source reads them."""
    for dtype in ("fp32", "bf16"):
        yield f"moments {dtype}", moments_kernel, {
            "cond": f"*{dtype}:16", "uncond": f"*{dtype}:16", "partials": "*fp32:16",
            "guidance_scale": "fp32", "guidance": None, "guidance_stride": 0,
            **tiles.dense_arguments(dtype),
        }  # fmt: skip
    yield "rescale", rescale_kernel, {
        "partials": "*fp32:16", "elements": "i32", "chunks": "i32", "rescale": "fp32",
        "scale": "*fp32:16",
    }  # fmt: skip
