"""Dynamic thresholding: Saharia et al. (2022), section 2.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..plan import Threshold
from .arithmetic import per_sample_rows
from .step import INPUTS, NOISE, ROW_FLOATS, WEIGHTS


def quantile(values: Tensor, q: float) -> Tensor:
    """(B,) of |values| over each sample (B, ...), linear between two of its numbers; never NaN but
    where one of these is. Found by selection, so the same bits everywhere."""
    rows = per_sample_rows(values).abs()
    place = q * (rows.shape[1] - 1)
    below = math.floor(place)
    largest = rows.topk(rows.shape[1] - below, dim=1).values
    low, high = largest[:, -1], largest[:, max(-2, -largest.shape[1])]
    return low + (place - below) * (high - low)


def thresholded(row: Tensor, estimate: Tensor, threshold: Threshold) -> Tensor:
    """(B, 72): the row (1, 72) for each sample, with its own bounds -s and s and what is made of
    the clipped estimate divided by s. In the estimate's dtype."""
    row = row.to(estimate.dtype)
    if estimate.numel() == 0:
        return row
    s = quantile(estimate, threshold.quantile).clamp(1.0, threshold.maximum).unsqueeze(1)
    columns = torch.arange(ROW_FLOATS, device=row.device)
    of_denoised = (columns >= WEIGHTS) & (columns < NOISE) & ((columns - WEIGHTS) % INPUTS == 3)
    bounded = torch.where(columns == 2, -s, torch.where(columns == 3, s, row))
    return torch.where(of_denoised, bounded / s, bounded)
