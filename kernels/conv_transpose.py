"""Transposed convolution as an implicit matrix product, with bias, folded normalisation and
activation on the way out: Dumoulin & Visin, "A guide to convolution arithmetic" (2016), chapter 4.

An output coordinate o is stride * q + phase. All outputs of one phase read the same taps of the
kernel, so each phase is a dense convolution of its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .arithmetic import _floats, bits, exp_any, from_bits, polynomial, to_bfloat16

# Highest power first; the constants of csrc/math/activation.h.
TANH = _floats("-0x1.75e1ccp-8 0x1.52269ap-6 -0x1.b83c5ap-5 0x1.110726p-3 -0x1.555532p-2")
NORMAL = _floats("""0x1.433c88p-4 -0x1.732474p-3 0x1.c2c604p-4 -0x1.122a32p-4 0x1.c7f3d8p-5
                    0x1.adac6ep-4 0x1.5be6d8p-4 -0x1.883b8ap-3 -0x1.3108c0p-1""")

# Not an exact kernel: the product may be contracted.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

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
    return tl.load(values + channel, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def conv_transpose_kernel(
    x, weight, bias, scale, shift, out, slope,
    batch, inputs, outputs,  # channels: of one group
    in_size, out_size, taps, stride, padding, dilation,  # (depth, height, width) each
    x_stride, weight_stride, out_stride,  # (batch or C_in, channel, depth, height, width)
    ACTIVATION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    phases = stride[0] * stride[1] * stride[2]
    phase = tl.program_id(0) % phases
    group = tl.program_id(2)
    phase_d = phase // (stride[1] * stride[2])
    phase_h = phase // stride[2] % stride[1]
    phase_w = phase % stride[2]

    # Rows of the product: (sample, q_d, q_h, q_w).
    size_d = tl.cdiv(out_size[0], stride[0])
    size_h = tl.cdiv(out_size[1], stride[1])
    size_w = tl.cdiv(out_size[2], stride[2])
    m = (tl.program_id(0) // phases).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_w = m % size_w
    q_h = m // size_w % size_h
    q_d = m // size_w // size_h % size_d
    sample = m // size_w // size_h // size_d
    o_d = q_d * stride[0] + phase_d
    o_h = q_h * stride[1] + phase_h
    o_w = q_w * stride[2] + phase_w
    inside = (sample < batch) & (o_d < out_size[0]) & (o_h < out_size[1]) & (o_w < out_size[2])
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = channel < outputs
    k = tl.arange(0, BLOCK_K).to(tl.int64)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap_d in range(taps[0]):
        reach_d = phase_d + padding[0] - tap_d * dilation[0]
        if reach_d % stride[0] == 0:
            i_d = q_d + reach_d // stride[0]
            for tap_h in range(taps[1]):
                reach_h = phase_h + padding[1] - tap_h * dilation[1]
                if reach_h % stride[1] == 0:
                    i_h = q_h + reach_h // stride[1]
                    for tap_w in range(taps[2]):
                        reach_w = phase_w + padding[2] - tap_w * dilation[2]
                        if reach_w % stride[2] == 0:
                            i_w = q_w + reach_w // stride[2]
                            valid = inside & (i_d >= 0) & (i_d < in_size[0])
                            valid = valid & (i_h >= 0) & (i_h < in_size[1])
                            valid = valid & (i_w >= 0) & (i_w < in_size[2])
                            from_x = (
                                sample * x_stride[0] + i_d * x_stride[2] + i_h * x_stride[3]
                                + i_w * x_stride[4]
                            )  # fmt: skip
                            from_w = (
                                tap_d * weight_stride[2] + tap_h * weight_stride[3]
                                + tap_w * weight_stride[4] + channel.to(tl.int64) * weight_stride[1]
                            )  # fmt: skip
                            for start in range(0, inputs, BLOCK_K):
                                c = start + k
                                at = c + group * inputs
                                left = tl.load(
                                    x + from_x[:, None] + (at * x_stride[1])[None, :],
                                    mask=valid[:, None] & (c < inputs)[None, :], other=0.0,
                                )  # fmt: skip
                                right = tl.load(
                                    weight + (at * weight_stride[0])[:, None] + from_w[None, :],
                                    mask=(c < inputs)[:, None] & wanted[None, :], other=0.0,
                                )  # fmt: skip
                                if WIDEN:
                                    left = left.to(tl.float32)
                                    right = right.to(tl.float32)
                                total = tl.dot(left, right, total, input_precision="ieee")

    at = channel.to(tl.int64) + group * outputs
    if bias is not None:
        total = total + per_channel(bias, at, wanted)
    if scale is not None:
        total = total * per_channel(scale, at, wanted)
    if shift is not None:
        total = total + per_channel(shift, at, wanted)
    y = activate(total, ACTIVATION, slope)
    if out.dtype.element_ty == tl.bfloat16:
        y = to_bfloat16(y)
    to = sample * out_stride[0] + o_d * out_stride[2] + o_h * out_stride[3] + o_w * out_stride[4]
    tl.store(
        out + to[:, None] + (at * out_stride[1])[None, :], y.to(out.dtype.element_ty),
        mask=inside[:, None] & wanted[None, :],
    )  # fmt: skip


def _three(values, neutral: int) -> tuple[int, ...]:
    return (neutral,) * (3 - len(values)) + tuple(values)


def _five(strides) -> tuple[int, ...]:
    return (*strides[:2], *_three(strides[2:], 0))


def _blocks(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Powers of two from 16 on, which the matrix units ask for."""

    def block(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    wide = dtype is torch.float32  # whose larger tiles would not fit the registers
    return {
        "BLOCK_M": block(rows, 64),
        "BLOCK_N": block(outputs, 32 if wide else 64),
        "BLOCK_K": block(inputs, 16 if wide else 32),
    }


def conv_transpose(
    input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift,
    activation, negative_slope, out,
) -> None:  # fmt: skip
    """Writes into ``out``, (B, C_out, ...) of any strides; arguments are checked already."""
    if out.numel() == 0:
        return
    stride, padding, dilation = _three(stride, 1), _three(padding, 0), _three(dilation, 1)
    in_size, out_size = _three(input.shape[2:], 1), _three(out.shape[2:], 1)
    batch, outputs, inputs = out.shape[0], weight.shape[1], weight.shape[0] // groups
    rows = batch * math.prod(-(-o // s) for o, s in zip(out_size, stride, strict=True))
    blocks = _blocks(rows, outputs, inputs, input.dtype)
    grid = (
        math.prod(stride) * triton.cdiv(rows, blocks["BLOCK_M"]),
        triton.cdiv(outputs, blocks["BLOCK_N"]),
        groups,
    )
    vectors = [None if v is None else v.contiguous() for v in (bias, scale, shift)]
    with torch.cuda.device(input.device if input.is_cuda else -1):
        conv_transpose_kernel[grid](
            input, weight, *vectors, out, float(negative_slope), batch, inputs, outputs,
            in_size, out_size, _three(weight.shape[2:], 1), stride, padding, dilation,
            _five(input.stride()), _five(weight.stride()), _five(out.stride()),
            ACTIVATION=ACTIVATIONS[activation], WIDEN=not input.is_cuda, **blocks,
            **OPTIONS,
        )  # fmt: skip


def specializations():
    """(name, kernel, arguments) of representative cases, as aot.source reads them."""
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for activation in ("relu", "tanh", "gelu"):
            tensor, vector = f"*{dtype}:16", "*fp32:16"
            folded = vector if activation == "relu" else None
            yield f"conv_transpose {dtype} {activation}", conv_transpose_kernel, {
                "x": tensor, "weight": tensor, "bias": vector, "scale": folded, "shift": folded,
                "out": tensor, "slope": "fp32", "batch": "i32", "inputs": "i32", "outputs": "i32",
                "in_size": (1, "i32", "i32"), "out_size": (1, "i32", "i32"),
                "taps": (1, "i32", "i32"), "stride": (1, "i32", "i32"),
                "padding": ("i32",) * 3, "dilation": (1, 1, 1),
                "x_stride": ("i32",) * 4 + (1,), "weight_stride": ("i32",) * 4 + (1,),
                "out_stride": ("i32",) * 4 + (1,),
                "ACTIVATION": ACTIVATIONS[activation], "WIDEN": False,
                **_blocks(1 << 20, 512, 512, kind),
            }  # fmt: skip
