"""The step kernel: guidance, estimate of x_0, clip, linear combination and noise in one pass."""

from __future__ import annotations

import struct
from functools import lru_cache

import triton
import triton.language as tl

from . import tile as tiles
from .arithmetic import CHUNK, exp_any, from_bits

# Words of a row (csrc/params.h, StepRow): 8 of them, then 12 weights and 4 noise weights an output.
HEAD, INPUTS, NOISES = tl.constexpr(8), tl.constexpr(12), tl.constexpr(4)
ROW = tl.constexpr(72)
X, E, U, DENOISED, KNOWN, HISTORY = (tl.constexpr(i) for i in range(6))


@lru_cache(maxsize=4096)
def _unpack(row: bytes, outputs: int) -> tuple[tuple, tuple, tuple]:
    """(denoise, clip and logvar words; weights of each output; noise weights of each output)"""
    words = struct.unpack("72f", row)
    weights = tuple(words[8 + 12 * j : 20 + 12 * j] for j in range(outputs))
    noise_weights = tuple(words[56 + 4 * j : 60 + 4 * j] for j in range(outputs))
    return words[:6], weights, noise_weights


@lru_cache(maxsize=4096)
def _noises(row: bytes, outputs: int) -> int:
    """One more than the last noise that an output has a weight for."""
    noise_weights = _unpack(row, outputs)[2]
    return max((m + 1 for each in noise_weights for m in range(4) if each[m] != 0.0), default=0)


@triton.jit
def _words(row, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(row + i),)
    return values


@triton.jit
def _load_row(row, OUTPUTS: tl.constexpr):
    weights = ()
    noise_weights = ()
    for j in tl.static_range(OUTPUTS):
        weights = weights + (_words(row + HEAD + j * INPUTS, INPUTS),)
        noise_weights = noise_weights + (_words(row + HEAD + 4 * INPUTS + j * NOISES, NOISES),)
    return _words(row, 6), weights, noise_weights


@triton.jit
def _wanted(weights, out, k: tl.constexpr):
    """Whether any output has a use for term k."""
    wanted = tl.full((), False, tl.int1)
    for j in tl.static_range(len(weights)):
        if out[j] is not None:
            wanted = wanted | (weights[j][k] != 0.0)
    return wanted


@triton.jit
def _add(sums, weights, k: tl.constexpr, value):
    """sums[j] + weights[j][k] value for every output j that has such a weight."""
    results = ()
    for j in tl.static_range(len(sums)):
        weight = weights[j][k]
        results = results + (tl.where(weight != 0.0, sums[j] + weight * value, sums[j]),)
    return results


@triton.jit(do_not_specialize=["elements", "chunks", "guidance_scale", *tiles.KEY])
def step_kernel(
    sizes, strides, elements, chunks, x, cond, uncond, known, logvar, history, noise, out,
    row, rows, row_stride, row_pointer, guidance_scale, guidance, guidance_stride, output_scale,
    seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams,
    seeds, sample_ids, step_pointer,
    HISTORIES: tl.constexpr, NOISE_TERMS: tl.constexpr, OUTPUTS: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    tile = tiles.tile_of(sizes, elements, chunks, WIDE, ALIGN)
    sample = tile[0]
    # The places of tensors in `strides`.
    AT_X: tl.constexpr = OUTPUTS
    AT_COND: tl.constexpr = AT_X + 1
    AT_UNCOND: tl.constexpr = AT_X + 2
    AT_KNOWN: tl.constexpr = AT_X + 3
    AT_LOGVAR: tl.constexpr = AT_X + 4
    AT_HISTORY: tl.constexpr = AT_X + 5
    AT_NOISE: tl.constexpr = AT_HISTORY + HISTORIES
    if rows is not None:
        first = sample * row_stride
        if row_pointer is not None:
            first += tl.load(row_pointer)
        row = _load_row(rows + first * ROW, OUTPUTS)
    head, weights, noise_weights = row
    denoise_x, denoise_e, clip_low, clip_high, logvar_scale, logvar_offset = head
    # -0.0, the neutral element of addition; by its bits, since tl.full may drop the sign.
    zero = from_bits(tl.full((CHUNK,), 0x80000000, tl.uint32))
    sums = ()
    for _ in tl.static_range(OUTPUTS):
        sums = sums + (zero,)

    wants_d = _wanted(weights, out, DENOISED)
    d = zero
    if x is not None:
        wants_x = _wanted(weights, out, X) | (wants_d & (denoise_x != 0.0))
        value = tiles.load(x, strides, AT_X, tile, wants_x, ALIGN)
        d = tl.where(denoise_x != 0.0, denoise_x * value, d)
        sums = _add(sums, weights, X, value)
    wants_e = _wanted(weights, out, E) | (wants_d & (denoise_e != 0.0))
    g = tl.full((), guidance_scale, tl.float32)
    if guidance is not None:
        g = tl.load(guidance + sample * guidance_stride)
    if uncond is not None:
        wants_u = _wanted(weights, out, U) | (wants_e & (g != 1.0))
        u = tiles.load(uncond, strides, AT_UNCOND, tile, wants_u, ALIGN)
    if cond is not None:
        e = tiles.load(cond, strides, AT_COND, tile, wants_e, ALIGN)
        if uncond is not None:
            e = tl.where(g == 1.0, e, u + g * (e - u))
        if output_scale is not None:
            e = tl.load(output_scale + sample) * e
        d = tl.where(denoise_e != 0.0, d + denoise_e * e, d)
        sums = _add(sums, weights, E, e)
    if uncond is not None:
        sums = _add(sums, weights, U, u)
    if x is not None or cond is not None:
        d = tl.where(d < clip_low, clip_low, d)
        d = tl.where(d > clip_high, clip_high, d)
        sums = _add(sums, weights, DENOISED, d)
    if known is not None:
        wanted = _wanted(weights, out, KNOWN)
        value = tiles.load(known, strides, AT_KNOWN, tile, wanted, ALIGN)
        sums = _add(sums, weights, KNOWN, value)
    for i in tl.static_range(HISTORIES):
        if history[i] is not None:
            wanted = _wanted(weights, out, HISTORY + i)
            value = tiles.load(history[i], strides, AT_HISTORY + i, tile, wanted, ALIGN)
            sums = _add(sums, weights, HISTORY + i, value)

    for m in tl.static_range(NOISE_TERMS):
        if noise[m] is not None or seed_low is not None:
            wanted = _wanted(noise_weights, out, m)
            z = tl.zeros((CHUNK,), tl.float32)
            if wanted:
                if noise[m] is not None:
                    z = tiles.load(noise[m], strides, AT_NOISE + m, tile, True, ALIGN)
                else:
                    key = (seed_low, seed_high, id_low, id_high, noise_step, seed_stride, streams)
                    z = tiles.draw(key, seeds, sample_ids, step_pointer, m, tile, VECTOR)
                if m == 0 and logvar is not None:
                    value = tiles.load(logvar, strides, AT_LOGVAR, tile, True, ALIGN)
                    z = exp_any(0.5 * (logvar_scale * value + logvar_offset)) * z
            sums = _add(sums, noise_weights, m, z)

    if OUTPUTS > 1:  # an output may be an input, read by another thread
        tl.debug_barrier()
    for j in tl.static_range(OUTPUTS):
        if out[j] is not None:
            tiles.store(out[j], strides, j, tile, sums[j], ALIGN)


def step(
    shape, x, cond, uncond, known, logvar, history, given_noise, out, row, rows, row_pointer,
    guidance, output_scale, seed, sample_ids, noise_step, streams,
):  # fmt: skip
    """Writes every tensor of `out`; the arguments are those of csrc/module.cpp.

    row: 72 packed float32, or the row stride (0 or 1) in `rows`, float32 (R, 72), counted from
    `row_pointer` (int64) on. guidance: a float or (float32 tensor, stride). output_scale: None or
    (B,) float32. seed: None, an int or (int64 tensor, stride).

    Raises:
        ValueError: the tensors' common layout needs more than 8 dims.
    """
    draws = seed is not None
    per_sample = draws or output_scale is not None
    by_value = isinstance(row, bytes)
    if not by_value:
        per_sample |= row != 0
    if isinstance(guidance, float):
        guidance = (guidance, None, 0)
    else:
        guidance = (1.0, *guidance)
        per_sample |= guidance[2] != 0
    noises = max(len(given_noise), len(streams) if draws else 0)
    if by_value:  # fewer to compile for; one stays, as a plan's last row alone may have none
        noises = min(noises, max(1, _noises(row, len(out))))
    given_noise = (given_noise + (None,) * noises)[:noises]
    operands = tiles.Operands(
        shape, ordered=draws, per_sample=per_sample, out=out, x=x, cond=cond, uncond=uncond,
        known=known, logvar=logvar, history=history, noise=given_noise,
    )  # fmt: skip
    operands.launch(
        step_kernel,
        row=_unpack(row, len(out)) if by_value else None,
        rows=None if by_value else rows,
        row_stride=0 if by_value else row,
        row_pointer=None if by_value else row_pointer,
        guidance_scale=guidance[0],
        guidance=guidance[1],
        guidance_stride=guidance[2],
        output_scale=output_scale,
        **tiles.noise_key(seed, sample_ids, noise_step, row_pointer, streams),
        HISTORIES=len(history),
        NOISE_TERMS=noises,
        OUTPUTS=len(out),
    )


def specializations():
    """(name, kernel, arguments) of representative cases, as aot.source reads them."""

    def case(name, inputs, outputs, noises=0, history=(), *, rows=True, dims=0, **more):
        tensors = dict.fromkeys(("x", "cond", "uncond", "known", "logvar"))
        tensors |= {key: f"*{dtype}:16" for key, dtype in inputs.items()}
        words = ("fp32",) * 6, (("fp32",) * 12,) * len(outputs), (("fp32",) * 4,) * len(outputs)
        places = len(outputs) + 5 + len(history) + noises if dims else 0
        return name, step_kernel, tensors | {
            **tiles.dense_arguments(*inputs.values(), *outputs), **tiles.drawing_arguments(),
            "sizes": ("i32",) * dims, "strides": (("i32",) * (1 + dims),) * places,
            "history": tuple(f"*{dtype}:16" for dtype in history), "noise": (None,) * noises,
            "out": tuple(f"*{dtype}:16" for dtype in outputs),
            "row": None if rows else words, "rows": "*fp32:16" if rows else None,
            "row_stride": 0, "row_pointer": "*i64:16" if rows else None,
            "guidance_scale": "fp32", "guidance": None, "guidance_stride": 0,
            "output_scale": None,
            "HISTORIES": len(history), "NOISE_TERMS": noises, "OUTPUTS": len(outputs),
        } | more  # fmt: skip

    for dtype in ("fp32", "bf16", "fp16"):
        guided = dict.fromkeys(("x", "cond", "uncond"), dtype)
        yield case(f"ddpm {dtype}", guided, (dtype,), 1, rows=False)
        if dtype != "fp16":
            yield case(f"randn {dtype}", {}, (dtype,), 1, rows=False)
            yield case(f"multistep {dtype}", guided, (dtype, "fp32"), 1, ("fp32", "fp32"))
    yield case("mixed", {"x": "fp32", "cond": "bf16", "uncond": "bf16"}, ("fp32", "bf16"), 1)
    every = dict.fromkeys(("x", "cond", "uncond", "known", "logvar"), "fp32")
    yield case(
        "everything", every, ("fp32",) * 4, 4, ("fp32",) * 7, output_scale="*fp32:16",
        guidance="*fp32:16", guidance_stride=1, row_stride=1,
        seeds="*i64:16", sample_ids="*i64:16", step_pointer="*i64:16",
    )  # fmt: skip
    yield case("strided", {"x": "fp32", "cond": "bf16"}, ("fp32",), 1, dims=4, ALIGN=1)
    yield case("strided rows", {"x": "fp32", "cond": "bf16"}, ("fp32",), 1, dims=4)
