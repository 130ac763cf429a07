"""The peers: each op as the papers write it, in eager PyTorch, without needless copies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cfg_combine(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    return uncond + guidance_scale * (cond - uncond)


def combine(a: Tensor, b: Tensor, c: Tensor, weights: tuple[float, float, float]) -> Tensor:
    return weights[0] * a + weights[1] * b + weights[2] * c


def reparameterize(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


def reparameterize_kl(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
    return reparameterize(mean, logvar), divergence


def add_noise(x0: Tensor, alpha_bar: float) -> Tensor:
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1.0 - alpha_bar) * torch.randn_like(x0)


def ddim_step(x: Tensor, epsilon: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    x0 = (x - math.sqrt(1.0 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1.0 - alpha_bar_prev) * epsilon


def ddpm_step(x: Tensor, epsilon: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    alpha = alpha_bar / alpha_bar_prev
    beta = 1.0 - alpha
    mean = (x - beta / math.sqrt(1.0 - alpha_bar) * epsilon) / math.sqrt(alpha)
    sigma = math.sqrt(beta * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar))
    return mean + sigma * torch.randn_like(x)
