"""Shapes that the pointwise ops are timed at, each with its reason."""

SHAPES = {
    (1, 16, 8): "a robot policy's actions",
    (1, 4, 64, 64): "one latent of Stable Diffusion",
    (8, 4, 128, 128): "a batch of SDXL latents",
    (16, 3, 512, 512): "a batch of images, beyond every cache",
}
