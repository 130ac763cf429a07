"""Generators of the field, from their papers' layer tables, with random weights. ``width`` is the
number of channels of the narrowest inner layer: the papers' own by default."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _transposed_stack(dims: int, latent: int, width: int, outputs: int) -> list[nn.Module]:
    """From (B, latent, 1, ...) to 64 places a dim, kernels of 4: all but the last activation."""
    conv = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    channels = [latent, 8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = []
    for i in range(4):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layers += [
            conv(channels[i], channels[i + 1], 4, stride, padding, bias=False),
            norm(channels[i + 1]), nn.ReLU(True),
        ]  # fmt: skip
    return [*layers, conv(width, outputs, 4, 2, 1, bias=False)]


def dcgan(width: int = 128) -> nn.Sequential:
    """(B, 100, 1, 1) to images (B, 3, 64, 64): Radford, Metz & Chintala (2016), figure 1."""
    return nn.Sequential(*_transposed_stack(2, 100, width, 3), nn.Tanh())


class Pix2Pix(nn.Module):
    """Images (B, 3, 256, 256) to the same: the U-Net of Isola et al. (2017), appendix 6.1.1."""

    def __init__(self, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        down = [width * min(2**i, 8) for i in range(depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, outputs in enumerate(down):
            conv = nn.Conv2d(down[i - 1] if i else 3, outputs, 4, 2, 1)
            norm = nn.BatchNorm2d(outputs) if 0 < i < depth - 1 else nn.Identity()
            self.down.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
        for i in reversed(range(depth)):
            inputs = down[i] * (1 if i == depth - 1 else 2)
            outputs = down[i - 1] if i else 3
            conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
            behind = [nn.BatchNorm2d(outputs), nn.ReLU()] if i else [nn.Tanh()]
            self.up.append(nn.Sequential(conv, *behind))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for up in list(self.up)[1:]:
            x = up(torch.cat([x, skips.pop()], 1))
        return x


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
            nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y


def cyclegan(width: int = 64, blocks: int = 9) -> nn.Sequential:
    """Images (B, 3, 256, 256) to the same: Zhu et al. (2017), appendix 7.2."""
    w = width
    return nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), nn.InstanceNorm2d(w), nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(),
        nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.InstanceNorm2d(4 * w), nn.ReLU(),
        *[_Residual(4 * w) for _ in range(blocks)],
        nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(),
        nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1), nn.InstanceNorm2d(w), nn.ReLU(),
        nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh(),
    )  # fmt: skip


def vae_decoder(width: int = 32) -> nn.Sequential:
    """Latents (B, 128) to images (B, 3, 64, 64): the decoder of a convolutional VAE (Kingma &
    Welling, 2014) with kernels of 3 and strides of 2."""
    channels = [16 * width, 8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = [nn.Linear(128, 4 * channels[0]), nn.Unflatten(1, (-1, 2, 2))]
    for inputs, outputs in zip(channels, [*channels[1:], width], strict=True):
        layers += [nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1), nn.BatchNorm2d(outputs),
                   nn.LeakyReLU()]  # fmt: skip
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())


class HiFiGAN(nn.Module):
    """Mel spectrograms (B, 80, L) to audio (B, 1, 256 L): Kong et al. (2020), table 5, V1."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, 16 * width, 7, 1, 3)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for i, (kernel, stride) in enumerate(((16, 8), (16, 8), (4, 2), (4, 2))):
            outputs = 8 * width >> i
            self.ups.append(
                nn.ConvTranspose1d(2 * outputs, outputs, kernel, stride, (kernel - stride) // 2)
            )
            for size in (3, 7, 11):
                for dilation in (1, 3, 5):
                    for d in (dilation, 1):
                        self.blocks.append(
                            nn.Conv1d(outputs, outputs, size, 1, d * (size - 1) // 2, d)
                        )
        self.last = nn.Conv1d(width, 1, 7, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            total = torch.zeros_like(x)
            for kernel in range(3):
                y = x
                for dilation in range(3):
                    at = 18 * i + 6 * kernel + 2 * dilation
                    z = self.blocks[at](F.leaky_relu(y, 0.1))
                    y = y + self.blocks[at + 1](F.leaky_relu(z, 0.1))
                total = total + y
            x = total / 3.0
        return torch.tanh(self.last(F.leaky_relu(x)))


def voxel_gan(width: int = 64) -> nn.Sequential:
    """(B, 200, 1, 1, 1) to volumes (B, 1, 64, 64, 64): Wu et al. (2016), section 3.1."""
    return nn.Sequential(*_transposed_stack(3, 200, width, 1), nn.Sigmoid())


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with weights that keep the sizes of what passes, and statistics of a
    normalisation that was trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                taps = module.weight[0, 0].numel()
                up = isinstance(module, nn.modules.conv._ConvTransposeNd)
                inputs = module.weight.shape[0] * taps / math.prod(module.stride) if up else (
                    module.weight[0].numel())  # fmt: skip
                module.weight.normal_(0.0, inputs**-0.5, generator=generator)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0.0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.1, generator=generator)
    return network.eval()


#: name: (network, the shape of one input, of a narrow network's too)
GENERATORS = {
    "DCGAN": (dcgan, (100, 1, 1)),
    "pix2pix": (Pix2Pix, (3, 256, 256)),
    "CycleGAN": (cyclegan, (3, 256, 256)),
    "VAE decoder": (vae_decoder, (128,)),
    "HiFi-GAN": (HiFiGAN, (80, 86)),
    "3D-GAN": (voxel_gan, (200, 1, 1, 1)),
}
