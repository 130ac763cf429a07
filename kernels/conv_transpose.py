"""Transposed convolution as an implicit matrix product, with bias, folded normalisation and
activation on the way out: Dumoulin & Visin, "A guide to convolution arithmetic" (2016), chapter 4.

An output coordinate is o = stride * q + residue - padding, in each dim. All outputs of one residue
(a phase: one for each dim) read the same taps, at the inputs q + offset: a dense convolution of
their own. Where the kernel is a multiple of the stride all phases read the same inputs, and may
share a product (MERGED), which then has the channels of all phases for columns: one pass over the
input, and full tiles where channels are few.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arithmetic import _floats, bits, exp_any, from_bfloat16, from_bits, polynomial, to_bfloat16

# Highest power first; the constants of csrc/math/activation.h.
TANH = _floats("-0x1.75e1ccp-8 0x1.52269ap-6 -0x1.b83c5ap-5 0x1.110726p-3 -0x1.555532p-2")
NORMAL = _floats("""0x1.433c88p-4 -0x1.732474p-3 0x1.c2c604p-4 -0x1.122a32p-4 0x1.c7f3d8p-5
                    0x1.adac6ep-4 0x1.5be6d8p-4 -0x1.883b8ap-3 -0x1.3108c0p-1""")

OPTIONS = {"enable_fp_fusion": True}  # not an exact kernel: products may be contracted

# Products of which a float32 partial sum is made, which are then added up: one chain of thousands
# would be three times as inexact as cuDNN's blocks.
PARTIAL = 128

ACTIVATIONS = {
    None: 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4, "silu": 5, "gelu": 6,
}  # fmt: skip


@triton.jit
def magnitude(x):
    return from_bits(bits(x) & 0x7FFFFFFF)


@triton.jit
def sigmoid(x):
    e = exp_any(-magnitude(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def tanh_any(x):
    a = magnitude(x)
    e = exp_any(2.0 * a) + 1.0
    far = 1.0 - tl.div_rn(tl.full(e.shape, 2.0, tl.float32), e)
    y = a * a
    near = a + a * y * polynomial(y, TANH, 5)
    return from_bits(bits(tl.where(a < 0.625, near, far)) | (bits(x) & 0x80000000))


@triton.jit
def gelu(x):
    """max(x, 0) - w exp(-a^2 / 2) P(w), a = |x|, w = a / (a + 2)."""
    a = magnitude(x)
    a = tl.where(a > 14.5, 14.5, a)
    head = from_bits(bits(a) & 0xFFFFF000)
    d = -0.5 * ((a - head) * (a + head))
    correction = d + d * d * (0.5 + d * 0.16666667163372040)
    w = tl.div_rn(a, a + 2.0)
    p = polynomial(w, NORMAL, 9) * w
    p = 1.0 + (p + correction * (1.0 + p))
    return tl.where(x < 0.0, 0.0, x) - w * (exp_any(-0.5 * (head * head)) * p)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr, slope):
    if ACTIVATION == 1:
        return tl.where(v < 0.0, 0.0, v)
    elif ACTIVATION == 2:
        return tl.where(v < 0.0, v * slope, v)
    elif ACTIVATION == 3:
        return tanh_any(v)
    elif ACTIVATION == 4:
        return sigmoid(v)
    elif ACTIVATION == 5:
        return v * sigmoid(v)
    elif ACTIVATION == 6:
        return gelu(v)
    else:
        return v


@triton.jit
def per_channel(values, channel, mask):
    return tl.load(values + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def epilogue(v, bias, scale, shift, channel, mask, ACTIVATION: tl.constexpr, slope):
    """``channel``: of each element, in any shape that ``v``'s can be broadcast with."""
    if bias is not None:
        v = v + per_channel(bias, channel, mask)
    if scale is not None:
        v = v * per_channel(scale, channel, mask)
    if shift is not None:
        v = v + per_channel(shift, channel, mask)
    return activate(v, ACTIVATION, slope)


@triton.jit
def store(to, y, mask):
    if to.dtype.element_ty == tl.bfloat16:
        y = to_bfloat16(y)
    tl.store(to, y.to(to.dtype.element_ty), mask=mask)


@triton.jit
def to_tf32(x):
    """To nearest, where the matrix units would cut off."""
    return tl.where(x == x, from_bits((bits(x) + 0x1000) & 0xFFFFE000), x)


@triton.jit
def first_tap(residue, common, inverse, step):
    """The first k with k * dilation = residue modulo the stride, where there is one."""
    return residue // common * inverse % step


@triton.jit
def first_offset(residue, stride, common, inverse, step, back):
    """From q to the input that the first tap reads."""
    return (residue - first_tap(residue, common, inverse, step) * back * common) // stride


@triton.jit
def taps_of(residue, taps, common, inverse, step):
    count = (taps - first_tap(residue, common, inverse, step) + step - 1) // step
    return tl.where((residue % common == 0) & (count > 0), count, 0)


@triton.jit
def accumulate(
    total, begin, end, x, weight, from_x, from_w, q_d, q_h, q_w, first, back, count, step,
    in_size, present, wanted, inputs, x_stride, weight_stride,
    WIDEN: tl.constexpr, TF32: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``total`` and the products of so many blocks of channels, tap by tap."""
    blocks = tl.cdiv(inputs, BLOCK_K)
    for block in range(begin, end):
        tap = block // blocks
        c = block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        t_d = tap // count[2] // count[1]
        t_h = tap // count[2] % count[1]
        t_w = tap % count[2]
        o_d = first[0] - t_d * back[0]
        o_h = first[1] - t_h * back[1]
        o_w = first[2] - t_w * back[2]
        valid = present & (q_d + o_d >= 0) & (q_d + o_d < in_size[0])
        valid = valid & (q_h + o_h >= 0) & (q_h + o_h < in_size[1])
        valid = valid & (q_w + o_w >= 0) & (q_w + o_w < in_size[2])
        to_x = o_d.to(INDEX) * x_stride[2] + o_h.to(INDEX) * x_stride[3]
        to_x = to_x + o_w.to(INDEX) * x_stride[4]
        to_w = (t_d * step[0]).to(INDEX) * weight_stride[2]
        to_w = to_w + (t_h * step[1]).to(INDEX) * weight_stride[3]
        to_w = to_w + (t_w * step[2]).to(INDEX) * weight_stride[4]
        left = tl.load(
            x + (from_x + to_x)[:, None] + (c.to(INDEX) * x_stride[1])[None, :],
            mask=valid[:, None] & (c < inputs)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            weight + (c.to(INDEX) * weight_stride[0])[:, None] + (from_w + to_w)[None, :],
            mask=(c < inputs)[:, None] & wanted[None, :], other=0.0,
        )  # fmt: skip
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        if TF32:
            left = to_tf32(left)
            right = to_tf32(right)
        total = tl.dot(left, right, total, input_precision="tf32" if TF32 else "ieee")
    return total


@triton.jit
def conv_transpose_kernel(
    x, weight, bias, scale, shift, out, partials, slope,
    batch, inputs, outputs,  # channels: of one group
    in_size, out_size, positions, taps, stride, padding,  # (depth, height, width) each
    common, inverse, step, back,  # as Sizes has them
    x_stride, weight_stride, out_stride,  # (batch or C_in, channel, depth, height, width)
    ACTIVATION: tl.constexpr, MERGED: tl.constexpr, WIDEN: tl.constexpr, TF32: tl.constexpr,
    LARGE: tl.constexpr, PARTIAL: tl.constexpr, SPLITS: tl.constexpr, REDUCES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of rows (sample, q) and columns (channels of a phase, or of all phases). With SPLITS,
    a program sums a part of the products, and another launch, which REDUCES, adds the parts.
    LARGE: some tensor reaches beyond 2^31 elements."""
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    phases = stride[0] * stride[1] * stride[2]
    group = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if MERGED:
        row_block = tl.program_id(0)
        phase = row_block * 0
        channel = column % outputs
        of_column = column // outputs
        wanted = column < phases * outputs
    else:
        row_block = tl.program_id(0) // phases
        phase = tl.program_id(0) % phases
        channel = column
        of_column = phase
        wanted = column < outputs
    channel = channel.to(INDEX)
    # Residues: of the program's phase, and of each column's.
    r_d = phase // (stride[1] * stride[2])
    r_h = phase // stride[2] % stride[1]
    r_w = phase % stride[2]
    c_d = of_column // (stride[1] * stride[2])
    c_h = of_column // stride[2] % stride[1]
    c_w = of_column % stride[2]
    if MERGED:  # as many as any of its phases need
        low_d = padding[0] // stride[0]
        low_h = padding[1] // stride[1]
        low_w = padding[2] // stride[2]
    else:
        low_d = (padding[0] - r_d + stride[0] - 1) // stride[0]
        low_h = (padding[1] - r_h + stride[1] - 1) // stride[1]
        low_w = (padding[2] - r_w + stride[2] - 1) // stride[2]

    m = row_block.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = m // positions[2] // positions[1] // positions[0]
    q_d = (m // positions[2] // positions[1] % positions[0]).to(tl.int32) + low_d
    q_h = (m // positions[2] % positions[1]).to(tl.int32) + low_h
    q_w = (m % positions[2]).to(tl.int32) + low_w
    present = sample < batch

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tile = (group * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    in_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    between = (tl.num_programs(0) * tl.num_programs(1)).to(INDEX) * BLOCK_M * BLOCK_N
    if REDUCES:
        between = between * tl.num_programs(2)
        for part in range(REDUCES):
            total += tl.load(
                partials + tile.to(INDEX) * BLOCK_M * BLOCK_N + part * between + in_tile
            )
    else:
        between = between * (tl.num_programs(2) // SPLITS)
        count = (
            taps_of(r_d, taps[0], common[0], inverse[0], step[0]),
            taps_of(r_h, taps[1], common[1], inverse[1], step[1]),
            taps_of(r_w, taps[2], common[2], inverse[2], step[2]),
        )
        first = (
            first_offset(r_d, stride[0], common[0], inverse[0], step[0], back[0]),
            first_offset(r_h, stride[1], common[1], inverse[1], step[1], back[1]),
            first_offset(r_w, stride[2], common[2], inverse[2], step[2], back[2]),
        )
        k_d = first_tap(c_d, common[0], inverse[0], step[0])
        k_h = first_tap(c_h, common[1], inverse[1], step[1])
        k_w = first_tap(c_w, common[2], inverse[2], step[2])
        from_w = channel * weight_stride[1] + k_d.to(INDEX) * weight_stride[2]
        from_w = from_w + k_h.to(INDEX) * weight_stride[3] + k_w.to(INDEX) * weight_stride[4]
        from_x = sample * x_stride[0] + q_d.to(INDEX) * x_stride[2]
        from_x = from_x + q_h.to(INDEX) * x_stride[3] + q_w.to(INDEX) * x_stride[4]
        own = (group * inputs).to(INDEX)
        of_group = x + own * x_stride[1]
        weight_of_group = weight + own * weight_stride[0]
        blocks = count[0] * count[1] * count[2] * tl.cdiv(inputs, BLOCK_K)
        begin = blocks * split // SPLITS
        end = blocks * (split + 1) // SPLITS
        if PARTIAL:
            for at in range(begin, end, PARTIAL):
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                stop = tl.minimum(at + PARTIAL, end)
                total += accumulate(
                    part, at, stop, of_group, weight_of_group, from_x, from_w,
                    q_d, q_h, q_w, first, back, count, step, in_size, present, wanted, inputs,
                    x_stride, weight_stride, WIDEN, TF32, INDEX, BLOCK_K,
                )  # fmt: skip
        else:
            total = accumulate(
                total, begin, end, of_group, weight_of_group, from_x, from_w,
                q_d, q_h, q_w, first, back, count, step, in_size, present, wanted, inputs,
                x_stride, weight_stride, WIDEN, TF32, INDEX, BLOCK_K,
            )  # fmt: skip

    if SPLITS > 1:
        tl.store(partials + tile.to(INDEX) * BLOCK_M * BLOCK_N + split * between + in_tile, total)
    else:
        at = channel + group * outputs
        y = epilogue(total, bias, scale, shift, at[None, :], wanted[None, :], ACTIVATION, slope)
        # (rows, 1), or (rows, columns) where these are of several phases
        if MERGED:
            c_d, c_h, c_w = c_d[None, :], c_h[None, :], c_w[None, :]
        o_d = (q_d.to(INDEX) * stride[0] - padding[0])[:, None] + c_d
        o_h = (q_h.to(INDEX) * stride[1] - padding[1])[:, None] + c_h
        o_w = (q_w.to(INDEX) * stride[2] - padding[2])[:, None] + c_w
        inside = present[:, None] & (o_d >= 0) & (o_d < out_size[0]) & (o_h >= 0)
        inside = inside & (o_h < out_size[1]) & (o_w >= 0) & (o_w < out_size[2])
        to = (sample * out_stride[0])[:, None] + o_d * out_stride[2] + o_h * out_stride[3]
        to = to + o_w * out_stride[4] + (at * out_stride[1])[None, :]
        store(out + to, y, inside & wanted[None, :])


@triton.jit
def channel_epilogue_kernel(
    x, bias, scale, shift, out, slope, rows, columns, channels, blocks,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dense rows of one channel each, or, where channels are LAST, of all."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = (row * columns)[:, None] + column[None, :]
    v = tl.load(x + at, mask=mask, other=0.0)
    v = from_bfloat16(v) if v.dtype == tl.bfloat16 else v.to(tl.float32)
    if LAST:
        channel, there = column[None, :], (column < columns)[None, :]
    else:
        channel, there = (row % channels)[:, None], (row < rows)[:, None]
    store(out + at, epilogue(v, bias, scale, shift, channel, there, ACTIVATION, slope), mask)


# ---- the host's side ----------------------------------------------------------------------------


def _three(values, neutral: int) -> tuple[int, ...]:
    return (neutral,) * (3 - len(values)) + tuple(values)


def _five(strides) -> tuple[int, ...]:
    return (*strides[:2], *_three(strides[2:], 0))


class Sizes(NamedTuple):
    """(depth, height, width) of everything, 1 where a dim is absent."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, input, output, kernel, stride, padding, dilation) -> Sizes:
        # One input position has its taps apart at any stride: then none of them shares an output.
        stride = tuple(
            d * (k - 1) + 1 if n == 1 else s
            for n, k, s, d in zip(input, kernel, stride, dilation, strict=True)
        )
        of_one = (_three(values, 1) for values in (input, output, kernel, stride))
        return cls(*of_one, _three(padding, 0), _three(dilation, 1))

    @property
    def phases(self) -> int:
        return math.prod(self.stride)

    def positions(self, merged: bool) -> tuple[int, ...]:
        """q of a phase, or of all phases together."""
        if merged:
            return tuple(
                (o + p - 1) // s - p // s + 1
                for o, p, s in zip(self.output, self.padding, self.stride, strict=True)
            )
        return tuple(-(-o // s) for o, s in zip(self.output, self.stride, strict=True))

    def can_merge(self) -> bool:
        """Whether all phases read the same inputs."""
        dims = zip(self.kernel, self.stride, self.dilation, strict=True)
        return all(s == 1 or (k % s == 0 and d == 1) for k, s, d in dims)

    def progression(self) -> tuple[tuple[int, ...], ...]:
        """Taps k of a residue r in one dim: r - k * dilation is a multiple of the stride. By dim:
        common = gcd(stride, dilation), of which r is a multiple; the first k is
        r / common * inverse modulo step; from a tap to the next k grows by step, and the input
        goes back by ``back``."""
        common = tuple(map(math.gcd, self.stride, self.dilation))
        step = tuple(s // c for s, c in zip(self.stride, common, strict=True))
        back = tuple(d // c for d, c in zip(self.dilation, common, strict=True))
        return common, tuple(pow(b, -1, s) for b, s in zip(back, step, strict=True)), step, back


class Config(NamedTuple):
    """How a product is cut; the order of its sums depends on ``block_k`` and ``splits`` alone."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    merged: bool = False
    splits: int = 1


FEW_COLUMNS = 64  # of a phase: such tiles read the input again for little
MOST_SPLITS = 16


def configs(
    sizes: Sizes, batch: int, inputs: int, outputs: int, groups: int, activation: str | None,
    dtype: torch.dtype, tf32: bool, processors: int,
) -> list[Config]:  # fmt: skip
    """What is worth trying, the best guess first: the largest tiles that keep ``processors``
    (multiprocessors) busy. Powers of two from 16 on, which the matrix units ask for. Where tiles
    alone are too few, their sums are split: a layer of large weights at batch 1 is bound by
    reading them.
    """
    merged = sizes.can_merge() and outputs < FEW_COLUMNS and sizes.phases > 1
    columns = outputs * (sizes.phases if merged else 1)
    rows = batch * math.prod(sizes.positions(merged))

    def block(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    # The larger a tile, the less is read of the second-level cache, which bounds the product: at
    # the rate of an H200's matrix units tiles of 128 x 256 would read 9 TB/s, of 128 x 128 12.
    light = activation in (None, "relu", "leaky_relu")  # others fill the registers of large tiles
    if dtype is not torch.float32:
        deep = block(inputs, 64)
        large = [(128, 128, 8, 3)] if light else [(128, 64, 8, 3)]
        if light and dtype is torch.bfloat16:  # float16's would spill
            large.insert(0, (128, 256, 8, 3))
        shapes = [*large, (64, 64, 4, 4), (16, 64, 4, 4)]
    else:
        deep = block(inputs, 32)
        large = [(128, 128 if light else 64, 8, 3)] * tf32
        shapes = [*large, (64, 64, 8, 3), (32, 32, 4, 3)]
    found: dict[Config, tuple[bool, bool]] = {}
    taps = math.prod(-(-k // s) for k, s in zip(sizes.kernel, sizes.stride, strict=True))
    products = taps * -(-inputs // deep)  # of a tile, at most
    for block_m, block_n, warps, stages in shapes:
        block_m = block(rows, block_m)
        block_n = block(columns, min(block_n, 4 * block_m))
        tiles = -(-rows // block_m) * -(-columns // block_n) * groups
        tiles *= 1 if merged else sizes.phases
        splits = max(1, min(MOST_SPLITS, processors // tiles, products // 4))
        busy = 4 * tiles * splits >= 3 * processors
        config = Config(block_m, block_n, deep, warps, stages, merged, splits)
        found.setdefault(config, (splits > 1, not busy))
    return sorted(found, key=found.__getitem__)


def _grid(config: Config, sizes: Sizes, batch: int, outputs: int, groups: int):
    rows = batch * math.prod(sizes.positions(config.merged))
    across = 1 if config.merged else sizes.phases
    columns = outputs * (sizes.phases if config.merged else 1)
    return (
        across * triton.cdiv(rows, config.block_m),
        triton.cdiv(columns, config.block_n),
        groups * config.splits,
    )


def _channels_inner(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """With the numbers of ``dim`` side by side: rows of a tile are then read whole."""
    if tensor.stride(dim) == 1 or tensor.shape[dim] == 1:
        return tensor
    return tensor.movedim(dim, -1).contiguous().movedim(-1, dim)


def _reach(tensor: torch.Tensor) -> int:
    """How far its last element lies from its first."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in dims)


def conv_transpose(
    input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift,
    activation, negative_slope, out, config: Config | None = None, tf32: bool = False,
) -> None:  # fmt: skip
    """Writes into ``out``, (B, C_out, ...) of any strides; arguments are checked already.

    config: of ``configs``, the first of which is taken without one. tf32: whether float32 may be
    rounded to that for the product.
    """
    if out.numel() == 0:
        return
    sizes = Sizes.of(input.shape[2:], out.shape[2:], weight.shape[2:], stride, padding, dilation)
    batch, outputs, inputs = out.shape[0], weight.shape[1], weight.shape[0] // groups
    if config is None:
        config = configs(sizes, batch, inputs, outputs, groups, activation, input.dtype, tf32,
                         processors(input.device))[0]  # fmt: skip
    if config.merged and not sizes.can_merge():
        raise ValueError(f"config: {config} merges phases that read other inputs")
    grid = _grid(config, sizes, batch, outputs, groups)
    x, weight = _channels_inner(input, 1), _channels_inner(weight, 1)
    vectors = [None if v is None else v.contiguous() for v in (bias, scale, shift)]
    partials = None
    if config.splits > 1:
        tiles = math.prod(grid) * config.block_m * config.block_n
        partials = torch.empty(tiles, dtype=torch.float32, device=input.device)
    wide = input.dtype is torch.float32
    options = {
        "ACTIVATION": ACTIVATIONS[activation], "MERGED": config.merged,
        "WIDEN": not input.is_cuda, "TF32": wide and tf32,
        "LARGE": max(map(_reach, (x, weight, out))) + grid[0] * config.block_m >= 1 << 31,
        "PARTIAL": PARTIAL // config.block_k if wide and not tf32 else 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS,
    }  # fmt: skip
    launches = [(grid, config.splits, 0)]
    if config.splits > 1:
        launches.append(((*grid[:2], groups), 1, config.splits))
    with torch.cuda.device(input.device if input.is_cuda else -1):
        for programs, splits, reduces in launches:
            conv_transpose_kernel[programs](
                x, weight, *vectors, out, partials, float(negative_slope), batch, inputs, outputs,
                sizes.input, sizes.output, sizes.positions(config.merged), sizes.kernel,
                sizes.stride, sizes.padding, *sizes.progression(),
                _five(x.stride()), _five(weight.stride()), _five(out.stride()),
                SPLITS=splits, REDUCES=reduces, **options,
            )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def channel_epilogue(
    input, out, planar, bias, scale, shift, activation, negative_slope
) -> None:  # fmt: skip
    """``out`` = act(scale * (input + bias) + shift); both (B, C, ...), dense, planar or with their
    channels last."""
    if out.numel() == 0:
        return
    batch, channels = out.shape[:2]
    inner = math.prod(out.shape[2:])
    rows, columns = (batch * channels, inner) if planar else (batch * inner, channels)
    block_n = min(1024, triton.next_power_of_2(columns))
    block_m = max(1, 2048 // block_n)
    blocks = triton.cdiv(columns, block_n)
    vectors = [None if v is None else v.contiguous() for v in (bias, scale, shift)]
    with torch.cuda.device(input.device if input.is_cuda else -1):
        channel_epilogue_kernel[(triton.cdiv(rows, block_m) * blocks,)](
            input, *vectors, out, float(negative_slope), rows, columns, channels, blocks,
            ACTIVATION=ACTIVATIONS[activation], LAST=not planar, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=4, **OPTIONS,
        )  # fmt: skip


def specializations():
    """(name, kernel, arguments) of representative cases, as aot.source reads them."""
    layers = {  # input size, channels in and out, batch, activation
        "square": (16, 256, 256, 64, "relu"),
        "gelu": (16, 256, 256, 64, "gelu"),
        "few outputs": (32, 128, 3, 64, "tanh"),
        "split": (4, 1024, 512, 1, "relu"),
    }
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
             "tf32": torch.float32}  # fmt: skip
    for kind, dtype in kinds.items():
        for layer, (size, inputs, outputs, batch, activation) in layers.items():
            sizes = Sizes.of((size,) * 2, (2 * size,) * 2, (4, 4), (2, 2), (1, 1), (1, 1))
            found = configs(sizes, batch, inputs, outputs, 1, activation, dtype, kind == "tf32",
                            132)  # fmt: skip
            for config in found if layer == "square" else found[:1]:
                title = f"conv_transpose {kind} {layer} {config.block_m}x{config.block_n}"
                yield title, conv_transpose_kernel, _specialized(kind, config, layer, activation)
    usual = _specialized("bf16", Config(64, 64, 64, 4, 4), "square", "relu")
    line, numbers = (1, 1, "i32"), ("i32",) * 3
    others = {
        "reduces": {"REDUCES": 8, "partials": "*fp32:16"},
        "signal": {
            "in_size": line, "out_size": line, "positions": line, "taps": line, "stride": line,
            "step": line, "padding": numbers, "inverse": ("i32", "i32", 1), "MERGED": True,
            "x_stride": ("i32:16", 1, "i32", "i32", "i32:16"),
            "out_stride": ("i32:16", "i32", 1, 1, 1),
        },
        "volume, dilated": {
            "in_size": numbers, "out_size": numbers, "positions": numbers, "taps": numbers,
            "stride": numbers, "padding": (1, 1, 1), "common": numbers, "inverse": numbers,
            "step": numbers, "back": numbers, "LARGE": True,
        },
    }  # fmt: skip
    for name, changed in others.items():
        yield f"conv_transpose bf16 {name}", conv_transpose_kernel, usual | changed
    for kind, last in itertools.product(("fp32", "bf16"), (False, True)):
        vector = "*fp32:16"
        yield f"channel_epilogue {kind}{' last' * last}", channel_epilogue_kernel, {
            "x": f"*{kind}:16", "bias": None, "scale": vector, "shift": vector,
            "out": f"*{kind}:16", "slope": "fp32", "rows": "i32:16", "columns": "i32:16",
            "channels": "i32:16", "blocks": "i32", "ACTIVATION": ACTIVATIONS["relu"],
            "LAST": last, "BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4,
        }  # fmt: skip


def _specialized(kind: str, config: Config, layer: str, activation: str) -> dict:
    few = layer == "few outputs"
    tensor, vector = f"*{kind}:16".replace("tf32", "fp32"), "*fp32:16"
    whole = "i32" if few else "i32:16"
    return {
        "x": tensor, "weight": tensor, "bias": vector if few else None,
        "scale": None if few else vector, "shift": None if few else vector, "out": tensor,
        "partials": vector if layer == "split" else None, "slope": "fp32", "batch": "i32",
        "inputs": "i32:16", "outputs": whole, "in_size": (1, "i32", "i32"),
        "out_size": (1, "i32", "i32"), "positions": (1, "i32", "i32"), "taps": (1, "i32", "i32"),
        "stride": (1, "i32", "i32"), "padding": ("i32", 1, 1), "common": (1, 1, 1),
        "inverse": ("i32", 1, 1), "step": (1, "i32", "i32"), "back": (1, 1, 1),
        "x_stride": ("i32:16", 1, "i32:16", "i32:16", "i32:16"),
        "weight_stride": (whole, 1, whole, whole, whole),
        "out_stride": (whole, 1, whole, whole, whole),
        "ACTIVATION": ACTIVATIONS[activation],
        "MERGED": config.merged, "WIDEN": False, "TF32": kind == "tf32", "LARGE": False,
        "PARTIAL": PARTIAL // config.block_k if kind == "fp32" else 0, "SPLITS": config.splits,
        "REDUCES": 0, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
