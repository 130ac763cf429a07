"""Transposed convolution as modules: torch's, with an activation that costs nothing.

``ConvTranspose1d``, ``2d`` and ``3d`` take the arguments of torch.nn's of the same names, share
their ``state_dict`` and are subclasses of them, so that what looks for those finds them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import backends, checks
from .ops import conv_transpose as ops
from .ops import conv_transpose_cpu
from .reference.conv_transpose import ACTIVATIONS

_OPS = {1: ops.conv_transpose1d, 2: ops.conv_transpose2d, 3: ops.conv_transpose3d}


class _ConvTranspose(nn.modules.conv._ConvTransposeNd):
    """What the three share: torch's own initialisation, and a forward of one kernel."""

    activation: str | None = None
    negative_slope: float = 0.2
    _last: bool | None = None  # torch.save cannot pickle a memory format

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        negative_slope: float = 0.2,
        memory_format: torch.memory_format | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if activation is not None:
            checks.one_of("activation", activation, [a for a in ops.ACTIVATIONS if a])
        self.activation = activation
        self.negative_slope = checks.number("negative_slope", negative_slope)
        self.memory_format = memory_format
        self._lay_out_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ConvTranspose:
        super()._apply(fn, recurse)
        self._lay_out_weight()
        return self

    def _lay_out_weight(self) -> None:
        """On a GPU, with its output channels side by side, as the kernels there read it: in another
        order it would be copied at every call."""
        weight = self._parameters.get("weight")  # None where it is parametrized
        if weight is not None and (as_read := _as_read(weight)) is not weight:
            weight.data = as_read

    @property
    def memory_format(self) -> torch.memory_format | None:
        """Of the result; None: as the input."""
        if self._last is None:
            return None
        if not self._last:
            return torch.contiguous_format
        return torch.channels_last_3d if self.weight.ndim == 5 else torch.channels_last

    @memory_format.setter
    def memory_format(self, value: torch.memory_format | None) -> None:
        self._last = ops.is_last(value, None)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """act(conv_transpose(input)): (B, C_in, ...) to (B, C_out, ...), or both without B.

        output_size: of the spatial dims (or of all), as in torch.nn: which of the sizes that
        ``stride`` allows. Raises ValueError for one that it does not.
        """
        return self._run(input, output_size, self.weight, self.bias, None, None, self.activation)

    def _run(
        self, input: Tensor, output_size: Sequence[int] | None, weight: Tensor,
        bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, activation: str | None,
    ) -> Tensor:  # fmt: skip
        dims = weight.ndim - 2
        padding: Any = self.output_padding
        if output_size is not None:
            sizes: list[Any] = [self.stride, self.padding, self.kernel_size, self.dilation]
            stride, pads, kernel, dilation = map(list, sizes)
            padding = self._output_padding(input, list(output_size), stride, pads, kernel, dims,
                                           dilation)  # fmt: skip
        own: Any = self
        return _OPS[dims](
            input, weight, bias, own.stride, own.padding, tuple(padding), own.groups, own.dilation,
            scale=scale, shift=shift, activation=activation,
            negative_slope=self.negative_slope, memory_format=self.memory_format,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        if self.activation == "leaky_relu":
            return f"{shown}, activation={self.activation!r}, slope={self.negative_slope}"
        return f"{shown}, activation={self.activation!r}" if self.activation else shown


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with ``activation``: see ``fastgen.conv_transpose1d``.

    activation, negative_slope: as there. memory_format: of the result, as there.
    """


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with ``activation``: see ``fastgen.conv_transpose2d``.

    activation, negative_slope: as there. memory_format: of the result, as there.
    """


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with ``activation``: see ``fastgen.conv_transpose3d``.

    activation, negative_slope: as there. memory_format: of the result, as there.
    """


def _is_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def _as_read(weight: Tensor) -> Tensor:
    """The same weight in the order that its device's kernels read best."""
    if _is_on_gpu(weight) and weight.stride(1) != 1:
        return conv_transpose_cpu.laid_out(weight.detach(), False)
    return weight


# ---- with a normalisation folded in, as ``fastgen.fuse`` makes them ------------------------------


class _Passed:
    """A normalisation that the layer before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in the layer before"  # type: ignore[misc]


class PassedBatchNorm1d(_Passed, nn.BatchNorm1d): ...


class PassedBatchNorm2d(_Passed, nn.BatchNorm2d): ...


class PassedBatchNorm3d(_Passed, nn.BatchNorm3d): ...


class PassedInstanceNorm1d(_Passed, nn.InstanceNorm1d): ...


class PassedInstanceNorm2d(_Passed, nn.InstanceNorm2d): ...


class PassedInstanceNorm3d(_Passed, nn.InstanceNorm3d): ...


PASSED: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[2]: cls
    for cls in (
        PassedBatchNorm1d, PassedBatchNorm2d, PassedBatchNorm3d,
        PassedInstanceNorm1d, PassedInstanceNorm2d, PassedInstanceNorm3d,
    )
}  # fmt: skip


class _Fused(_ConvTranspose):
    """A transposed convolution with the normalisation behind it, which stays where it was."""

    _norm: Any = None  # not a child: it has its place in the network
    _norm_class: Any = None
    _kept: Any = None  # by name: (state, tensors, what was made of them)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        weight, norm = self._own_weight(), self._norm
        if norm is None:
            return self._run(input, output_size, weight, self.bias, None, None, self.activation)
        if not _is_fixed(norm) or input.ndim < weight.ndim:  # by the batch's own statistics
            y = self._run(input, output_size, weight, self.bias, None, None, None)
            y = self._norm_class.forward(norm, y)
            return ACTIVATIONS[self.activation](y, self.negative_slope)
        scale, shift = self._scale_and_shift()
        return self._run(input, output_size, weight, self.bias, scale, shift, self.activation)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalisation with fixed statistics: scale and shift of each channel, float32."""
        norm = self._norm
        parts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        if _is_traced() or _differentiated(parts):
            return folded(*parts, norm.eps)
        return self._remembered("norm", parts, norm.eps, lambda: folded(*parts, norm.eps))

    def _own_weight(self) -> Tensor:
        """The weight; that of a parametrization is computed where what it is made of has changed,
        so that it stays packed."""
        if not parametrize.is_parametrized(self, "weight"):
            return self.weight
        parametrizations: Any = self.parametrizations
        made_of = parametrizations.weight
        parts = (*made_of.parameters(), *made_of.buffers())
        if self.training or _is_traced() or _differentiated(parts):
            return self.weight
        return self._remembered("weight", parts, None, lambda: _as_read(self.weight))

    def _remembered(self, name: str, parts: tuple, option: Any, make: Callable[[], Any]) -> Any:
        """What is made of tensors, made anew where one of them is another or has changed."""
        kept = self.__dict__.setdefault("_kept", {})
        state = option, [None if t is None else conv_transpose_cpu.state_of(t) for t in parts]
        known = kept.get(name)
        if known is None or known[0] != state or any(map(operator.is_not, known[1], parts)):
            with torch.inference_mode(False), torch.no_grad():
                known = kept[name] = state, parts, make()
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self._norm is None else f"{shown}, norm={self._norm_class.__name__}"


def _is_fixed(norm: Any) -> bool:
    """Whether a normalisation goes by its running statistics."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    return norm.track_running_stats or not isinstance(norm, nn.modules.instancenorm._InstanceNorm)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or backends.is_transformed()


def _differentiated(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def folded(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A normalisation with fixed statistics as scale (C,) and shift (C,)."""
    dtype = torch.float64 if variance.dtype is torch.float64 else torch.float32
    scale = torch.rsqrt(variance.to(dtype) + eps)
    scale = scale if weight is None else scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    return scale, shift if bias is None else shift + bias.to(dtype)


class FusedConvTranspose1d(_Fused, nn.ConvTranspose1d): ...


class FusedConvTranspose2d(_Fused, nn.ConvTranspose2d): ...


class FusedConvTranspose3d(_Fused, nn.ConvTranspose3d): ...


FUSED = {
    nn.ConvTranspose1d: FusedConvTranspose1d, nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.ConvTranspose3d: FusedConvTranspose3d, ConvTranspose1d: FusedConvTranspose1d,
    ConvTranspose2d: FusedConvTranspose2d, ConvTranspose3d: FusedConvTranspose3d,
}  # fmt: skip
