"""Validation of arguments: one function a kind, each naming the argument, what it got and takes."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ELEMENTS = 1 << 34  # of one sample: what the counter's 32-bit block can hold
MAX_STEPS = 1 << 24
_BEYOND = 2.0**128 - 2.0**103  # from here on, rounding to float32 gives infinity
SMALLEST = 2.0**-126  # its smallest normal number: beneath, what comes out depends on the processor


def tensor(name: str, value: Any, *, batch: bool = True) -> Tensor:
    """A floating tensor, with a batch dimension first."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: got {value.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: got a {layout} tensor, expected a dense one (torch.strided)")
    if batch and value.ndim == 0:
        raise ValueError(f"{name}: got a 0-d tensor, expected the batch as dimension 0")
    return value


def like(name: str, value: Any, other_name: str, other: Tensor) -> Tensor:
    """A floating tensor of another's shape and device; the dtype may differ."""
    tensor(name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected {other_name}'s {tuple(other.shape)}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name}: is on {value.device}, expected {other_name}'s device {other.device}"
        )
    return value


def instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a fastgen.{kind.__name__}")


def number(name: str, value: Any) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = " (its .item())" if isinstance(value, Tensor | np.ndarray) else ""
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -_BEYOND < number < _BEYOND:
        raise ValueError(f"{name}: got {value}, expected a finite number (float32's range)")
    return number


def alpha_bar(name: str, value: Any) -> float:
    """A cumulative signal level in [0, 1]."""
    value = number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
    return value


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer in [low, high)."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got bool, expected an integer")
    if not (isinstance(value, int) and torch.compiler.is_compiling()):  # there it may be symbolic
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: got {type(value).__name__}, expected an integer") from None
    if value < low or (high is not None and value >= high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name}: got {value}, expected an integer {bound}")
    return value


def one_of(name: str, value: Any, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, options))}")
    return value


def interval(name: str, value: Any) -> tuple[float, float]:
    """(low, high), or a float for (-value, value)."""
    try:
        pair = (-value, value) if isinstance(value, numbers.Real) else tuple(value)
    except TypeError:
        pair = ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in pair):
        raise TypeError(f"{name}: got {value!r}, expected a float or a pair (low, high)")
    low, high = map(_bound, pair)
    if not low <= high:
        raise ValueError(f"{name}: got {value}, expected low <= high")
    return low, high


def _bound(value: Any) -> float:
    """Infinite beyond float32's range, zero beneath it."""
    bound = float(value)
    if abs(bound) >= _BEYOND:
        return math.copysign(math.inf, bound)
    return 0.0 if abs(bound) < SMALLEST else bound


def shape(value: Any) -> tuple[int, ...]:
    """(B, ...), of which the noise counter can number a sample."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise TypeError(f"shape: got {type(value).__name__}, expected a sequence of integers")
    sizes = tuple(integer("shape", n, 0) for n in value)
    if not sizes:
        raise ValueError("shape: got (), expected the batch as dimension 0")
    size(sizes)
    return sizes


def size(shape: Sequence[int]) -> None:
    """A sample that the noise counter can number."""
    if math.prod(shape[1:]) > MAX_ELEMENTS:
        raise ValueError(
            f"shape: a sample of {math.prod(shape[1:])} elements, expected at most 2^34, "
            "which is what the noise counter can number"
        )


def step(value: Any) -> int:
    """The count that tells the noises of one seed apart."""
    if value is None:
        raise ValueError("step: must be given with seed, or every call would repeat the noise")
    return integer("step", value, 0, MAX_STEPS)


def seed(value: Any, batch: int, device: torch.device) -> int | tuple[Tensor, int]:
    """An int in [0, 2^64), or int64 (1,) or (B,) with its stride per sample."""
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < 1 << 64:
            return value
        raise ValueError(f"seed: got {value}, expected an integer in [0, 2^64)")
    if isinstance(value, torch.Generator):
        raise TypeError("seed: got a torch.Generator, expected an int: generator.initial_seed()")
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed: got a {value.dtype} tensor, expected torch.int64")
        seeds = value.resolve_neg().reshape(-1).to(device, non_blocking=True).contiguous()
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        words = [integer("seed", v, 0, 1 << 64) for v in value]
        seeds = torch.tensor([w - (w >> 63 << 64) for w in words], dtype=torch.int64, device=device)
    else:
        return integer("seed", value, 0, 1 << 64)
    if seeds.numel() not in (1, batch):
        raise ValueError(f"seed: got {seeds.numel()} of them, expected one, or {batch} (the batch)")
    return seeds, int(seeds.numel() > 1)


def sample_ids(value: Any, batch: int, device: torch.device) -> int | Tensor:
    """int64 (B,), or the first of consecutive ids."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"sample_ids: got a {value.dtype} tensor, expected torch.int64")
        ids = value.resolve_neg().reshape(-1).to(device, non_blocking=True).contiguous()
    elif isinstance(value, Sequence | np.ndarray | range) and not isinstance(value, str | bytes):
        words = [integer("sample_ids", v, 0, 1 << 63) for v in value]
        ids = torch.tensor(words, dtype=torch.int64, device=device)
    else:
        raise TypeError(
            f"sample_ids: got {type(value).__name__}, expected a sequence or int64 tensor of them, "
            "one per sample, as in [7]"
        )
    if ids.numel() != batch:
        raise ValueError(f"sample_ids: got {ids.numel()}, expected {batch}, one per sample")
    return ids


def per_sample(name: str, value: Any, batch: int, device: torch.device) -> float | Tensor:
    """A float for all, or a floating tensor or sequence (B,) (or (1,)) on ``device``."""
    if isinstance(value, numbers.Real):
        return number(name, value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        listed = [number(name, v) for v in value]
        value = torch.tensor(listed, dtype=torch.float64, device=device)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.tensor(value, dtype=torch.float64, device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float or one per sample")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got a {value.dtype} tensor, expected a floating one")
    if value.device != device and value.numel() == 1 and value.ndim == 0:
        value = value.to(device)
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, expected {device}")
    if value.numel() not in (1, batch) or value.ndim > 1:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected a float or shape ({batch},)"
        )
    return value.reshape(-1)


class _Footprint:
    """The addresses a tensor covers, as NumPy's array interface; never read through."""

    def __init__(self, value: Tensor) -> None:
        width = value.element_size()
        self.__array_interface__ = {
            "shape": tuple(value.shape),
            "strides": tuple(s * width for s in value.stride()),
            "typestr": f"|V{width}",
            "data": (value.data_ptr(), False),
            "version": 3,
        }


def _footprint(value: Tensor) -> np.ndarray:
    return np.asarray(_Footprint(value))


def out(value: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        inputs: Sequence[Tensor | None]) -> Tensor:  # fmt: skip
    """A tensor to write into: it may be one of the inputs, but not overlap one partly."""
    if not isinstance(value, Tensor):
        raise TypeError(f"out: got {type(value).__name__}, expected a torch.Tensor")
    if value.shape != tuple(shape):
        raise ValueError(f"out: got shape {tuple(value.shape)}, expected {tuple(shape)}")
    if value.dtype != dtype or value.device != device:
        raise ValueError(f"out: got {value.dtype} on {value.device}, expected {dtype} on {device}")
    if value.requires_grad:
        raise ValueError("out: requires grad; an output is written without a gradient")
    if value.numel() == 0 or torch.compiler.is_compiling() or not _has_memory(value):
        return value
    if is_frozen(value):
        raise ValueError("out: an inference tensor, which is written under inference_mode alone")
    if not value.is_contiguous() and not _is_injective(value):
        raise ValueError("out: several of its elements share memory (an expanded tensor)")
    for given in inputs:
        if given is not None and overlaps_partly(value, given):
            raise ValueError(
                "out: overlaps an input partly; give the input itself, or other memory"
            )
    return value


def is_frozen(out: Tensor) -> bool:
    """Whether torch lets nobody write a tensor here: one of inference mode, outside of it."""
    return out.is_inference() and not torch.is_inference_mode_enabled()


def overlaps_partly(out: Tensor, given: Tensor) -> bool:
    """Whether writing an element may change another one of an input, to be read later."""
    if out is given or not (_has_memory(out) and _has_memory(given)):
        return False
    return not _same_view(out, given) and _overlap(out, given)


def _has_memory(value: Tensor) -> bool:
    """Whether a tensor's elements lie where it says: not those of subclasses and meta tensors."""
    return type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta


def _is_injective(value: Tensor) -> bool:
    """Whether each element has memory of its own: no dim reaches into the span of smaller ones."""
    span = 0
    for stride, count in sorted(zip(value.stride(), value.shape, strict=True)):
        if count > 1:
            if stride <= span:
                return False
            span += stride * (count - 1)
    return True


def apart(outs: Sequence[Tensor]) -> None:
    """Outputs share no memory with each other."""
    for i, value in enumerate(outs):
        if any(_overlap(value, other) for other in outs[:i]):
            raise ValueError(f"out[{i}]: overlaps another output")


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, last = _span(a)
    start, end = _span(b)
    if end <= first or last <= start:
        return False
    try:
        return np.shares_memory(_footprint(a), _footprint(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _span(value: Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one behind its last."""
    start = value.data_ptr()
    if value.numel() == 0:
        return start, start
    reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return start, start + (reach + 1) * value.element_size()


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether each element lies where the other's does; a dim of one has a stride in name only."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
    )
