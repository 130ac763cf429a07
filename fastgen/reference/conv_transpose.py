"""Transposed convolution, a folded normalisation and an activation.

y = act(scale * (conv_transpose(x, w) + bias) + shift), scale and shift per output channel:
Dumoulin & Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import working_dtype

Activation = Callable[[Tensor, float], Tensor]

ACTIVATIONS: dict[str | None, Activation] = {
    None: lambda v, slope: v,
    "relu": lambda v, slope: F.relu(v),
    "leaky_relu": lambda v, slope: F.leaky_relu(v, slope),
    "tanh": lambda v, slope: torch.tanh(v),
    "sigmoid": lambda v, slope: torch.sigmoid(v),
    "silu": lambda v, slope: F.silu(v),
    "gelu": lambda v, slope: F.gelu(v),
}

# d act / d v, in operations that have a derivative themselves.
DERIVATIVES: dict[str | None, Activation] = {
    None: lambda v, slope: torch.ones_like(v),
    "relu": lambda v, slope: (v > 0).to(v.dtype),
    "leaky_relu": lambda v, slope: torch.where(v > 0, 1.0, slope).to(v.dtype),
    "tanh": lambda v, slope: 1.0 - torch.tanh(v).square(),
    "sigmoid": lambda v, slope: torch.sigmoid(v) * torch.sigmoid(-v),
    "silu": lambda v, slope: torch.sigmoid(v) * (1.0 + v * torch.sigmoid(-v)),
    "gelu": lambda v, slope: (
        0.5 * (1.0 + torch.erf(v * math.sqrt(0.5)))
        + v * torch.exp(-0.5 * v * v) * (1.0 / math.sqrt(2.0 * math.pi))
    ),
}


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), of the dtype of ``like`` (B, C, ...)."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 2))


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
) -> Tensor:
    """(B, C_in, ...) to (B, C_out, ...), in float32 (float64 where the input is), rounded once."""
    dtype = working_dtype(input)
    y = torch.ops.aten.convolution(
        input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
        stride, padding, dilation, True, output_padding, groups,
    )  # fmt: skip
    if scale is not None:
        y = y * per_channel(scale, y)
    if shift is not None:
        y = y + per_channel(shift, y)
    return ACTIVATIONS[activation](y, negative_slope).to(input.dtype)
