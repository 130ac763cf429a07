"""The CPU backend of ``conv_transpose``, in one of two ways, by what was measured to be faster.

- columns: every weight tap times every input position, with the weights as they lie in memory, then
  a pass that gathers the taps of each output element; both native. For few input positions, where
  PyTorch's own operator spends its time on repacking weights at every call, and for few output
  channels, where it leaves most of the vector units idle.
- direct: PyTorch's operator, then one native pass in place for the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference.conv_transpose import ACTIVATIONS

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as enum Activation in csrc/params.h

FEW_POSITIONS = 16  # of input, batch included
# As many where PyTorch's repacked weights get memory of their own from the system, and give it
# back, at every call: glibc does so from 32 MiB on.
FEW_POSITIONS_OF_LARGE_WEIGHTS, LARGE_WEIGHTS = 128, 32 << 20  # bytes
FEW_ROWS = 64  # output channels times taps
COLUMN_ELEMENTS = 1 << 20  # of the product at a time, where there are many positions


def memory_format(input: Tensor) -> torch.memory_format:
    """Of the output: channels_last where the input is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    if last is None or input.is_contiguous() or not input.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def product_dtype(input: Tensor) -> torch.dtype:
    """What the matrix products are done in: PyTorch's float16 on the CPU is ten times slower."""
    return torch.float32 if input.is_cpu and input.dtype is torch.float16 else input.dtype


@functools.lru_cache(maxsize=512)
def _geometry(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(output sizes, the eighteen numbers that the kernel takes: depth first, 1 where absent)."""
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(
            sizes, kernel, stride, padding, output_padding, dilation, strict=True
        )
    )
    absent = 3 - len(sizes)
    numbers: tuple[int, ...] = ()
    for values, neutral in (
        (sizes, 1), (out, 1), (kernel, 1), (stride, 1), (padding, 0), (dilation, 1),
    ):  # fmt: skip
        numbers += (neutral,) * absent + values
    return out, numbers


def _are_few(positions: int, weight: Tensor) -> bool:
    large = 4 * weight.numel() >= LARGE_WEIGHTS
    return positions <= (FEW_POSITIONS_OF_LARGE_WEIGHTS if large else FEW_POSITIONS)


def _floats(values: Tensor | None) -> Tensor | None:
    if values is None or (values.dtype is torch.float32 and values.is_contiguous()):
        return values
    return values.float().contiguous()


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    negative_slope: float,
    out: Tensor | None,
) -> Tensor:
    """``out``, or a new tensor where it is None; plain tensors, checked already."""
    sizes, kernel = input.shape[2:], weight.shape[2:]
    batch, channels = input.shape[0], weight.shape[1] * groups
    rows = channels * kernel.numel()
    few = rows <= FEW_ROWS or _are_few(batch * sizes.numel(), weight)
    by_columns = groups == 1 and few and (input.dtype is not torch.bfloat16 or rows <= FEW_ROWS)
    result, empty = out, batch == 0 or channels == 0
    if by_columns or empty:
        out_sizes, numbers = _geometry(
            tuple(sizes), tuple(kernel), tuple(stride), tuple(padding), tuple(output_padding),
            tuple(dilation),
        )  # fmt: skip
        if result is None:
            shape = (batch, channels, *out_sizes)
            result = torch.empty(shape, dtype=input.dtype, memory_format=memory_format(input))
        if empty:
            return result
    epilogue = (CODES[activation], negative_slope, torch.get_num_threads())
    if by_columns and result is not None:
        vectors = (_floats(bias), _floats(scale), _floats(shift))
        _by_columns(input, weight, numbers, (*vectors, *epilogue), result)
    else:
        dtype = product_dtype(input)
        inside = bias is not None and bias.dtype is dtype
        if dtype is not input.dtype:
            x, weight = input.to(dtype), weight.to(dtype)
        else:
            x = input
        y = torch.convolution(x, weight, bias if inside else None, stride, padding, dilation, True,
                              output_padding, groups)  # fmt: skip
        vectors = (None if inside else _floats(bias), _floats(scale), _floats(shift))
        result = _finish(y, input, activation, (*vectors, *epilogue), result)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return result


def _by_columns(
    input: Tensor, weight: Tensor, numbers: tuple[int, ...], epilogue: tuple, out: Tensor
) -> None:
    batch, channels = out.shape[:2]
    positions, taps = math.prod(input.shape[2:]), math.prod(weight.shape[2:])
    threads = epilogue[-1]
    # Where the weights lie with their output channels innermost, so do the rows of the product.
    last = weight.ndim > 3 and weight.stride(1) == 1 and not weight.is_contiguous()
    weight = weight.movedim(1, -1) if last else weight  # (C_in, ...), dense below
    weight = weight.float().contiguous()
    depth, rows = weight.shape[0], channels * taps
    native = backends.native()
    apart = numbers[3:6] == numbers[6:9] and not any(numbers[12:15]) and numbers[15:] == (1, 1, 1)
    if positions == 1 and apart and rows % 16 == 0 and not last:
        # Nothing overlaps: the product is the output, samples first.
        dense = out.is_contiguous()
        direct = dense and out.dtype is torch.float32
        product = out if direct else out.new_empty(out.shape, dtype=torch.float32)
        x = input.flatten(1).t().float().contiguous()  # (C_in, B)
        native.conv_transpose_product(x, weight, product, 1, depth, batch, rows, threads)
        target = out if dense else product
        native.channel_epilogue(product, target, batch, channels, taps, *epilogue)
        if not dense:
            out.copy_(product)
        return
    few = _are_few(batch * positions, weight)
    samples = batch if few else max(1, min(batch, COLUMN_ELEMENTS // (rows * positions)))
    room: Tensor | None = None
    for first in range(0, batch, samples):
        part = out[first : first + samples] if samples < batch else out
        x = input[first : first + samples] if samples < batch else input
        x = x.flatten(2)
        x = x.transpose(0, 1).flatten(1)[None] if few else x  # few: all samples side by side
        if x.shape[2] % 16 and x.shape[2] != 1:  # what the vector units take
            x = F.pad(x, (0, -x.shape[2] % 16))
        x = x.float().contiguous()
        count, _, width = x.shape
        if room is None:
            room = torch.empty(count * rows * width, dtype=torch.float32)
        native.conv_transpose_product(weight, x, room, count, depth, rows, width, threads)
        sample = positions if few else rows * width
        strides = (sample, width, width * channels) if last else (sample, width * taps, width)
        native.conv_transpose_fold(room, strides, part, part.shape[0], channels, numbers, *epilogue)


def _finish(
    y: Tensor, input: Tensor, activation: str | None, epilogue: tuple, out: Tensor | None
) -> Tensor:
    """The epilogue over ``y``, in place where its memory can be the result's."""
    layout = memory_format(input)
    y = y.contiguous(memory_format=layout)
    target = out
    if target is None or target.dtype is not y.dtype or target.stride() != y.stride():
        target = y if y.dtype is input.dtype else torch.empty_like(y, dtype=input.dtype)
    bare = activation is None and epilogue[0] is epilogue[1] is epilogue[2] is None
    if bare and target is y:
        pass
    elif layout is torch.contiguous_format:
        inner = math.prod(y.shape[2:])
        backends.native().channel_epilogue(y, target, y.shape[0], y.shape[1], inner, *epilogue)
    else:
        outer = y.numel() // y.shape[1]
        backends.native().channel_epilogue(y, target, outer, y.shape[1], 1, *epilogue)
    if out is not None and target is not out:
        out.copy_(target)
        return out
    return target
