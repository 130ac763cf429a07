"""Tiles of CHUNK logically consecutive elements of one sample, in tensors of any strides.

A kernel gets its tensors' addresses, the `sizes` of the dims that describe them all, and for each
tensor, in order, a tuple in `strides`: of the batch, then of each of `sizes`, in elements. Both are
empty where every tensor is dense, one sample after the other. The twin of csrc/layout.h and
csrc/cpu/tile.h.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arithmetic import CHUNK, from_bfloat16, normals, to_bfloat16

MAX_DIMS = 8

# How every exact kernel is compiled: eight elements a thread, nothing contracted.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Layout(NamedTuple):
    batch: int
    elements: int  # of one sample
    sizes: tuple[int, ...]  # outermost first; empty where every tensor is dense
    strides: tuple[tuple[int, ...], ...]  # of each tensor: of the batch, then of each of `sizes`
    align: int  # any aligned run of so many elements is one in memory, in every tensor

    @property
    def chunks(self) -> int:
        return -(-self.elements // CHUNK.value)

    @property
    def wide(self) -> bool:
        return self.elements + CHUNK.value >= 2**31


@lru_cache(maxsize=1024)
def coalesce(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    ordered: bool = True,
    per_sample: bool = True,
) -> Layout:
    """The fewest dims that describe all tensors of `shape`, given their strides in elements.

    Unless `ordered`, dims may be walked in the order of the first tensor's memory; unless
    `per_sample`, the batch is one more dim of a single sample.

    Raises:
        ValueError: more than 8 dims remain.
    """
    first = 1 if per_sample and shape else 0
    dims = [dim for dim in range(first, len(shape)) if shape[dim] != 1]
    if not ordered and strides:
        dims.sort(key=lambda dim: -strides[0][dim])
    sizes: list[int] = []  # innermost first, as `inner`, whose strides a merged dim has
    inner: list[int] = []
    for dim in reversed(dims):
        if inner and all(stride[dim] == stride[inner[-1]] * sizes[-1] for stride in strides):
            sizes[-1] *= shape[dim]
        else:
            sizes.append(shape[dim])
            inner.append(dim)
    if len(sizes) > MAX_DIMS:
        raise ValueError(f"a layout of more than {MAX_DIMS} separate dimensions")
    sizes.reverse()
    inner.reverse()
    batch = shape[0] if first else 1
    elements = 1
    for size in sizes:
        elements *= size
    batch_strides = [stride[0] if first else 0 for stride in strides]
    if not sizes:
        sizes, merged = [1], [[1] for _ in strides]
    else:
        merged = [[stride[dim] for dim in inner] for stride in strides]
    unit = all(stride[-1] == 1 for stride in merged)
    dense = len(sizes) == 1 and unit and (batch == 1 or set(batch_strides) <= {elements})
    align = 1
    steps = [sizes[-1], elements] + [s for stride in merged for s in stride[:-1]] + batch_strides
    while unit and align < 8 and all(step % (2 * align) == 0 for step in steps):
        align *= 2
    if dense:
        return Layout(batch, elements, (), ((),) * len(strides), align)
    rows = tuple((row, *stride) for row, stride in zip(batch_strides, merged, strict=True))
    return Layout(batch, elements, tuple(sizes), rows, align)


class Operands:
    """The tensors of a call, None where absent, laid out together and given to a kernel by name.

    A tensor's place in `strides` is that of its argument; the places of a tuple follow each other.
    """

    def __init__(self, shape, ordered=True, per_sample=True, **tensors):
        every = []
        for value in tensors.values():
            every.extend(value if isinstance(value, tuple) else (value,))
        present = [t for t in every if t is not None]
        layout = coalesce(tuple(shape), tuple(t.stride() for t in present), ordered, per_sample)
        placed = iter(layout.strides)
        self.layout = layout
        self.device = present[0].device
        self.arguments = {
            **tensors,
            "sizes": layout.sizes,
            "strides": tuple(() if t is None else next(placed) for t in every if layout.sizes),
            "elements": layout.elements,
            "chunks": layout.chunks,
            "ALIGN": layout.align,
            "WIDE": layout.wide,
            # The neighbours that a thread has in 16 bytes.
            "VECTOR": 8 if any(t.element_size() == 2 for t in present) else 4,
        }

    def launch(self, kernel, **arguments) -> None:
        """One program for each tile, on the tensors' device and its current stream."""
        self._launch(kernel, self.layout.batch * self.layout.chunks, self.arguments | arguments)

    def launch_per_sample(self, kernel, **arguments) -> None:
        self._launch(kernel, self.layout.batch, arguments)

    def _launch(self, kernel, programs, arguments):
        if programs == 0:
            return
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            kernel[(programs,)](**arguments, **OPTIONS)


def as_int32(word: int) -> int:
    """The low 32 bits of `word`, in the range of the type that Triton gives to small integers."""
    return (word + 2**31) % 2**32 - 2**31


# The words of a key are a kernel's own arguments: Triton compiles again for new values in tuples.
KEY = ("seed_low", "seed_high", "id_low", "id_high", "noise_step", "seed_stride", "streams")


def noise_key(seed, sample_ids, step, step_pointer, streams) -> dict:
    """The arguments that `draw` needs of a kernel.

    seed: None, an int in [0, 2^64) or (int64 tensor, stride 0 or 1). sample_ids: the first one or
    an int64 tensor. step: counted from what `step_pointer` holds. streams: at most four.
    """
    if seed is None:
        return dict.fromkeys((*KEY, "seeds", "sample_ids", "step_pointer"))
    seeds, stride, seed = (None, 0, seed) if isinstance(seed, int) else (*seed, 0)
    ids, first = (None, sample_ids) if isinstance(sample_ids, int) else (sample_ids, 0)
    packed = sum(stream << 8 * m for m, stream in enumerate(streams))
    words = map(as_int32, (seed, seed >> 32, first, first >> 32, step, stride, packed))
    pointers = {"seeds": seeds, "sample_ids": ids, "step_pointer": step_pointer}
    return dict(zip(KEY, words, strict=True)) | pointers


@triton.jit
def draw(key, seeds, sample_ids, step_pointer, m: tl.constexpr, tile, VECTOR: tl.constexpr):
    """The standard normals of one tile, of the stream at place m."""
    sample, start, elements, mask, index = tile
    seed_low, seed_high, id_low, id_high, step, seed_stride, streams = key
    if seeds is None:
        k0 = seed_low.to(tl.uint32)
        k1 = seed_high.to(tl.uint32)
    else:
        seed = tl.load(seeds + sample * seed_stride)
        k0 = seed.to(tl.uint32)
        k1 = (seed >> 32).to(tl.uint32)
    if sample_ids is None:
        id = ((id_high.to(tl.int64) << 32) | id_low.to(tl.uint32).to(tl.int64)) + sample
    else:
        id = tl.load(sample_ids + sample)
    step = step.to(tl.uint32)
    if step_pointer is not None:
        step += tl.load(step_pointer).to(tl.uint32)
    c1 = (step << 8) | ((streams.to(tl.uint32) >> 8 * m) & 255)
    block = (start // 4).to(tl.uint32)
    c2, c3 = id.to(tl.uint32), (id >> 32).to(tl.uint32)
    return normals(block, c1, c2, c3, k0, k1, VECTOR)


@triton.jit
def tile_of(sizes, elements, chunks, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """This program's tile: (sample, start, elements, mask, index of each dim)."""
    elements = tl.cast(elements, tl.int64)
    program = tl.program_id(0)
    sample = program // chunks
    start = (program - sample * chunks).to(tl.int64) * CHUNK
    sample = sample.to(tl.int64)
    lane = tl.arange(0, CHUNK)
    left = tl.minimum(elements - start, CHUNK).to(tl.int32)
    mask = lane < tl.multiple_of(left, ALIGN)
    index = ()
    if len(sizes) > 0:
        rest = lane + (start if WIDE else start.to(tl.int32))
        for back in tl.static_range(1, len(sizes)):
            size = sizes[len(sizes) - back]
            index = (rest % size,) + index
            rest = rest // size
        index = (rest,) + index
    return sample, start, elements, mask, index


@triton.jit
def offsets(strides, place: tl.constexpr, tile, ALIGN: tl.constexpr):
    """Of a tile's elements in the tensor whose strides are at `place`."""
    sample, start, elements, mask, index = tile
    if len(index) == 0:
        offset = tl.multiple_of(sample * elements + start, ALIGN) + tl.arange(0, CHUNK)
    else:
        offset = tl.zeros((CHUNK,), tl.int64)
        for dim in tl.static_range(len(index)):
            offset += index[dim].to(tl.int64) * strides[place][1 + dim]
        offset = tl.multiple_of(offset + sample * strides[place][0], ALIGN)
        offset = tl.max_contiguous(offset, ALIGN)
    return offset


@triton.jit
def load(tensor, strides, place: tl.constexpr, tile, wanted, ALIGN: tl.constexpr):
    """The tile as float32; nothing is read unless `wanted`."""
    at = tensor + offsets(strides, place, tile, ALIGN)
    value = tl.load(at, mask=tile[3] & wanted, other=0.0)
    if tensor.dtype.element_ty == tl.bfloat16:
        value = from_bfloat16(value)
    return value.to(tl.float32)


@triton.jit
def store(tensor, strides, place: tl.constexpr, tile, value, ALIGN: tl.constexpr):
    """Rounds once, to the tensor's type."""
    if tensor.dtype.element_ty == tl.bfloat16:
        value = to_bfloat16(value)
    at = tensor + offsets(strides, place, tile, ALIGN)
    tl.store(at, value.to(tensor.dtype.element_ty), mask=tile[3])


def dense_arguments(*dtypes: str) -> dict:
    """What `Operands` gives a kernel for dense tensors of these types, as aot.source reads it."""
    return {
        "sizes": (),
        "strides": (),
        "elements": "i32",
        "chunks": "i32",
        "ALIGN": 8,
        "WIDE": False,
        "VECTOR": 4 if {*dtypes} == {"fp32"} else 8,
    }


def drawing_arguments() -> dict:
    """What `noise_key` gives a kernel for one seed and consecutive ids, as aot.source reads it."""
    return dict.fromkeys(KEY, "i32") | dict.fromkeys(("seeds", "sample_ids", "step_pointer"))
