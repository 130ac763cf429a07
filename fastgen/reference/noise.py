"""Standard normals as a function of (seed, sample id, step, stream, element)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .arithmetic import cos_sin_turn, log, philox4x32, sqrt


def words(
    shape: Sequence[int],
    seeds: Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
    stream: int,
) -> Tensor:
    """The random words behind a batch of normals, as int64.

    ``shape``: (B, ...). ``seeds``: int64 (1,) or (B,); ``sample_ids``: int64 (B,). ``step``: an int
    or an int64 tensor. Returns (B, blocks, 4), blocks of four elements in row-major order.
    """
    device = seeds.device
    batch, elements = shape[0], math.prod(shape[1:])
    block = torch.arange(-(-elements // 4), device=device).view(1, -1)
    seeds, ids = seeds.view(-1, 1), sample_ids.view(batch, 1)
    mask = 0xFFFFFFFF
    count = torch.as_tensor(step, device=device)
    stepped = (count << 8 | stream) & mask
    key = (seeds & mask, seeds >> 32 & mask)
    counter = (block, stepped.view(1, 1), ids & mask, ids >> 32 & mask)
    parts = philox4x32(counter, key)
    return torch.stack([part.expand(batch, block.shape[1]) for part in parts], dim=-1)


def uniform(word: Tensor) -> Tensor:
    """A word as float32 in (0, 1]: float(w) 2^-32 + 2^-33."""
    return word.float() * 2.0**-32 + 2.0**-33


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two words to two independent float32 normals (Box & Muller 1958)."""
    radius = sqrt(-2.0 * log(uniform(radius_word)))
    cosine, sine = cos_sin_turn(uniform(angle_word))
    return radius * cosine, radius * sine


def normal(
    shape: Sequence[int],
    seeds: Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
    stream: int,
) -> Tensor:
    """float32 normals of ``shape`` (B, ...); arguments as for ``words``."""
    elements = math.prod(shape[1:])
    w = words(shape, seeds, sample_ids, step, stream)
    z0, z1 = box_muller(w[..., 0], w[..., 1])
    z2, z3 = box_muller(w[..., 2], w[..., 3])
    z = torch.stack([z0, z1, z2, z3], dim=-1)
    return z.flatten(1)[:, :elements].reshape(tuple(shape))


def key_tensors(
    seed: int | tuple[Tensor, int] | None,
    sample_ids: int | Tensor,
    batch: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """(seeds, sample ids) as ``words`` takes them, from what ``checks`` made of the arguments."""
    if seed is None:
        return None, None
    if isinstance(seed, int):
        seeds = torch.full((1,), seed - (seed >> 63 << 64), dtype=torch.int64, device=device)
    else:
        seeds = seed[0]
    if isinstance(sample_ids, int):
        sample_ids = torch.arange(sample_ids, sample_ids + batch, device=device)
    return seeds, sample_ids
