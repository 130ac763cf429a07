"""What is timed: shapes with their reason, and the work that any implementation must do."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = {
    (1, 16, 8): "a robot policy's actions",
    (1, 4, 64, 64): "one latent of Stable Diffusion",
    (8, 4, 128, 128): "a batch of SDXL latents",
    (16, 3, 512, 512): "a batch of images, beyond every cache",
}
VAE_LATENTS = {(16, 8, 64, 64): "a batch of a VAE's latents, in training"}
PEERS = ("eager", "compile", "diffusers", "k-diffusion", "torch", "copy_")
# torch: one operator, and copy_: a copy, for scale
OPS = (
    "step",
    "guidance",
    "forward",
    "noise",
    "reparameterize",
    "conv_transpose",
    "fuse",
    "sampling",
    "diffusers",
    "sizes",
    "process",
)


@dataclass(frozen=True)
class Case:
    """One case of an op. bytes: every operand and result once; flops: adds, multiplies and the
    like, and for noise the instructions of its arithmetic are not counted."""

    op: str
    label: str
    reason: str
    bytes: int
    flops: int
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.label


def pointwise(
    op: str, *, tensors: int, flops: int, shapes: dict[tuple[int, ...], str] | None = None
) -> list[Case]:
    """A case a shape: ``tensors`` float32 tensors read or written, ``flops`` an element."""
    return [
        Case(
            op, str(shape), reason, 4 * tensors * math.prod(shape), flops * math.prod(shape), shape
        )
        for shape, reason in (shapes or SHAPES).items()
    ]


# C_in, C_out, input size, stride, padding, activation: DCGAN's generator of 64 x 64 images
# (Radford et al., 2016), kernel 4.
DCGAN = (
    (100, 1024, 1, 1, 0, "relu"),
    (1024, 512, 4, 2, 1, "relu"),
    (512, 256, 8, 2, 1, "relu"),
    (256, 128, 16, 2, 1, "relu"),
    (128, 3, 32, 2, 1, "tanh"),
)
# C_in, C_out, length, kernel, stride: a vocoder's upsampling (HiFi-GAN V1, Kong et al., 2020).
# One second of 22,050 Hz.
VOCODER = (
    (512, 256, 86, 16, 8),
    (256, 128, 688, 16, 8),
    (128, 64, 5504, 4, 2),
    (64, 32, 11008, 4, 2),
)
