"""The CPU backend of ``conv_transpose``, in one of two ways, by what was measured to be faster.

- packed: matrix products of weights packed once (csrc/cpu/conv_transpose.cpp), and kept for as long
  as the weight lives and stays the same.
- direct: PyTorch's operator, then one native pass in place for the rest.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..reference.conv_transpose import ACTIVATIONS

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as enum Activation in csrc/params.h
MANY_PHASES = 1024  # each of which is a product
FEW_POSITIONS, LARGE_WEIGHT = 256, 1 << 18  # of input, batch included; numbers


def is_planar(tensor: Tensor) -> bool:
    """Whether the channels of (B, C, ...) lie apart, instead of side by side in each place.

    (B, C, L) counts as apart, as in PyTorch."""
    if tensor.is_contiguous() or tensor.ndim == 3:
        return True
    return not tensor.movedim(1, -1).is_contiguous()


def empty(input: Tensor, shape: Sequence[int], last: bool | None = None) -> Tensor:
    """(B, C_out, ...), channels last or not; None: as the input."""
    if is_planar(input) if last is None else not last:
        made = torch.empty(shape, dtype=input.dtype, device=input.device)
    else:
        batch, channels, *sizes = shape
        made = torch.empty((batch, *sizes, channels), dtype=input.dtype, device=input.device)
        made = made.movedim(-1, 1)
    return backends.on_huge_pages(made)


def laid_out(y: Tensor, planar: bool) -> Tensor:
    """The same, dense with its channels apart or last."""
    return y.contiguous() if planar else y.movedim(1, -1).contiguous().movedim(-1, 1)


def product_dtype(input: Tensor) -> torch.dtype:
    """What the matrix products are done in: PyTorch's float16 on the CPU is ten times slower."""
    return torch.float32 if input.is_cpu and input.dtype is torch.float16 else input.dtype


class Geometry(NamedTuple):
    """What the kernel is told of a call, and of how it packs the weights."""

    sizes: tuple[int, ...]  # of the output
    layout: Any  # a ConvTransposeLayout: of packed weights and of the products


@functools.lru_cache(maxsize=1024)
def geometry_of(
    sizes: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
    planar: bool,
    dtype: torch.dtype,
    isa: str,
) -> Geometry:
    kernel = weight[2:]
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, o, d in zip(
            sizes, kernel, stride, padding, output_padding, dilation, strict=True
        )
    )
    # One input position has its taps apart at any stride: then none of them shares an output.
    stride = tuple(
        d * (k - 1) + 1 if n == 1 else s
        for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    )
    numbers = numbers_of(sizes, out, weight, stride, padding, groups, dilation, planar)
    return Geometry(out, backends.native().ConvTransposeLayout(numbers, checks.DTYPES.index(dtype)))


def numbers_of(
    sizes: Sequence[int], out: Sequence[int], weight: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], groups: int, dilation: Sequence[int], planar: bool,
) -> tuple[int, ...]:  # fmt: skip
    """As read_geometry of csrc/module.cpp takes them."""
    absent = 3 - len(sizes)
    numbers: tuple[int, ...] = ()
    for values, neutral in (
        (sizes, 1), (out, 1), (weight[2:], 1), (stride, 1), (padding, 0), (dilation, 1),
    ):  # fmt: skip
        numbers += (neutral,) * absent + tuple(values)
    return (*numbers, groups, weight[0] // groups, weight[1], int(planar))


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Another value where a tensor has moved or changed.

    What is written through ``.data`` leaves its version as it is, and inference tensors have none:
    its numbers then tell, or a thousand of many."""
    version = -1 if tensor.is_inference() else tensor._version
    native = backends._native is not None and tensor.is_cpu
    if native and tensor.dtype in backends.KERNEL_DTYPES:
        return version, backends.native().fingerprint(tensor)
    return version, tensor.data_ptr()


class Packed(NamedTuple):
    """Weights as the kernel reads them, and what they were packed from."""

    mark: weakref.ref[OrderedDict]
    state: tuple[int, int]
    digest: int  # equal where weights are packed alike
    data: Tensor


_packed: dict[int, Packed] = {}  # by the weight's id, for as long as it lives
# An attribute that lives and dies with its weight: torch swaps no tensor that has a weak reference
# itself. An empty OrderedDict, which every checkpoint may hold.
_MARK = "_fastgen_mark"


def packed(weight: Tensor, layout: Any) -> Tensor:
    """The weights as the kernel reads them: those of the last call, unless the weight has changed
    since, or another geometry wants them in another order."""
    key, mark = id(weight), weight.__dict__.get(_MARK)
    state, known = state_of(weight), _packed.get(key)
    if (
        known is not None
        and mark is not None
        and known.mark() is mark
        and (known.state, known.digest) == (state, layout.digest)
    ):
        return known.data
    data = backends.on_huge_pages(torch.empty(layout.bytes, dtype=torch.uint8))
    backends.native().conv_transpose_pack(weight, data, layout, torch.get_num_threads())
    mark = weight.__dict__[_MARK] = OrderedDict()  # a new one: a shallow copy shares the last
    held = weakref.ref(mark, functools.partial(_forget, key))
    _packed[key] = Packed(held, state, layout.digest, data)
    return data


def forget(weight: Tensor) -> None:
    """Of a weight that is trained: some optimizers change it and leave its version as it is."""
    _packed.pop(id(weight), None)


def _forget(key: int, of: weakref.ref[OrderedDict]) -> None:
    known = _packed.get(key)
    if known is not None and known.mark is of:
        del _packed[key]


def is_result_planar(input: Tensor, out: Tensor | None, last: bool | None) -> bool:
    """Of ``out`` as it lies, or of what is to be made in the format asked for."""
    if out is not None:
        return out.stride(1) != 1 or out.shape[1] == 1
    return is_planar(input) if last is None else not last


def floats(values: Tensor | None) -> Tensor | None:
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
    last: bool | None = None,
) -> Tensor:
    """``out``, or a new tensor where it is None; plain tensors, checked already."""
    channels = weight.shape[1] * groups
    planar = is_result_planar(input, out, last)
    by_product = is_packed(input, weight, stride, groups, planar)
    result, is_empty = out, input.shape[0] == 0
    if by_product or is_empty:
        geometry = geometry_of(
            tuple(input.shape[2:]), tuple(weight.shape), tuple(stride), tuple(padding),
            tuple(output_padding), groups, tuple(dilation), planar, input.dtype,
            backends.native().isa(),
        )  # fmt: skip
        if result is None:
            result = empty(input, (input.shape[0], channels, *geometry.sizes), not planar)
        if is_empty:
            return result
    if by_product and result is not None:
        epilogue = (CODES[activation], negative_slope, torch.get_num_threads())
        vectors = (floats(bias), floats(scale), floats(shift))
        data = packed(weight, geometry.layout)
        backends.native().conv_transpose(input, data, result, geometry.layout, *vectors, *epilogue)
    else:
        result = by_operator(
            _channel_epilogue, planar, result, input, weight, bias, stride, padding,
            output_padding, groups, dilation, scale, shift, activation, negative_slope,
        )  # fmt: skip
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return result


def is_packed(
    input: Tensor, weight: Tensor, stride: Sequence[int], groups: int, planar: bool
) -> bool:
    """Whether the packed products are the faster way. PyTorch's operator was faster, by up to 1.6x,
    with channels last where it has no weights to repack that outweigh their products, and the
    kernel is no multiple of the stride, or too short or narrow for a product to fill the units."""
    if math.prod(stride) > MANY_PHASES:
        return False
    if planar:
        return True
    if groups > 1:
        return False
    positions = input.shape[0] * math.prod(input.shape[2:])
    if positions <= FEW_POSITIONS and weight.numel() >= LARGE_WEIGHT:
        return True
    even = all(k % s == 0 and k > s for k, s in zip(weight.shape[2:], stride, strict=True))
    return even and weight.shape[0] >= 16


def by_operator(
    epilogue: Callable[..., None], planar: bool, out: Tensor | None, input: Tensor,
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], scale: Tensor | None,
    shift: Tensor | None, activation: str | None, negative_slope: float,
) -> Tensor:  # fmt: skip
    """PyTorch's operator, and the rest in one pass: in place where its memory can be the result's.

    epilogue(y, target, planar, bias, scale, shift, activation, negative_slope): the pass, with
    vectors in float32."""
    dtype = product_dtype(input)
    inside = bias is not None and bias.dtype is dtype
    x = input if dtype is input.dtype else input.to(dtype)
    weight = weight if dtype is weight.dtype else weight.to(dtype)
    y = torch.convolution(x, weight, bias if inside else None, stride, padding, dilation, True,
                          output_padding, groups)  # fmt: skip
    y = laid_out(y, planar)
    target = out
    if target is None or target.dtype is not y.dtype or target.stride() != y.stride():
        target = y if y.dtype is input.dtype else torch.empty_like(y, dtype=input.dtype)
    vectors = (None if inside else floats(bias), floats(scale), floats(shift))
    bare = activation is None and all(v is None for v in vectors)
    if not bare or target is not y:
        epilogue(y, target, planar, *vectors, activation, negative_slope)
    if out is not None and target is not out:
        out.copy_(target)
        return out
    return target


def _channel_epilogue(
    y, target, planar, bias, scale, shift, activation, negative_slope
) -> None:  # fmt: skip
    channels = y.shape[1]
    if planar:
        sizes = y.shape[0], channels, math.prod(y.shape[2:])
    else:
        sizes = y.numel() // channels, channels, 1
    backends.native().channel_epilogue(
        y, target, *sizes, bias, scale, shift, CODES[activation], negative_slope,
        torch.get_num_threads(),
    )  # fmt: skip
