"""What ``fastgen verify`` holds the reference itself to: the papers' formulas, in float64, written
apart from everything that the ops are made of (but for the normals, which have one of their own).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops.kernel import STEP_STREAMS
from .ops.noise import FORWARD_DIFFUSION, REPARAMETERIZE


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: Salmon et al. (2011), on (4, n) words."""
    low = np.uint64(0xFFFFFFFF)
    words = [w.astype(np.uint64) for w in counter]
    first, second = key
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [(right >> np.uint64(32)) ^ words[1] ^ np.uint64(first), right & low,
                 (left >> np.uint64(32)) ^ words[3] ^ np.uint64(second), left & low]  # fmt: skip
        first, second = (first + 0x9E3779B9) & 0xFFFFFFFF, (second + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(words)


def normals(shape, seed: int, step: int, stream: int) -> Tensor:
    """Box-Muller on the words of Philox: the noise contract, in float64."""
    batch, count = shape[0], math.prod(shape[1:])
    sample, block = np.divmod(np.arange(batch * -(-count // 4)), max(-(-count // 4), 1))
    rest = np.full_like(block, step << 8 | stream)
    counter = np.stack([block, rest, sample, np.zeros_like(block)])
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float32)
    u = (words * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2.0 * np.log(u[0::2])), 2.0 * np.pi * u[1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(4, -1)
    rows = torch.from_numpy(z.T.reshape(batch, 4 * (-(-count // 4))).copy())
    return rows[:, :count].reshape(tuple(shape))


def randn(make, *, dtype, shape, seed, step, stream) -> Any:
    """The normals themselves."""
    return normals(shape, 2**64 - 1 - seed, step, stream)


def _moments(make, dtype, other, shape, layout, second, seed, clamp=None) -> tuple[Tensor, Tensor]:
    mean, logvar = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    return mean, logvar if clamp is None else logvar.clamp(*clamp)


def gaussian_kl(make, *, dtype, other, shape, layout, second, seed) -> Any:
    """Kingma & Welling (2014), appendix B."""
    mean, logvar = _moments(make, dtype, other, shape, layout, second, seed)
    return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).reshape(
        shape[0], math.prod(shape[1:])
    ).sum(1)


def reparameterize(make, *, dtype, other, shape, layout, second, clamp, kl, seed) -> Any:
    """Kingma & Welling (2014), eq. 10."""
    mean, logvar = _moments(make, dtype, other, shape, layout, second, seed, clamp)
    z = mean + (0.5 * logvar).exp() * normals(shape, seed, seed, REPARAMETERIZE)
    divergence = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).reshape(
        shape[0], math.prod(shape[1:])
    ).sum(1)
    return (z, divergence) if kl else z


def cfg_combine(make, *, dtype, other, shape, layout, second, guidance, each, rescale, seed) -> Any:
    """Ho & Salimans (2022), eq. 6; rescale: Lin et al. (2024), eq. 15 and 16."""
    cond, uncond = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    over = (-1, *[1] * (len(shape) - 1))
    scale = torch.arange(shape[0]).view(over) * float(each) + guidance
    guided = uncond + scale * (cond - uncond)
    if rescale == 0.0:
        return guided
    if math.prod(shape[1:]) < 2:  # one value has no deviation
        return guided * torch.nan
    dims = tuple(range(1, len(shape)))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return rescale * guided * ratio + (1.0 - rescale) * guided


def combine(make, *, dtype, other, shape, layout, weights, seed) -> Any:
    """sum_k w_k x_k."""
    kinds = [dtype, other]
    return sum(
        weight * make(shape, kinds[i % 2], layout if i % 2 else "contiguous", seed + i)
        for i, weight in enumerate(weights)
    )


def add_noise(make, *, dtype, shape, layout, each, noise, velocity, seed) -> Any:
    """Ho et al. (2020), eq. 4; the v target of Salimans & Ho (2022)."""
    x0, z = make(shape, dtype, layout, seed), normals(shape, seed, 3, FORWARD_DIFFUSION)
    over = (-1, *[1] * (len(shape) - 1))
    level = torch.linspace(0, 1, shape[0], dtype=torch.float64).view(over) if each else (
        torch.tensor(0.37, dtype=torch.float64))  # fmt: skip
    signal, sigma = level.sqrt(), (1.0 - level).sqrt()
    results = [signal * x0 + sigma * z]
    results += [z] if noise else []
    results += [signal * z - sigma * x0] if velocity else []
    return tuple(results) if len(results) > 1 else results[0]


def _estimates(make, dtype, other, shape, layout, second, guided, prediction, clip, a_t, seed):
    """(x, estimate of x_0, estimate of eps): Ho et al. (2020), eq. 15, Salimans & Ho (2022)."""
    x, e = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    if guided:
        u = make(shape, other, layout, seed + 2)
        e = u + 3.0 * (e - u)
    signal, sigma = math.sqrt(a_t), math.sqrt(1.0 - a_t)
    x0, eps = {
        "epsilon": lambda: ((x - sigma * e) / signal, e),
        "sample": lambda: (e, (x - signal * e) / sigma),
        "v": lambda: (signal * x - sigma * e, sigma * x + signal * e),
    }[prediction]()
    if clip is not None:
        x0 = x0.clamp(*(clip if isinstance(clip, tuple) else (-clip, clip)))
    return x, x0, eps


def ddpm_step(make, *, dtype, other, shape, layout, second, guided, prediction, clip, levels,
              variance, given_noise, seed) -> Any:  # fmt: skip
    """Ho et al. (2020), eq. 6 and 7."""
    a, b = levels
    x, x0, _ = _estimates(make, dtype, other, shape, layout, second, guided, prediction, clip, a,
                          seed)  # fmt: skip
    if a == b and variance == "fixed_small":
        return x
    beta = 1.0 - a / b
    z = make(shape, other, layout, seed + 4) if given_noise else (
        normals(shape, seed, 5, STEP_STREAMS[0]))  # fmt: skip
    deviation: Any = {
        "fixed_small": math.sqrt(beta * (1.0 - b) / (1.0 - a)), "fixed_large": math.sqrt(beta),
    }.get(variance)  # fmt: skip
    if deviation is None:
        deviation = (0.5 * make(shape, other, second, seed + 3)).exp()
    mean = x if a == b else (
        math.sqrt(b) * beta / (1.0 - a) * x0 + math.sqrt(a / b) * (1.0 - b) / (1.0 - a) * x
    )  # fmt: skip
    return mean + (deviation * z if b < 1.0 else 0.0)


def ddim_step(make, *, dtype, other, shape, layout, second, guided, prediction, clip, levels, eta,
              clipped, seed) -> Any:  # fmt: skip
    """Song, Meng & Ermon (2021), eq. 12 and 16."""
    a, b = levels
    x, x0, eps = _estimates(make, dtype, other, shape, layout, second, guided, prediction, clip, a,
                            seed)  # fmt: skip
    if clipped and clip is not None:
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1.0 - a)
    deviation = eta * math.sqrt((1.0 - b) / (1.0 - a) * (1.0 - a / b)) if a < b else 0.0
    z = normals(shape, seed, 2, STEP_STREAMS[0])
    direction = math.sqrt(max(1.0 - b - deviation**2, 0.0))
    return math.sqrt(b) * x0 + direction * eps + deviation * z
