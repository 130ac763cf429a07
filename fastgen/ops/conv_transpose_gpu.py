"""The GPU's ways of ``conv_transpose``, of which a call takes the fastest.

- triton: matrix products (kernels/conv_transpose.py), in one of a few tilings.
- cuda: plain sums (csrc/cuda/conv_transpose.cu), for few channels a group.
- torch: PyTorch's operator, and one pass behind it.

Which is the fastest is measured where a layer first meets a size, and kept for the process; what is
not to be measured (``is_measured``) takes the first guess.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..reference import conv_transpose as reference
from . import conv_transpose_cpu
from .kernel import call

FEW, FEW_FLOATS = 4, 8  # output channels that leave tiles almost empty; without matrix units
FULL = 16  # channels that fill one


class Route(NamedTuple):
    """One way to run a layer: a backend, and for Triton a ``Config`` of its kernel."""

    backend: str
    config: Any = None


class Layer(NamedTuple):
    """What the choice depends on. Sizes count to the next power of two: signals of any length
    share a few choices."""

    backend: str  # "triton", or "gpu" for any
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    positions: int  # of input, batch included: log2, rounded up
    single: tuple[bool, ...]  # dims with one position, where any stride will do
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]
    activation: str | None
    planar: tuple[bool, bool, bool]  # input, weight, output


chosen: dict[Layer, Route] = {}


def conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int],
    scale: Tensor | None, shift: Tensor | None, activation: str | None, negative_slope: float,
    out: Tensor | None, shape: Sequence[int], last: bool | None, backend: str,
) -> Tensor:  # fmt: skip
    """``out``, or a new tensor of ``shape`` where it is None; plain tensors, checked already.

    backend: "triton" or "cuda", or "gpu" for any.
    """
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation, scale,
                 shift, activation, negative_slope)  # fmt: skip
    planar = conv_transpose_cpu.is_result_planar(input, out, last)
    if math.prod(shape) == 0:
        return conv_transpose_cpu.empty(input, shape, not planar) if out is None else out

    def run(route: Route) -> Tensor:
        return _run(route, arguments, out, shape, planar)

    positions = input.shape[0] * math.prod(input.shape[2:])
    layer = Layer(
        backend, input.device, input.dtype, is_tf32(input), (positions - 1).bit_length(),
        tuple(n == 1 for n in input.shape[2:]), tuple(weight.shape), tuple(stride), groups,
        tuple(dilation), activation,
        (conv_transpose_cpu.is_planar(input), weight.stride(1) != 1, planar),
    )  # fmt: skip
    if backend == "cuda":
        return run(Route("cuda"))
    route = None if torch.are_deterministic_algorithms_enabled() else chosen.get(layer)
    if route is None:
        routes = routes_of(layer, input.shape, shape, padding)
        route = routes[0]
        if is_measured(input):
            with torch.cuda.device(input.device if input.is_cuda else -1):
                found = fastest(routes, run)
            if found is not None:
                route = chosen[layer] = found
    return run(route)


def routes_of(
    layer: Layer, input: Sequence[int], output: Sequence[int], padding: Sequence[int]
) -> list[Route]:
    """What could be the fastest, the first guess first: by the sums of docs/generators.md."""
    inputs, outputs = layer.weight[0] // layer.groups, layer.weight[1]
    products: list[Route] = []
    if serves("triton", layer):
        kernels = importlib.import_module("fastgen.kernels.conv_transpose")
        sizes = kernels.Sizes.of(
            input[2:], output[2:], layer.weight[2:], layer.stride, padding, layer.dilation
        )
        products = [
            Route("triton", config)
            for config in kernels.configs(
                sizes, output[0], inputs, outputs, layer.groups, layer.activation, layer.dtype,
                layer.tf32, kernels.processors(layer.device),
            )
        ]  # fmt: skip
    if layer.backend == "triton":
        return products
    operator = [Route("torch")]
    sums = [Route("cuda")] if serves("cuda", layer) else []
    on_units = layer.dtype is not torch.float32 or layer.tf32  # the matrix units
    if layer.groups > 1 and min(inputs, outputs) < FULL:
        return sums + operator  # tiles would be almost empty
    if outputs <= (FEW if on_units else FEW_FLOATS):
        return products + operator + sums if on_units else sums + products + operator
    return operator + products


def serves(backend: str, layer: Layer) -> bool:
    return not backends.refusal("conv_transpose", backend, layer.device.type, layer.dtype)


def is_tf32(input: Tensor) -> bool:
    """Whether PyTorch's operator may round float32 to TF32."""
    if input.dtype is not torch.float32 or not input.is_cuda:
        return False
    settings: Any = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def is_measured(input: Tensor) -> bool:
    """Not on the CPU (Triton's interpreter), under ``torch.use_deterministic_algorithms`` (which of
    two fast ways wins may differ from run to run, and with it the last bits), or while a CUDA graph
    is captured."""
    return (
        input.is_cuda
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def fastest(routes: Sequence[Route], run: Callable[[Route], Tensor]) -> Route | None:
    """By the median of a few runs with cold caches; None without memory to time them. One that does
    not run here is left out, with a warning where it should have."""
    if len(routes) == 1:
        return routes[0]
    times: dict[Route, float] = {}
    for route in routes:
        try:
            times[route] = milliseconds(functools.partial(run, route))
        except torch.OutOfMemoryError:  # to time it takes some more
            return None
        except Exception as error:
            if route.backend == "torch":  # what is wrong here is wrong for all
                raise
            if type(error).__name__ != "OutOfResources":  # of shared memory for large tiles
                warnings.warn(f"fastgen: conv_transpose by {route} failed: {error}", stacklevel=6)
    return min(times, key=times.__getitem__) if times else routes[0]


def milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=20, return_mode="median")


def _run(
    route: Route, arguments: Any, out: Tensor | None, shape: Sequence[int], planar: bool
) -> Tensor:
    input, weight, bias, stride, padding, _, groups, dilation, scale, shift = arguments[:10]
    if route.backend == "torch":
        if not backends.refusal("conv_transpose", "triton", input.device.type, input.dtype):
            kernels = importlib.import_module("fastgen.kernels.conv_transpose")
            return conv_transpose_cpu.by_operator(kernels.channel_epilogue, planar, out, *arguments)
        y = reference.conv_transpose(*arguments)
        return conv_transpose_cpu.laid_out(y, planar) if out is None else out.copy_(y)
    if out is None:
        out = conv_transpose_cpu.empty(input, shape, not planar)
    if route.backend == "triton":
        call("triton", "conv_transpose", "conv_transpose", input.device, *arguments, out,
             route.config, is_tf32(input))  # fmt: skip
        return out
    vectors = map(conv_transpose_cpu.floats, (bias, scale, shift))
    geometry = conv_transpose_cpu.numbers_of(
        input.shape[2:], out.shape[2:], weight.shape, stride, padding, groups, dilation, planar
    )
    call("cuda", "", "conv_transpose_direct", input.device, input, weight, out, geometry, *vectors,
         conv_transpose_cpu.CODES[arguments[10]], arguments[11])  # fmt: skip
    return out
