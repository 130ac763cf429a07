"""For tests of kernels, fastgen's and your own: equality of bits, the error budget, and the layouts
and memory that give a wrong kernel away. The strategies at the end need hypothesis."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "reversed", "strided", "offset", "half", "expanded")
SHAPES = ((1,), (2,), (3,), (1, 16, 8), (2, 1024), (1, 1025), (2, 3, 5, 7, 2), (1, 2, 33, 65))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# ---- equality of bits ----------------------------------------------------------------------------


def bits(value: Tensor) -> Tensor:
    """A tensor's bits as integers of its shape, with one pattern for every NaN."""
    value = value.detach().resolve_conj().contiguous()
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.is_floating_point():
        value = torch.where(value.isnan(), torch.full_like(value, torch.nan), value)
    return value.view(_INTEGERS[value.element_size()])


def assert_bitwise(actual: Any, expected: Any) -> None:
    """The same dtype, shape and bits: any NaN equals any NaN, 0.0 is not -0.0, nothing is close.

    actual, expected: tensors on any device, or sequences and mappings of them, alike in length and
    keys. Raises AssertionError with how many elements differ, and where the first one is.
    """
    for a, e in _pairs(actual, expected):
        assert a.dtype == e.dtype, f"got {a.dtype}, expected {e.dtype}"
        assert a.shape == e.shape, f"got shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        a, e = a.cpu(), e.cpu()
        different = bits(a) != bits(e)
        different = different.any(-1) if a.is_complex() else different
        if different.any():
            place = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(different.sum())} of {different.numel()} elements differ, the first at "
                f"{place}: {a[place].item()!r} instead of {e[place].item()!r}"
            )


def ulps(actual: Tensor, expected: Tensor) -> int:
    """The greatest distance in units in the last place: how many numbers of the dtype lie between.

    0 where both are NaN, or both zero; beyond counting (2^62) where only one is NaN. Raises
    ValueError for two dtypes or shapes, TypeError for what is not floating.
    """
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        raise ValueError("actual, expected: are not of one dtype and shape")
    if not actual.is_floating_point():
        raise TypeError(f"actual: got {actual.dtype}, expected a floating dtype")
    if actual.numel() == 0:
        return 0
    a, e = (_in_order(value.cpu()) for value in (actual, expected))
    if (actual.cpu().isnan() != expected.cpu().isnan()).any():
        return 1 << 62
    if actual.element_size() < 8:
        return int((a - e).abs().max())
    pairs = zip(a.flatten().tolist(), e.flatten().tolist(), strict=True)
    return max(abs(x - y) for x, y in pairs)  # int64 would overflow


def _in_order(value: Tensor) -> Tensor:
    """Integers that are ordered as the numbers are: -0.0 and 0.0 are both 0."""
    words = bits(value).long()
    lowest = -(1 << (8 * value.element_size() - 1))
    return torch.where(words < 0, lowest - words, words)


# ---- the error budget ----------------------------------------------------------------------------


def oracle(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result with every floating tensor of its arguments in float64 (complex ones in
    complex128)."""

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = pytree.tree_map(widened, (args, kwargs))
    return function(*args, **kwargs)


def error_ratio(actual: Tensor, reference: Tensor, oracle: Tensor, rounding: float = 0.0) -> float:
    """The error of ``actual`` against ``oracle`` (float64), over what is allowed for once: that of
    ``reference``, or one rounding of the largest value (or ``rounding``, where that is larger),
    since a reference may be right by chance.

    Infinite where ``actual`` is not finite and both of them are, or finite where both are NaN, or
    both the same infinity; where one of them alone is finite nothing is asked.
    """
    dtype = actual.dtype
    if not dtype.is_floating_point or not actual.shape == reference.shape == oracle.shape:
        raise ValueError("actual, reference, oracle: expected floating tensors of one shape")
    actual, reference, exact = (v.detach().cpu().double() for v in (actual, reference, oracle))
    finite = exact.isfinite() & reference.isfinite()
    lost = (exact.isnan() & reference.isnan()) | (exact.isinf() & (exact == reference))
    if bool((lost & actual.isfinite()).any()):
        return float("inf")
    if not finite.any():
        return 0.0
    unit = (torch.finfo(dtype).eps * exact.abs()[finite].max()).clamp(min=rounding)
    worst, theirs = ((v - exact).abs()[finite].max() for v in (actual, reference))
    if worst == 0:
        return 0.0
    return float(worst / torch.maximum(theirs, unit)) if worst.isfinite() else float("inf")


def assert_close_to_oracle(
    actual: Any, reference: Any, oracle: Any, times: float = 2.0, rounding: float = 0.0
) -> None:
    """The largest error is at most ``times`` that of a reference in the same dtype.

    actual: the kernel's result. reference: eager PyTorch's, in the dtype of ``actual``. oracle: the
    same in float64 (see ``oracle``). Tensors of one shape, or equal trees of them. Where the
    reference is exact by chance, one rounding of the largest value stands for its error; rounding:
    that of what the values are made from, where it was larger than they are.
    Raises AssertionError with the errors.
    """
    for (a, r), (_, o) in zip(_pairs(actual, reference), _pairs(actual, oracle), strict=True):
        assert a.dtype == r.dtype, f"got {a.dtype}, the reference has {r.dtype}"
        assert a.shape == r.shape == o.shape, f"got shapes {a.shape}, {r.shape} and {o.shape}"
        assert a.is_floating_point(), f"got {a.dtype}, expected a floating dtype"
        ratio = error_ratio(a, r, o, rounding)
        assert ratio <= times, f"the error is {ratio:.3g} times the reference's, allowed {times:g}"


def _pairs(a: Any, b: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two trees, side by side; what else is in them is equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [(a, b)]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        assert set(a) == set(b), f"got keys {sorted(map(str, a))}, expected {sorted(map(str, b))}"
        return [pair for key in a for pair in _pairs(a[key], b[key])]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b), f"got {len(a)} entries, expected {len(b)}"
        return [pair for x, y in zip(a, b, strict=True) for pair in _pairs(x, y)]
    same = type(a) is type(b) and bool(a == b)
    assert same, f"got {a!r}, expected {b!r}"
    return []


# ---- memory and layouts --------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, memory that is not initialised holds NaN (the largest integer in integer tensors): a
    kernel that misses an element, or adds to what it should set, is found. PyTorch's deterministic
    mode, which other operators then follow as well, with a warning where they cannot."""
    deterministic = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The values of a tensor in memory as ``layout`` names it.

    "contiguous"; "reversed": the dims stored in the opposite order, as channels-last is;
    "strided": every second element of a longer row, with NaN between; "offset": contiguous, but
    not where an allocation begins; "half": the upper half of dimension 1 of a wider tensor;
    "expanded": the first of dimension 1 repeated over it with a
    stride of zero, the one layout that changes the values. Raises ValueError for another name.
    """
    if layout == "contiguous":
        return value.contiguous()
    if layout == "reversed":
        order = list(range(value.ndim))[::-1]
        return value.permute(order).contiguous().permute(order)
    if layout == "strided" and value.ndim:
        room = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), _poison(value))
        return room[..., 1::2].copy_(value)
    if layout == "offset":
        room = value.new_full((value.numel() + 1,), _poison(value))
        return room[1:].view(value.shape).copy_(value)
    if layout == "half" and value.ndim > 1:
        rows, channels, *rest = value.shape
        room = value.new_full((rows, 2 * channels, *rest), _poison(value))
        return room[:, channels:].copy_(value)
    if layout == "expanded":
        return value[:, :1].expand(value.shape) if value.ndim > 1 else value.contiguous()
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {LAYOUTS}")
    return value.contiguous()


def _poison(value: Tensor) -> float:
    """What lies where nothing should be read."""
    if value.is_floating_point() or value.is_complex():
        return torch.nan
    return 1 if value.dtype == torch.bool else torch.iinfo(value.dtype).max


def random_layout(value: Tensor, seed: int) -> Tensor:
    """The values of a tensor in one of the layouts that keep them."""
    return laid_out(value, random.Random(seed).choice(LAYOUTS[:-1]))


# Ordinary numbers hide what these show.
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), float("nan"), 3e38, 65504.0)


def sample_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    *,
    special: bool = False,
) -> Tensor:
    """Normals that depend on nothing but the arguments; special: some are zeros of both signs,
    denormals, infinities, NaN and the largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator)
    if special and values.numel():
        places = torch.randperm(values.numel(), generator=generator)[: len(SPECIAL)]
        values.view(-1)[places] = torch.tensor(SPECIAL[: len(places)])
    return laid_out(values.to(dtype), layout)


# ---- hypothesis strategies -----------------------------------------------------------------------


def shapes(*, empty: bool = True) -> SearchStrategy[tuple[int, ...]]:
    """Shapes (B, ...) of one to five dims, small and odd ones, and those around a kernel's tiles;
    empty: also those without a sample."""
    from hypothesis import strategies as st

    least = 0 if empty else 1
    return st.one_of(
        st.tuples(st.integers(least, 3), st.integers(1, 70)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
        st.sampled_from(SHAPES),
    )


def dtypes() -> SearchStrategy[torch.dtype]:
    """float32, bfloat16 and float16."""
    from hypothesis import strategies as st

    return st.sampled_from(DTYPES)


def layouts(*, expanded: bool = True) -> SearchStrategy[str]:
    """Names for ``laid_out``; expanded: also the one that repeats a value."""
    from hypothesis import strategies as st

    return st.sampled_from(LAYOUTS if expanded else LAYOUTS[:-1])
