"""The zoo's networks: a guided diffusion U-Net, a VAE and a DCGAN generator for 16x16 digits.

Images are (B, 1, 16, 16) float32 in [-1, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn import folded
from fastgen.ops.conv_transpose import conv_transpose2d

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class TransposedConv(nn.Module):
    """activation(norm(transposed convolution)), one launch in eval mode.

    There the batch norm is a scale and a shift of each channel, which the op applies as it
    stores. In training mode the batch's own statistics are needed, so the norm stays apart.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 1,
        *,
        norm: bool = True,
        activation: Literal["relu", "tanh"] = "relu",
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.activation = stride, padding, activation
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, kernel_size, kernel_size))
        self.bias = None if norm else nn.Parameter(torch.zeros(out_channels))
        self.norm = nn.BatchNorm2d(out_channels) if norm else None
        nn.init.normal_(self.weight, std=0.02 if norm else in_channels**-0.5 / kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H', W')"""
        scale = shift = None
        if self.norm is not None:
            if self.training:
                y = conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding)
                return _ACTIVATIONS[self.activation](self.norm(y))
            norm = self.norm
            statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
            scale, shift = folded(*statistics, norm.eps)  # type: ignore[arg-type]
        return conv_transpose2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )


def _transposed_stack(latent: int, width: int) -> nn.Sequential:
    """(B, latent, 1, 1) -> (B, 1, 16, 16): DCGAN's generator, Radford et al. (2016), figure 1."""
    return nn.Sequential(
        TransposedConv(latent, 2 * width, stride=1, padding=0),  # 4x4
        TransposedConv(2 * width, width),  # 8x8
        TransposedConv(width, 1, norm=False, activation="tanh"),  # 16x16
    )


class Generator(nn.Module):
    """The generator of a DCGAN. Radford, Metz & Chintala (2016)."""

    def __init__(self, latent: int = 64, width: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.layers = _transposed_stack(latent, width)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent), standard normal -> images (B, 1, 16, 16)"""
        images: Tensor = self.layers(z[:, :, None, None])
        return images


class VAE(nn.Module):
    """A variational autoencoder. Kingma & Welling (2014).

    p(x | z) is normal about `decode(z)`, independent for each pixel, with one learned variance
    exp(pixel_logvar) for all of them (Rybkin, Daniilidis & Levine, 2021).
    """

    def __init__(self, latent: int = 16, width: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),  # 8x8
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),  # 4x4
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 2 * latent),
        )
        self.decoder = _transposed_stack(latent, width)
        self.pixel_logvar = nn.Parameter(torch.tensor(-2.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, 16, 16) -> mean (B, latent), logvar (B, latent)"""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """z (B, latent) -> images (B, 1, 16, 16)"""
        images: Tensor = self.decoder(z[:, :, None, None])
        return images

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x from the mean of its posterior: (B, 1, 16, 16) -> the same."""
        return self.decode(self.encode(x)[0])


class UNet(nn.Module):
    """A class-conditional diffusion U-Net that predicts v. Ho, Jain & Abbeel (2020), appendix B.

    Labels are 0...9; `unconditional` stands for no label (Ho & Salimans, 2022). v is
    sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, 2022, appendix D).
    """

    unconditional = 10

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        embedded = 4 * width
        self.time = nn.Sequential(
            nn.Linear(width, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        self.label = nn.Embedding(11, embedded)
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.enter8 = ResidualBlock(width, width, embedded)
        self.down4 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.enter4 = ResidualBlock(2 * width, 2 * width, embedded)
        self.attention = SelfAttention(2 * width)
        self.leave4 = ResidualBlock(2 * width, 2 * width, embedded)
        self.up8 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave8 = ResidualBlock(2 * width, width, embedded)
        self.out = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), _zeroed(nn.Conv2d(width, 4, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor | int, cond: Tensor) -> Tensor:
        """x (B, 1, 16, 16) float32, t (B,) timesteps 0...999, or one for all, cond (B,) labels
        -> v, like x"""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        embedding = F.silu(self.time(_sinusoids(t, self.width)) + self.label(cond))
        at8 = self.enter8(self.stem(F.pixel_unshuffle(x, 2)), embedding)
        at4 = self.enter4(self.down4(at8), embedding)
        h = self.leave4(self.attention(at4), embedding)
        h = F.interpolate(self.up8(h), scale_factor=2.0)
        h = self.leave8(torch.cat([h, at8], 1), embedding)
        return F.pixel_shuffle(self.out(h), 2)


class ResidualBlock(nn.Module):
    """Two normalised convolutions, the second modulated by the embedding, beside a skip."""

    def __init__(self, in_channels: int, channels: int, embedded: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedded, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, in_channels, H, W), embedding (B, embedded) -> (B, channels, H, W)"""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        y: Tensor = self.skip(x) + self.conv2(h)
        return y


class SelfAttention(nn.Module):
    """Single-headed attention over the positions of a feature map, beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> like x"""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, H W, channels)
        y: Tensor = x + self.out(h.transpose(1, 2).reshape(x.shape))
        return y


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with all parameters 0, so that a block starts as its skip."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def _sinusoids(t: Tensor, width: int) -> Tensor:
    """Vaswani et al. (2017), section 3.5: t (B,) -> (B, width), cosines before sines."""
    octaves = torch.arange(width // 2, device=t.device) / (width // 2)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * octaves)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
