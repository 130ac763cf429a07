"""Transposed convolution with bias, a folded normalisation and an activation in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..reference import conv_transpose as reference
from . import conv_transpose_cpu, conv_transpose_gpu, kernel
from .dispatch import LIBRARY, is_eager, is_plain

ACTIVATIONS = tuple(reference.ACTIVATIONS)

Size = int | Sequence[int]


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, scale: Tensor | None = None,
    shift: Tensor | None = None, activation: str | None = None, negative_slope: float = 0.2,
    out: Tensor | None = None, backend: str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    """``conv_transpose2d`` in one dimension: input (B, C_in, L) or (C_in, L)."""
    return _conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups,
                           dilation, scale, shift, activation, negative_slope, out, backend,
                           memory_format)  # fmt: skip


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, scale: Tensor | None = None,
    shift: Tensor | None = None, activation: str | None = None, negative_slope: float = 0.2,
    out: Tensor | None = None, backend: str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    """act(scale * (conv_transpose(input, weight) + bias) + shift): Dumoulin & Visin (2016), ch. 4.

    input: (B, C_in, H, W) or (C_in, H, W), any strides. The result has its dtype, rounded once, and
        its memory format, or the one asked for.
    weight: (C_in, C_out / groups, kH, kW), of the input's dtype.
    bias, scale, shift: (C_out,), floating. A normalisation in evaluation mode folds into the last
        two: scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
    stride, padding, output_padding, dilation: ints or one per dimension, as in
        ``torch.nn.functional.conv_transpose2d``.
    activation: None, "relu", "leaky_relu" (with ``negative_slope``), "tanh", "sigmoid", "silu" or
        "gelu" (the exact form).
    out: where to write; (B, C_out, H', W') of the input's dtype, overlapping no input partly.
    backend: "cpu", "cuda", "triton" or "reference"; by default the best that serves
        (``fastgen.info``).
    memory_format: of the result, torch.contiguous_format or torch.channels_last (for one dimension,
        (B, L, C) in memory); not beside ``out``.

    On the CPU the weight is kept a second time, in the order that the kernel reads, until it dies
    or changes (not in training). Of what is written through ``.data`` or NumPy, or to an inference
    tensor, a thousand numbers are looked at: a change of single ones is seen where it is made under
    ``torch.no_grad``. A sample's result does not depend on its batch there, where
    ``fastgen.ops.conv_transpose_cpu.is_packed`` chooses our product and not PyTorch's.
    On a GPU the ways to run a layer, PyTorch's operator among them, are timed where it first meets
    a size (``fastgen.ops.conv_transpose_gpu``); under ``torch.use_deterministic_algorithms``, and
    in the capture of a CUDA graph, the first guess runs.

    Under ``torch.autocast`` input and weight take its dtype, as in PyTorch.
    The error against float64 is at most twice that of PyTorch's own operators (three times on the
    CPU by Winograd's algorithm, where most inputs or weights are zero). Gradients reach
    input, weight, bias, scale and shift, and can be differentiated again. Raises ValueError or
    TypeError for what does not fit.
    """
    return _conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups,
                           dilation, scale, shift, activation, negative_slope, out, backend,
                           memory_format)  # fmt: skip


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, scale: Tensor | None = None,
    shift: Tensor | None = None, activation: str | None = None, negative_slope: float = 0.2,
    out: Tensor | None = None, backend: str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:  # fmt: skip
    """``conv_transpose2d`` in three dimensions: input (B, C_in, D, H, W) or (C_in, D, H, W)."""
    return _conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups,
                           dilation, scale, shift, activation, negative_slope, out, backend,
                           memory_format)  # fmt: skip


def _conv_transpose(
    dims, input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift,
    activation, negative_slope, out, backend, memory_format,
) -> Tensor:  # fmt: skip
    last = is_last(memory_format, out)
    if isinstance(input, Tensor) and _is_autocast(input.device.type):
        input, weight = (_as_autocast(t, input.device.type) for t in (input, weight))
    operands = (input, weight, bias, scale, shift)
    options = (stride, padding, output_padding, groups, dilation, activation)
    slope = checks.number("negative_slope", negative_slope)
    fixed = _PLAIN.issuperset(map(type, options)) or all(map(_is_fixed, options))
    key = known = None
    if fixed and backend is None and backends._native is not None and is_eager():
        shapes = backends._native.shapes_of(operands, torch.is_grad_enabled())
        key = None if shapes is None else (dims, options, shapes)
        known = _known.get(key)
    if known is not None and out is None and input.ndim == dims + 2:
        arguments = (input, weight, bias, *known[0], scale, shift, activation, slope)
        return conv_transpose_cpu.conv_transpose(*arguments, None, last)
    if known is None:
        known = _check(dims, operands, options, backend)
        if key is not None and known[2] == "cpu":
            if len(_known) >= 1024:
                _known.clear()
            _known[key] = known
    geometry, shape, name = known
    batched = input.ndim == dims + 2
    x = input if batched else input.unsqueeze(0)
    target = None  # where a kernel may write: `out`, unless it is an input as well
    if out is not None:
        checks.out(out, shape if batched else shape[1:], input.dtype, input.device, operands)
        if is_plain(out) and not any(
            t is not None and t.data_ptr() == out.data_ptr() for t in operands
        ):
            target = out if batched else out.unsqueeze(0)
    arguments = (x, weight, bias, *geometry, scale, shift, activation, slope)
    if name == "reference":
        y = reference.conv_transpose(*arguments)
        if last is not None:
            y = conv_transpose_cpu.laid_out(y, not last)
    elif is_plain(*operands):
        y = launch(name, *arguments, target, last)
    else:
        y = torch.ops.fastgen.conv_transpose(*arguments, name, last)
        if weight.requires_grad and torch.is_grad_enabled():
            conv_transpose_cpu.forget(weight)
    if not batched:
        y = y.squeeze(0)
    if out is None:
        return y
    in_place = target is not None and y.data_ptr() == target.data_ptr()
    return out if in_place else kernel.written(out, y)


def launch(
    backend: str, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int],
    scale: Tensor | None, shift: Tensor | None, activation: str | None, negative_slope: float,
    out: Tensor | None = None, last: bool | None = None,
) -> Tensor:  # fmt: skip
    """Straight through the backend named; arguments are checked already."""
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation, scale,
                 shift, activation, negative_slope)  # fmt: skip
    if backend == "cpu":
        return conv_transpose_cpu.conv_transpose(*arguments, out, last)
    shape = _output_shape(input.shape, weight.shape, stride, padding, output_padding, groups,
                          dilation)  # fmt: skip
    y = conv_transpose_gpu.conv_transpose(*arguments, out, shape, last, backend)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return y


def is_last(memory_format: Any, out: Any) -> bool | None:
    """Whether channels last was asked for; None: neither."""
    if memory_format is None:
        return None
    if out is not None:
        raise ValueError("memory_format: given beside out, which has its own")
    lasts = (torch.channels_last, torch.channels_last_3d)
    if memory_format not in (torch.contiguous_format, *lasts):
        raise ValueError(f"memory_format: got {memory_format}, expected torch.contiguous_format "
                         "or torch.channels_last")  # fmt: skip
    return memory_format in lasts


# ---- arguments ----------------------------------------------------------------------------------


_SIZES_END = 1 << 31  # as PyTorch's own


def _sizes(name: str, value: Any, dims: int, low: int) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value < _SIZES_END:
        return (value,) * dims
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) not in (1, dims):
            raise ValueError(f"{name}: got {len(value)} values, expected one, or {dims}")
        sizes = tuple(checks.integer(name, v, low, _SIZES_END) for v in value)
        return sizes * dims if len(sizes) == 1 else sizes
    return (checks.integer(name, value, low, _SIZES_END),) * dims


Checked = tuple[tuple[Any, Any, Any, Any, Any], tuple[int, ...], str]

_known: dict[tuple | None, Checked] = {}  # what was found valid on the CPU, by all that was seen


def _is_autocast(device_type: str) -> bool:
    known = device_type == "cpu" or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def _as_autocast(operand, device_type: str):
    """In the dtype of ``torch.autocast``, which leaves float64 alone."""
    if not isinstance(operand, Tensor) or operand.dtype not in backends.KERNEL_DTYPES:
        return operand
    return operand.to(torch.get_autocast_dtype(device_type))


_PLAIN = frozenset((int, str, type(None)))


def _is_fixed(option: Any) -> bool:
    """Whether an option is what it will always be, and equal to nothing of another type."""
    if type(option) is tuple:
        return all(type(value) is int for value in option)
    return option is None or type(option) in (int, str)


def _check(dims: int, operands: tuple, options: tuple, backend: str | None) -> Checked:
    """((stride, padding, output_padding, groups, dilation), output shape with a batch, backend);
    ValueError or TypeError for arguments that do not fit."""
    input, weight, bias, scale, shift = operands
    stride, padding, output_padding, groups, dilation, activation = options
    _check_operands(dims, input, weight)
    geometry = (
        _sizes("stride", stride, dims, 1),
        _sizes("padding", padding, dims, 0),
        _sizes("output_padding", output_padding, dims, 0),
        checks.integer("groups", groups, 1),
        _sizes("dilation", dilation, dims, 1),
    )
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: got {activation!r}, expected one of {known}")
    batched = input.shape if input.ndim == dims + 2 else (1, *input.shape)
    shape = _output_shape(batched, weight.shape, *geometry)
    for name, values in (("bias", bias), ("scale", scale), ("shift", shift)):
        _check_channels(name, values, shape[1], input.device)
    name = backends.choose("conv_transpose", backend, input.device, input.dtype)
    if backend is None and name in ("triton", "cuda"):
        name = "gpu"  # either, or PyTorch's operator: by what was measured
    return geometry, shape, name


def _check_operands(dims: int, input: Any, weight: Any) -> None:
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if input.ndim not in (dims + 1, dims + 2):
        raise ValueError(
            f"input: got {input.ndim} dimensions, expected {dims + 2} (B, C_in, ...), "
            f"or {dims + 1} without a batch"
        )
    if weight.ndim != dims + 2:
        raise ValueError(
            f"weight: got {weight.ndim} dimensions, expected {dims + 2} (C_in, C_out / groups, ...)"
        )
    if 0 in weight.shape[1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected output channels and "
                         "a kernel of at least 1")  # fmt: skip
    if weight.dtype != input.dtype:
        raise TypeError(f"weight: got {weight.dtype}, expected the input's {input.dtype}")
    if weight.device != input.device:
        raise ValueError(f"weight: is on {weight.device}, expected the input's {input.device}")


def _check_channels(name: str, values: Any, channels: int, device: torch.device) -> None:
    if values is None:
        return
    checks.tensor(name, values)
    if values.shape != (channels,):
        raise ValueError(
            f"{name}: got shape {tuple(values.shape)}, expected ({channels},), one per "
            "output channel"
        )
    if values.device != device:
        raise ValueError(f"{name}: is on {values.device}, expected {device}")


def _output_shape(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """From the shapes of a batched input and of weight."""
    if input[1] != weight[0]:
        raise ValueError(
            f"input: got {input[1]} channels, expected weight's first size {weight[0]}"
        )
    if input[1] == 0 or input[1] % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of {input[1]} input channels")
    sizes = []
    for i, size in enumerate(input[2:]):
        if output_padding[i] >= max(stride[i], dilation[i]):
            raise ValueError(
                f"output_padding: got {output_padding[i]}, expected less than stride {stride[i]} "
                f"or dilation {dilation[i]}"
            )
        reach = dilation[i] * (weight[2 + i] - 1)
        result = (size - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1
        if size < 1 or result < 1:
            raise ValueError(
                f"input: got spatial size {tuple(input[2:])}, which leaves an output of size "
                f"{result} in dimension {i}, expected at least 1"
            )
        sizes.append(result)
    return (input[0], weight[1] * groups, *sizes)


# ---- the registered op ---------------------------------------------------------------------------

LIBRARY.define(
    "conv_transpose(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] output_padding, SymInt groups, SymInt[] dilation, Tensor? scale, Tensor? shift, "
    "str? activation, float negative_slope, str backend, bool? last=None) -> Tensor"
)


def _kernel(input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift,
            activation, negative_slope, backend, last=None):  # fmt: skip
    return launch(backend, input, weight, bias, stride, padding, output_padding, groups, dilation,
                  scale, shift, activation, negative_slope, None, last)  # fmt: skip


def _fake(input, weight, bias, stride, padding, output_padding, groups, dilation, scale, shift,
          activation, negative_slope, backend, last=None):  # fmt: skip
    shape = _output_shape(input.shape, weight.shape, stride, padding, output_padding, groups,
                          dilation)  # fmt: skip
    return conv_transpose_cpu.empty(input, shape, last)


def _setup(ctx, inputs, output) -> None:
    (input, weight, bias, *geometry, scale, shift, ctx.activation, ctx.negative_slope, _,
     _) = inputs  # fmt: skip
    ctx.geometry = geometry
    ctx.save_for_backward(input, weight, bias, scale, shift)


def _backward(ctx, grad):
    """Through PyTorch's own convolution gradients, with the product computed again."""
    input, weight, bias, scale, shift = ctx.saved_tensors
    stride, padding, output_padding, groups, dilation = ctx.geometry
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_scale, needs_shift = ctx.needs_input_grad[8:10]
    dtype = conv_transpose_cpu.product_dtype(input)
    x, w = input.to(dtype), weight.to(dtype)
    over = [0, *range(2, input.ndim)]
    grad = grad.float()
    grad_scale = grad_shift = None
    if ctx.activation is not None or needs_scale:
        y = torch.ops.aten.convolution(
            x, w, None, stride, padding, dilation, True, output_padding, groups
        ).float()
        if bias is not None:
            y = y + reference.per_channel(bias, y)
        v = y if scale is None else y * reference.per_channel(scale, y)
        v = v if shift is None else v + reference.per_channel(shift, v)
        grad = grad * reference.DERIVATIVES[ctx.activation](v, ctx.negative_slope)
        if needs_scale:
            grad_scale = (grad * y).sum(over).to(scale.dtype)
    if needs_shift:
        grad_shift = grad.sum(over).to(shift.dtype)
    if scale is not None:
        grad = grad * reference.per_channel(scale, grad)
    grad_bias = grad.sum(over).to(bias.dtype) if needs_bias else None
    grad_input = grad_weight = None
    if needs_input or needs_weight:
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad.to(dtype), x, w, None, stride, padding, dilation, True, output_padding, groups,
            [needs_input, needs_weight, False],
        )  # fmt: skip
        grad_input = grad_input.to(input.dtype) if needs_input else None
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
    return (grad_input, grad_weight, grad_bias, None, None, None, None, None, grad_scale,
            grad_shift, None, None, None, None)  # fmt: skip


LIBRARY.impl("conv_transpose", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::conv_transpose", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "fastgen::conv_transpose", _backward, setup_context=_setup, lib=LIBRARY
)
