"""Guidance rescale: Lin et al., "Common diffusion noise schedules ..." (2024), eq. 15 and 16."""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import CHUNK, per_sample_rows, sqrt, sum_by_halves, working_dtype
from .step import guide


def standard_deviation(values: Tensor) -> Tensor:
    """Unbiased, per sample: (B, ...) to (B,). Chunks of 1024 are centred on their own mean and
    joined as Chan, Golub & LeVeque (1983) do."""
    flat = per_sample_rows(values)
    elements = flat.shape[1]
    if elements == 0:
        return flat.new_full((flat.shape[0],), torch.nan)
    starts = torch.arange(0, elements, CHUNK, device=flat.device)
    counts = (elements - starts).clamp(max=CHUNK).to(flat.dtype)
    padded = torch.nn.functional.pad(flat, (0, len(starts) * CHUNK - elements))
    chunks = padded.unflatten(1, (-1, CHUNK))
    real = torch.arange(CHUNK, device=flat.device) < counts[:, None]
    sums = sum_by_halves(chunks)
    distance = torch.where(real, chunks - (sums / counts)[..., None], 0.0)
    centred = sum_by_halves(distance * distance)
    mean = sum_by_halves(sums) / torch.full_like(sums[:, 0], elements)
    shift = sums / counts - mean[:, None]
    total = sum_by_halves(centred) + sum_by_halves(counts * (shift * shift))
    return sqrt(total / torch.full_like(total, elements - 1))


def rescale(cond: Tensor, uncond: Tensor, guidance: Tensor, factor: float) -> Tensor:
    """``factor * std(cond) / std(guided) + (1 - factor)`` per sample: (B,)."""
    dtype = working_dtype(cond, uncond)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    ratio = standard_deviation(cond) / standard_deviation(guide(cond, uncond, guidance))
    share = torch.full_like(ratio, factor)
    return share * ratio + (1.0 - share)
