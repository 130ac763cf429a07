"""When a call may go straight to a kernel, and when it must pass through torch's dispatcher."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.nn import Parameter

from .. import backends

LIBRARY = torch.library.Library("fastgen", "FRAGMENT")

# Keys of tensors that are not what their memory shows: flags, transforms, subclasses, layouts.
_HIDDEN: int = functools.reduce(
    operator.or_,
    (
        DispatchKeySet(getattr(DispatchKey, key)).raw_repr()
        for key in (
            "Conjugate", "Negative", "ZeroTensor", "Python", "PythonTLSSnapshot", "Functionalize",
            "FuncTorchBatched", "FuncTorchGradWrapper", "Sparse", "SparseCsr", "Quantized",
            "NestedTensor",
        )
    ),
)  # fmt: skip
_dispatch_keys = torch._C._dispatch_keys
_is_compiling = torch.compiler.is_compiling


def is_eager() -> bool:
    """Whether nothing stands between a call and its kernel: no tracing, mode or transform."""
    return not _is_compiling() and backends.is_eager()


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether any stands for several, as gradients do in a vectorised Jacobian."""
    functorch = torch._C._functorch
    return any(
        t is not None and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )


def wants_gradient(*tensors: object) -> bool:
    """Whether gradients are recorded and any of these needs one."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def constant(value):
    """A number that a row is made from: in a graph of torch.compile one value, not a symbol."""
    if _is_compiling() and type(value) in (int, float):
        return float.fromhex(float(value).hex())
    return value


def is_plain(*tensors: Tensor | None, recording: bool = False) -> bool:
    """Whether all are ordinary tensors, outside modes and transforms, that need no gradient;
    recording: or that need one, for an autograd.Function to record."""
    if not is_eager():
        return False
    grad = torch.is_grad_enabled() and not recording
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return False
        if grad and tensor.requires_grad:
            return False
        if _dispatch_keys(tensor).raw_repr() & _HIDDEN:
            return False
    return True
